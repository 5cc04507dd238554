"""Chunks as one flat table: all that a layout is. What everything else groups by stands here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpattn.device_tables import IntArray

# Of the rank of each token, where there are many tokens: a plan has no more ranks, and they are compared several times as fast as in int64.
RANK = np.uint16


class Chunks(NamedTuple):
    """Who owns which new tokens: flat int64 arrays ``[c]``, an entry a chunk, by request and then by position.

    A chunk is a run of tokens of one request that one rank owns. Only chunks that hold a token are listed.

    >>> import cpattn
    >>> cpattn.plan([(0, 5), (7, 1)], cp_size=2, partition="contiguous").chunk_table
    Chunks(request=array([0, 0, 1]), start=array([0, 3, 0]), length=array([3, 2, 1]), rank=array([0, 1, 1]))

    Attributes:
        request: which request of the batch.
        start: the first of the chunk's tokens, counted within the new tokens of its request.
        length: how many tokens, at least 1.
        rank: who owns them.
    """

    request: IntArray
    start: IntArray
    length: IntArray
    rank: IntArray

    @property
    def rank_of_tokens(self) -> npt.NDArray[np.uint16]:
        """Who owns each new token of the batch: of type :data:`RANK`, ``[tokens]``."""
        return self.rank.astype(RANK).repeat(self.length)


class ByRank(NamedTuple):
    """The chunks of a table sorted by rank, each rank's in the order of the table, which is that of its rows.

    Attributes:
        order ``[c]``: the entries of the table, sorted.
        bounds ``[cp_size + 1]``: rank r has ``order[bounds[r] : bounds[r + 1]]``.
        rows ``[c]``: for each entry of the table, the row at which the chunk begins on its rank.
        tokens ``[cp_size]``: of each rank.
    """

    order: IntArray
    bounds: IntArray
    rows: IntArray
    tokens: IntArray

    @classmethod
    def of(cls, chunks: Chunks, cp_size: int) -> ByRank:
        """Sorts the chunks."""
        num_chunks = len(chunks.rank)
        per_rank = np.bincount(chunks.rank, minlength=cp_size)
        bounds = np.zeros(cp_size + 1, dtype=np.int64)
        per_rank.cumsum(out=bounds[1:])
        # numpy sorts numbers of 8 and of 16 bits in linear time, and a rank is one.
        order = chunks.rank.astype(np.min_scalar_type(cp_size - 1)).argsort(kind="stable")
        ends = np.zeros(num_chunks + 1, dtype=np.int64)
        chunks.length.take(order).cumsum(out=ends[1:])
        at_bounds = ends[bounds]
        rows = np.empty(num_chunks, dtype=np.int64)
        rows[order] = ends[:-1] - at_bounds[:-1].repeat(per_rank)
        return cls(order, bounds, rows, np.diff(at_bounds))

    def entries(self, rank: int) -> IntArray:
        """The entries of one rank's chunks, ascending."""
        return self.order[self.bounds[rank] : self.bounds[rank + 1]]

    def begins(self) -> IntArray:
        """Where the entries of each rank begin in ``order``, of ranks that have some."""
        return self.bounds[:-1][self.bounds[1:] > self.bounds[:-1]]

    def sums(self, values: IntArray) -> IntArray:
        """``[cp_size]`` the sum over each rank's chunks of ``values [c]``, exact to 63 bits."""
        ends = np.zeros(len(values) + 1, dtype=np.int64)
        values.take(self.order).cumsum(out=ends[1:])
        at_bounds = ends[self.bounds]
        # Worked out of every batch several times, where np.diff takes as long as all else.
        sums: IntArray = at_bounds[1:] - at_bounds[:-1]
        return sums


def tokens_by_rank(chunks: Chunks, num_requests: int, cp_size: int) -> IntArray:
    """``[num_requests, cp_size]`` the tokens of each request that each rank owns."""
    share = chunks.request * cp_size + chunks.rank
    # Sums in float64 are exact: they are at most 2**31.
    tokens = np.bincount(share, chunks.length, minlength=num_requests * cp_size)
    return tokens.astype(np.int64).reshape(num_requests, cp_size)


def joined(chunks: Chunks) -> Chunks:
    """With neighbours of one rank as one chunk: of zigzag, the two in the middle of a request."""
    request, _, length, rank = chunks
    begins = np.ones(len(request), dtype=bool)
    begins[1:] = (request[1:] != request[:-1]) | (rank[1:] != rank[:-1])
    firsts = begins.nonzero()[0]
    return Chunks._make(column[firsts] for column in chunks)._replace(length=np.add.reduceat(length, firsts))


def pairs_of(chunks: Chunks, prefix_lens: IntArray) -> IntArray:
    """``[c]`` the query-key pairs of each chunk: a query at absolute position p sees p + 1 keys."""
    request, start, length, _ = chunks
    pairs: IntArray = length * (prefix_lens[request] + start + 1) + length * (length - 1) // 2
    return pairs


def pairs_by_rank(chunks: Chunks, batch: IntArray, cp_size: int) -> list[int]:
    """The query-key pairs of each rank."""
    pairs = np.zeros(cp_size, dtype=np.int64)
    np.add.at(pairs, chunks.rank, pairs_of(chunks, batch[:, 0]))
    of_ranks: list[int] = pairs.tolist()
    return of_ranks


def steps_off(rank_pairs: Sequence[int]) -> int:
    """How far pairs are off the mean, at most, in steps of 2% that are full."""
    total = sum(rank_pairs)
    return max((50 * abs(pairs * len(rank_pairs) - total) // total for pairs in rank_pairs), default=0) if total else 0


def most_of_a_share(chunks: Chunks, cp_size: int) -> int:
    """The most chunks of one request that one rank owns; 1 if there are none."""
    _, counts = np.unique(chunks.request * cp_size + chunks.rank, return_counts=True)
    return int(counts.max(initial=1))
