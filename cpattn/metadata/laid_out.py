"""What partition ``auto`` looks at of a layout: chunks by rank, and what each rank's queries see of others' keys.

Of zigzag it is worked out in closed form, as most such plans are not taken: they are seldom made for it.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import View, lacking_rows, received_rows
from cpattn.metadata.own_keys import beside_cached, rows_put
from cpattn.metadata.partition import chunk_lengths, zigzag_owners


class RankChunks(NamedTuple):
    """Chunks that hold a token, sorted by rank.

    Attributes:
        length ``[c]``: their tokens; before: keys of their request before their own ones, the cached ones included.
        bounds ``[cp_size + 1]``: rank r has those from ``bounds[r]`` to ``bounds[r + 1] - 1``.
    """

    length: IntArray
    before: IntArray
    bounds: IntArray


class LaidOut:
    """A plan.

    Attributes:
        plan: it.
    """

    def __init__(self, plan: Layout) -> None:
        self.plan = plan

    @property
    def most_tokens(self) -> int:
        """Of the rank that has the most."""
        return max(self.plan.rank_tokens)

    @property
    def rows(self) -> int:
        """Physical ones, of every rank."""
        return self.plan.rows

    @cached_property
    def chunks(self) -> RankChunks:
        """Of all ranks."""
        request, start, length, _ = self.plan.chunk_table
        order, bounds = self.plan.by_rank.order, self.plan.by_rank.bounds
        return RankChunks(length.take(order), (self.plan.prefix_lens[request] + start).take(order), bounds)

    @cached_property
    def view(self) -> View:
        """Rows that each rank's queries have in view."""
        return View.of(self.plan)

    @cached_property
    def put(self) -> int:
        """Rows of the rank that puts the most of its own in order, where it reads all others as they lie."""
        return int(rows_put(self.plan).max())

    def received(self, window: int | None, by_peers: bool) -> int:
        """Rows that the busiest rank receives: those that it lacks, where each reads them of its peers; and else nearly all of all
        ranks, or as many as one receives or sends."""
        plan = self.plan
        if len(plan.chunk_table.length) == np.count_nonzero(plan.extend_lens):
            # Nothing is cut.
            return 0
        if by_peers:
            return int(received_rows(plan, window).max())
        lacking, everything = lacking_rows(plan, window), (plan.cp_size - 1) * plan.rows
        return everything if lacking.is_nearly_all(everything) else lacking.most


class Zigzag(LaidOut):
    """The same of what zigzag would make of a plan's batch, without a window, over no sharded cache, by ranks that read of their peers."""

    @property
    def most_tokens(self) -> int:
        """As even as can be."""
        return -(-self.plan.num_tokens // self.plan.cp_size)

    @property
    def rows(self) -> int:
        """Of as many tokens."""
        return -(-self.most_tokens // self.plan.pad_to) * self.plan.pad_to

    @cached_property
    def _halves(self) -> tuple[IntArray, IntArray]:
        """``[cp_size, 2, n]`` each rank's front and back chunk of each request: lengths, and where they start."""
        size, extends = self.plan.cp_size, self.plan.extend_lens
        lengths = chunk_lengths(extends, zigzag_owners(size), size, "balanced")
        starts = lengths.cumsum(axis=1) - lengths
        columns = _columns(size)
        return lengths.T[columns], starts.T[columns]

    @cached_property
    def chunks(self) -> RankChunks:
        """Of all ranks."""
        lengths, starts = self._halves
        length, before = lengths.ravel(), (starts + self.plan.prefix_lens).ravel()
        per_rank = lengths[0].size
        held = length > 0
        if held.all():
            return RankChunks(length, before, per_rank * np.arange(len(lengths) + 1))
        counts = held.reshape(len(lengths), per_rank).sum(axis=1)
        return RankChunks(length[held], before[held], np.append(0, counts.cumsum()))

    @cached_property
    def view(self) -> View:
        """Up to the last chunk of each rank."""
        (front, back), (at_front, at_back) = (column.swapaxes(0, 1) for column in self._halves)
        seen = np.where(back > 0, at_back + back, (at_front + front) * (front > 0))
        return View((self.plan.prefix_lens * (seen > 0)).sum(axis=1), seen.sum(axis=1))

    @cached_property
    def put(self) -> int:
        """All but those of requests of so few tokens that one rank has them."""
        tokens = self._halves[0].sum(axis=1)
        is_whole = tokens == self.plan.extend_lens
        return int(np.where(is_whole, np.minimum(tokens, beside_cached(self.plan)), tokens).sum(axis=1).max())

    def received(self, window: int | None, by_peers: bool) -> int:
        """All before a rank's last chunk, but for its first one."""
        (front, back), (at_front, at_back) = (column.swapaxes(0, 1) for column in self._halves)
        lacks = np.where(back > 0, at_back - front, at_front * (front > 0))
        return int(lacks.sum(axis=1).max())


@lru_cache(maxsize=8)
def _columns(cp_size: int) -> IntArray:
    """``[cp_size, 2]`` each rank's chunks of zigzag."""
    ranks = np.arange(cp_size)
    return np.stack([ranks, 2 * cp_size - 1 - ranks], axis=1)
