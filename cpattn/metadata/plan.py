"""The plan: the layout of a whole batch over all ranks, the same object on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpattn.errors import PlanError, RankError, shown
from cpattn.graphs import leaves_graph
from cpattn.metadata.batch import MAX_TOKENS, IntArray, Request, is_integer, parse_batch, parse_prefix_shards
from cpattn.metadata.bucket import Bucket
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.devices import parse_device
from cpattn.metadata.draw import draw_plan, summarize_plan
from cpattn.metadata.partition import PARTITIONS, REMAINDERS, chunk_lengths, first_dealt


class Chunk(NamedTuple):
    """A contiguous run of one request's extend tokens that one rank owns: tokens start .. start + length - 1 of them."""

    request: int
    start: int
    length: int
    rank: int


_LIMITS = {
    "cp_size": (2**16, "a plan has tables of all ranks; cp_size is the size of the context-parallel group"),
    "pad_to": (MAX_TOKENS, "row numbers are int32"),
}
# Of requests times ranks: int64 tables of up to 2 GiB, of which a plan has several.
_MOST_SHARES = 2**27


@dataclass(frozen=True)
class Plan:
    """The layout of a batch over ``cp_size`` ranks. Frozen, hashable, and the same on every rank.

    Made by :func:`plan`, which explains the arguments. All else is worked out from them when first asked for.
    """

    batch: tuple[Request, ...]
    cp_size: int
    partition: str = "zigzag"
    remainder: str = "balanced"
    pad_to: int = 1
    prefix_shards: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        pairs = parse_batch(self.batch)
        for name in ("cp_size", "pad_to"):
            value: Any = getattr(self, name)
            if not _is_size(name, value):
                limit, why = _LIMITS[name]
                if is_integer(value) and value > limit:
                    raise PlanError(f"{name}={shown(value)}; the limit is {limit} ({why})")
                raise PlanError(f"{name}={shown(value)}; it must be an integer of at least 1")
            object.__setattr__(self, name, int(value))
        if len(pairs) * self.cp_size > _MOST_SHARES:
            raise PlanError(
                f"{len(pairs)} requests over cp_size={self.cp_size} ranks are {len(pairs) * self.cp_size} shares; the limit is "
                f"{_MOST_SHARES} (a plan has tables of them); split the batch"
            )
        for name, known in (("partition", tuple(PARTITIONS)), ("remainder", REMAINDERS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise PlanError(f"{name}={shown(value)} is unknown; choose one of {', '.join(map(repr, known))}")
            # The plain str that it equals: a subclass may print itself otherwise, and the fingerprint is made of text.
            object.__setattr__(self, name, known[known.index(value)])
        object.__setattr__(self, "batch", tuple(map(Request._make, pairs.tolist())))
        # Seeds the cached property, which would make the same array from the tuple again.
        self.__dict__["_pairs"] = _frozen(pairs)
        if self.prefix_shards is not None:
            shards = parse_prefix_shards(self.prefix_shards, pairs[:, 0], self.cp_size)
            object.__setattr__(self, "prefix_shards", tuple(map(tuple, shards.tolist())))
            self.__dict__["shard_lens"] = _frozen(shards)
        if self.cp_size * self.rows > MAX_TOKENS:
            raise PlanError(
                f"{self.cp_size} ranks of {self.rows} rows are {self.cp_size * self.rows} rows; the limit is {MAX_TOKENS} "
                "(row numbers are int32); split the batch or lower pad_to"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as its arguments: of the arrays in it the copies could be written to."""
        return Plan, (self.batch, self.cp_size, self.partition, self.remainder, self.pad_to, self.prefix_shards)

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.batch)} requests, {self.num_tokens} tokens, cp_size={self.cp_size}, "
            f"partition={self.partition!r}, remainder={self.remainder!r}, pad_to={self.pad_to}, rows={self.rows}"
            f"{', sharded prefixes' if self.sharded else ''})"
        )

    # What a reader asks of a plan.

    @cached_property
    def num_tokens(self) -> int:
        """New tokens in the batch, over all requests and ranks."""
        return int(self.extend_lens.sum())

    @cached_property
    def num_prefix_tokens(self) -> int:
        """Tokens of the batch that lie in the KV cache already."""
        return int(self.prefix_lens.sum())

    @cached_property
    def rank_tokens(self) -> tuple[int, ...]:
        """The tokens (logical rows) of each rank."""
        per_rank = np.zeros(self.cp_size, dtype=np.int64)
        np.add.at(per_rank, self.chunk_rank, self.lengths.sum(axis=0))
        return tuple(per_rank.tolist())

    @cached_property
    def rows(self) -> int:
        """Physical rows: the tokens of the fullest rank, rounded up to a multiple of ``pad_to``. The same on every rank."""
        return -(-max(self.rank_tokens) // self.pad_to) * self.pad_to

    @cached_property
    def rank_chunks(self) -> tuple[int, ...]:
        """The chunks with a token on each rank."""
        per_rank = np.zeros(self.cp_size, dtype=np.int64)
        np.add.at(per_rank, self.chunk_rank, (self.lengths > 0).sum(axis=0))
        return tuple(per_rank.tolist())

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the prefixes only (``prefix_shards``), rather than all of them."""
        return self.prefix_shards is not None

    def fits(self, bucket: Bucket) -> bool:
        """Whether the metadata of every rank fit into a bucket; the answer is the same on every rank.

        >>> import cpattn
        >>> cpattn.plan([(0, 10)], cp_size=2).fits(cpattn.Bucket(max_requests=4, max_rows=8, max_chunks=8))
        True
        """
        _check_bucket(bucket)
        return bucket.why_not(self) is None

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks that hold a token, in the order of the batch and, within a request, of the sequence."""
        request, column = np.nonzero(self.lengths)
        table = (request, self.starts[request, column], self.lengths[request, column], self.chunk_rank[column])
        return tuple(map(Chunk._make, np.stack(table, axis=1).tolist()))

    @cached_property
    def rank_pairs(self) -> tuple[int, ...]:
        """The query-key pairs that each rank computes: a query at absolute position p sees p + 1 keys."""
        first_seen = self.prefix_lens[:, None] + self.starts + 1
        pairs = self.lengths * first_seen + self.lengths * (self.lengths - 1) // 2
        per_rank = np.zeros(self.cp_size, dtype=np.int64)
        np.add.at(per_rank, self.chunk_rank, pairs.sum(axis=0))
        return tuple(per_rank.tolist())

    @property
    def token_imbalance(self) -> float:
        """Tokens of the fullest rank over the mean; 1.0 is perfect, and what an empty batch has."""
        return _max_over_mean(self.rank_tokens)

    @property
    def pair_imbalance(self) -> float:
        """Query-key pairs of the busiest rank over the mean; 1.0 is perfect, and what an empty batch has."""
        return _max_over_mean(self.rank_pairs)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits, the same on every machine; equal exactly when the plans are equal (BLAKE2b, 128 bits)."""
        digest = hashlib.blake2b(digest_size=16)
        # A change to the rules of the layout must change this number: ranks of two versions then find out.
        digest.update(b"layout 2")
        digest.update(repr((self.cp_size, self.partition, self.remainder, self.pad_to, self.sharded)).encode())
        digest.update(self._pairs.astype("<i8").tobytes())
        if self.sharded:
            digest.update(self.shard_lens.astype("<i8").tobytes())
        return digest.hexdigest()

    @leaves_graph
    def metadata(self, cp_rank: int, device: torch.device | str = "cpu", bucket: Bucket | None = None) -> CPMetadata:
        """One rank's view of this plan, as tensors on ``device``, brought there in one copy.

        With a ``bucket`` the tensors have the bucket's sizes, whatever the batch, and :meth:`CPMetadata.copy_` can put
        another batch in their place. Raises RankError for a rank outside 0 .. cp_size - 1, PlanError for a plan that
        does not fit the bucket.
        """
        given: Any = cp_rank
        if not is_integer(given) or not 0 <= given < self.cp_size:
            raise RankError(
                f"cp_rank={shown(cp_rank)}; it must be an integer from 0 to {self.cp_size - 1} (the plan's cp_size is {self.cp_size})"
            )
        if bucket is not None:
            _check_bucket(bucket)
            bucket.check(self)
        return CPMetadata(self, int(cp_rank), parse_device(device), bucket)

    @leaves_graph
    def summary(self) -> str:
        """A table to read: for each rank its tokens, padding and query-key pairs; then the imbalance."""
        return summarize_plan(self)

    @leaves_graph
    def draw(self, width: int = 60) -> str:
        """A text picture: one line a request, one mark for each token (for several where it is long), naming its rank."""
        return draw_plan(self, width)

    # What the layers above build their tables from: small numpy arrays, never written to after they are made.

    @cached_property
    def _pairs(self) -> IntArray:
        return _frozen(np.array(self.batch, dtype=np.int64).reshape(-1, 2))

    @property
    def prefix_lens(self) -> IntArray:
        """``[num_requests]`` int64."""
        return self._pairs[:, 0]

    @property
    def extend_lens(self) -> IntArray:
        """``[num_requests]`` int64."""
        return self._pairs[:, 1]

    @property
    def total_lens(self) -> IntArray:
        """``[num_requests]`` int64: prefix and extend together."""
        total: IntArray = self._pairs.sum(axis=1)
        return total

    @cached_property
    def shard_lens(self) -> IntArray:
        """``[num_requests, cp_size]`` the prefix tokens of each request that each rank holds; 0 where prefixes are not sharded."""
        return _frozen(np.zeros((len(self.batch), self.cp_size), dtype=np.int64))

    @cached_property
    def rank_extends(self) -> IntArray:
        """``[num_requests, cp_size]`` the new tokens of each request that each rank owns."""
        return _frozen(self.lengths[:, self.rank_columns].sum(axis=2))

    @cached_property
    def shard_totals(self) -> IntArray:
        """``[cp_size]`` the tokens that each rank holds once it has its new ones: its shard of the prefixes and of the extends."""
        return _frozen((self.shard_lens + self.rank_extends).sum(axis=0))

    @property
    def largest_shard(self) -> int:
        """The tokens of the rank that holds the most."""
        return int(self.shard_totals.max())

    @cached_property
    def chunk_rank(self) -> IntArray:
        """``[num_chunks]`` the rank that owns each chunk; the same for every request."""
        return _frozen(PARTITIONS[self.partition](self.cp_size))

    @cached_property
    def lengths(self) -> IntArray:
        """``[num_requests, num_chunks]`` tokens of each chunk, empty ones included."""
        dealer = first_dealt(self.extend_lens, self.shard_lens) if self.sharded else 0
        return _frozen(chunk_lengths(self.extend_lens, self.chunk_rank, self.cp_size, self.remainder, dealer))

    @cached_property
    def starts(self) -> IntArray:
        """``[num_requests, num_chunks]`` where each chunk begins within its request's extend."""
        return _frozen(self.lengths.cumsum(axis=1) - self.lengths)

    @cached_property
    def rank_columns(self) -> IntArray:
        """``[cp_size, chunks per rank]`` the columns of ``lengths`` that each rank owns, in sequence order."""
        return _frozen(np.argsort(self.chunk_rank, kind="stable").reshape(self.cp_size, -1))

    @cached_property
    def local_starts(self) -> IntArray:
        """``[num_requests, num_chunks]`` the row at which each chunk begins on the rank that owns it."""
        num_requests, num_chunks = self.lengths.shape
        columns = self.rank_columns.ravel()
        by_request = (num_requests, self.cp_size, num_chunks // self.cp_size)
        # [rank, request, nth chunk of the rank]: the order in which each rank's rows lie.
        per_rank = self.lengths[:, columns].reshape(by_request).transpose(1, 0, 2)
        flat = per_rank.reshape(self.cp_size, num_requests * by_request[2])
        begins = (flat.cumsum(axis=1) - flat).reshape(per_rank.shape)
        local = np.empty((num_requests, num_chunks), dtype=np.int64)
        local[:, columns] = begins.transpose(1, 0, 2).reshape(num_requests, num_chunks)
        return _frozen(local)


@leaves_graph
def plan(
    batch: Sequence[tuple[int, int]] | Sequence[Request] | npt.NDArray[Any],
    cp_size: int,
    *,
    partition: str = "zigzag",
    remainder: str = "balanced",
    pad_to: int = 1,
    prefix_shards: Sequence[Sequence[int]] | npt.NDArray[Any] | None = None,
) -> Plan:
    """Lays a ragged batch out over ``cp_size`` ranks. Pure and deterministic: call it on every rank alike.

    >>> import cpattn
    >>> p = cpattn.plan([(0, 10), (64, 1), (5, 0)], cp_size=2)
    >>> p.rank_tokens
    (6, 5)
    >>> p.chunks[0]
    Chunk(request=0, start=0, length=3, rank=0)

    Args:
        batch: (prefix_len, extend_len) of each request, in tokens, integers >= 0: how many tokens lie in the KV cache
            already, and how many are new. No requests, requests with nothing new, and requests shorter than
            2 * cp_size are all legal.
        cp_size: number of ranks, at least 1.
        partition: ``"zigzag"`` cuts each request into 2 * cp_size chunks and gives rank r chunks r and
            2 * cp_size - 1 - r, so that causal work is even; ``"contiguous"`` cuts it into cp_size chunks.
        remainder: where the tokens go that a division into equal chunks leaves over. ``"balanced"``: any two ranks
            differ by at most one token over the whole batch. ``"first"``: to the first chunks of each request.
        pad_to: physical rows are a multiple of this.
        prefix_shards: None if every rank holds every prefix. Else, for each request, how many of its prefix tokens each
            rank holds (``cp_size`` integers whose sum is prefix_len): a sharded cache. Left-over new tokens are then dealt so
            that they go to ranks which hold few of their requests.

    Raises:
        BatchError: not integer pairs, or a negative length.
        PlanError: an option out of its range.
    """
    return Plan(batch, cp_size, partition, remainder, pad_to, prefix_shards)  # type: ignore[arg-type]


@leaves_graph
def required_rows(
    batch: Sequence[tuple[int, int]] | Sequence[Request] | npt.NDArray[Any],
    cp_size: int,
    *,
    partition: str = "zigzag",
    remainder: str = "balanced",
    pad_to: int = 1,
) -> int:
    """The physical rows that each rank would have, for an engine that sizes its buffers or picks a bucket.

    With the balanced remainder it is the batch's new tokens divided by ``cp_size``, rounded up, and nothing else is
    worked out. Arguments and errors as in :func:`plan`.

    >>> import cpattn
    >>> cpattn.required_rows([(0, 10), (64, 1)], cp_size=4, pad_to=8)
    8
    """
    sizes = {"cp_size": cp_size, "pad_to": pad_to}
    if remainder == "balanced" and partition in tuple(PARTITIONS) and all(map(_is_size, sizes, sizes.values())):
        pairs = parse_batch(batch)
        # Integers of numpy may be too narrow for what is computed with them.
        ranks, multiple = int(cp_size), int(pad_to)
        rows = -(-int(pairs[:, 1].sum()) // (ranks * multiple)) * multiple
        if ranks * rows <= MAX_TOKENS and ranks * len(pairs) <= _MOST_SHARES:
            return rows
    # The plan does what is left, and says what is wrong.
    return plan(batch, cp_size, partition=partition, remainder=remainder, pad_to=pad_to).rows


@leaves_graph
def build_metadata(
    batch: Sequence[tuple[int, int]] | Sequence[Request] | npt.NDArray[Any],
    cp_size: int,
    cp_rank: int,
    device: torch.device | str = "cpu",
    *,
    partition: str = "zigzag",
    remainder: str = "balanced",
    pad_to: int = 1,
    prefix_shards: Sequence[Sequence[int]] | npt.NDArray[Any] | None = None,
    bucket: Bucket | None = None,
) -> CPMetadata:
    """:func:`plan` and :meth:`Plan.metadata` in one call; the arguments and errors are theirs.

    >>> import cpattn
    >>> cpattn.build_metadata([(0, 8)], cp_size=2, cp_rank=1).position_ids
    tensor([2, 3, 4, 5])
    """
    planned = plan(batch, cp_size, partition=partition, remainder=remainder, pad_to=pad_to, prefix_shards=prefix_shards)
    return planned.metadata(cp_rank, device, bucket)


def _is_size(name: str, value: Any) -> bool:
    return is_integer(value) and bool(1 <= value <= _LIMITS[name][0])


def _check_bucket(bucket: Any) -> None:
    if not isinstance(bucket, Bucket):
        raise PlanError(f"bucket is a {type(bucket).__name__}; pass a cpattn.Bucket(max_requests, max_rows, max_chunks), or None")


def _frozen(table: IntArray) -> IntArray:
    """The same array, which can not be written to any more: a plan does not change."""
    table.setflags(write=False)
    return table


def _max_over_mean(values: tuple[int, ...]) -> float:
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0
