"""Which keys each rank wants of the others over a sharded cache: new ones that its queries see or that it is to hold, and with a window
the cached ones that this reaches. Token by token, as a rule of positions has it; from the plan alone, so that every rank knows it of all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpattn.device_tables import IntArray, exclusive_cumsum, expand_runs_on_host
from cpattn.metadata.chunks import RANK
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import Lacking, lacking_rows
from cpattn.metadata.window_reach import Reach

# What is worked out for each rank and token may become so much: over 8 ranks it takes 6 ms, and so many tokens twice as long in each layer.
_MOST_PAIRS = 2**21


class WantedKeys(NamedTuple):
    """Of each request the cached tokens that a window reaches, and then its new ones; ``[n]`` in all.

    Attributes:
        request, position: of each token.
        source: the rank that brings it: that has it cached, or computes it; holder: whose cache is to have it. uint16.
        row: which of the rows it is that ``source`` brings, its new ones and then its cached ones; int64.
        is_new: whether it is a new one.
        wanted: bool ``[cp_size, n]``: whether a rank wants it of another.
        used: the same with what it brings itself.
    """

    request: IntArray
    position: IntArray
    source: npt.NDArray[np.uint16]
    holder: npt.NDArray[np.uint16]
    row: IntArray
    is_new: npt.NDArray[np.bool_]
    wanted: npt.NDArray[np.bool_]
    used: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, plan: Layout, window: int | None) -> WantedKeys:
        """Worked out once.

        >>> import cpattn
        >>> found = WantedKeys.of(cpattn.plan([(0, 4), (0, 2)], 2, partition="whole", owner=cpattn.Striped()), None)
        >>> found.source.tolist(), found.holder.tolist()
        ([1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1])
        """
        key = "wanted keys", window
        found: WantedKeys | None = plan.memo.get(key)
        return plan.memo.keep(key, cls._of(plan, window, _reached(plan, window))) if found is None else found

    @staticmethod
    def are_too_many(plan: Layout, window: int | None) -> bool:
        """Whether there are so many ranks and tokens that the tables would be too large."""
        return plan.cp_size * int((_reached(plan, window) + plan.extend_lens).sum()) > _MOST_PAIRS

    @classmethod
    def _of(cls, plan: Layout, window: int | None, reached: IntArray) -> WantedKeys:
        size, chunks, lengths = plan.cp_size, plan.chunk_table, reached + plan.extend_lens
        begins, total = exclusive_cumsum(lengths), int(lengths.sum())
        request, token = np.arange(len(lengths)).repeat(lengths), np.arange(total)
        position = token + (plan.prefix_lens - reached - begins).repeat(lengths)
        is_new = position >= plan.prefix_lens.repeat(lengths)
        ranks, computed = np.arange(size, dtype=RANK), chunks.rank_of_tokens
        if plan.owner is not None:
            holder = plan.owner.ranks(position, size).astype(RANK)
        else:
            # Each rank keeps what it computes.
            kept = None if window is None else Reach.of(plan, window).ranks
            holder = computed if kept is None else kept.astype(RANK)
        source, row = holder.copy(), np.empty(total, dtype=np.int64)
        source[is_new] = computed
        row[is_new] = token[: plan.num_tokens] + (plan.chunk_rows - exclusive_cumsum(chunks.length)).repeat(chunks.length)
        for rank in ranks if total > plan.num_tokens else ():
            cached = (~is_new & (source == rank)).nonzero()[0]
            row[cached] = plan.rows + np.arange(len(cached))
        used = _seen(plan, window, reached, begins, total)
        if plan.owner is not None:
            # Else who is to hold a token has computed it, and sees it.
            used |= is_new & (holder == ranks[:, None])
        return cls(request, position, source, holder, row, is_new, used & (source != ranks[:, None]), used)

    def lacking(self) -> Lacking:
        """How many tokens each rank receives and sends."""
        size = len(self.wanted)
        # Bytes are added up several times as fast.
        wanted_by = self.wanted.sum(axis=0, dtype=np.uint8 if size < 256 else np.int64)
        sent = [int(wanted_by[self.source == rank].sum()) for rank in range(size)]
        return Lacking(np.array([np.count_nonzero(wanted) for wanted in self.wanted]), np.array(sent))

    def placed(self, plan: Layout, window: int | None, rank: int) -> IntArray:
        """The tokens that a rank puts in order, in that order: of each request those up to the last that a query sees, and after those
        of all requests what it is only to hold."""
        ends, begins = seen_ends(plan, window, rank), exclusive_cumsum(_reached(plan, window) + plan.extend_lens)
        seen = expand_runs_on_host(begins, ends, int(ends.sum()))
        others = self.used[rank].copy()
        others[seen] = False
        return np.append(seen, others.nonzero()[0])

    def to_hold(self, plan: Layout, rank: int) -> tuple[IntArray, IntArray]:
        """Of each token its request, and its number among those of the request that a rank holds; -1 of those that it is not to hold."""
        held = (self.is_new & (self.holder == rank)).nonzero()[0]
        request, number = np.full((2, len(self.request)), -1, dtype=np.int64)
        request[held] = self.request[held]
        if plan.owner is not None:
            number[held] = plan.owner.numbers(self.position[held], plan.cp_size)
        else:
            # After what it held before.
            first = plan.shard_lens[:, rank] - exclusive_cumsum(plan.rank_extends[:, rank])
            number[held] = np.arange(len(held)) + first[request[held]]
        return request, number

    def sent_to(self, source: int, rank: int) -> IntArray:
        """Of one rank by another, in order; those of themselves are none."""
        tokens: IntArray = (self.wanted[rank] & (self.source == source)).nonzero()[0]
        return tokens


def seen_by_chunks(plan: Layout, window: int | None) -> Lacking:
    """What ranks lack at least: new tokens that their queries see, and by a rule of positions cached ones. In little time."""
    received, sent = lacking_rows(plan, window)
    if window is None or plan.owner is None:
        return Lacking(received, sent)
    request, start, _, rank = plan.chunk_table
    first = np.clip(plan.prefix_lens[request] + start - window + 1, 0, plan.prefix_lens[request])
    by_source = plan.shard_lens[request] - plan.owner.held(first, plan.cp_size)
    # Of each rank's chunks of a request the first one sees all cached tokens that the others see.
    before, here = plan.by_rank.order[:-1], plan.by_rank.order[1:]
    by_source[here[(rank[here] == rank[before]) & (request[here] == request[before])]] = 0
    by_source[np.arange(len(rank)), rank] = 0
    return Lacking(received + plan.by_rank.sums(by_source.sum(axis=1)), sent + by_source.sum(axis=0))


def seen_ends(plan: Layout, window: int | None, rank: int) -> IntArray:
    """``[num_requests]`` after how many of its tokens, of those that a window reaches and new ones, the last query of a rank is."""
    entries = plan.by_rank.entries(rank)
    request, start, length, _ = (column[entries] for column in plan.chunk_table)
    ends = np.zeros_like(plan.extend_lens)
    np.maximum.at(ends, request, _reached(plan, window)[request] + start + length)
    return ends


def _reached(plan: Layout, window: int | None) -> IntArray:
    return np.zeros_like(plan.extend_lens) if window is None else Reach.of(plan, window).lengths


def _seen(plan: Layout, window: int | None, reached: IntArray, begins: IntArray, total: int) -> npt.NDArray[np.bool_]:
    """``[cp_size, total]`` whether a query of a rank sees a token: those of a chunk see one run."""
    request, start, length, rank = plan.chunk_table
    before = reached[request] + start
    first = begins[request] + (0 if window is None else np.maximum(before - window + 1, 0))
    end = begins[request] + before + length
    seen = np.zeros((plan.cp_size, total), dtype=bool)
    # Runs are long, and chunks few beside tokens.
    for viewer, one, other in zip(rank.tolist(), first.tolist(), end.tolist(), strict=True):
        seen[viewer, one:other] = True
    return seen
