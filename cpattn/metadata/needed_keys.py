"""Which new keys a rank's queries see, and which of those it lacks: from the plan alone, so that every rank knows it of all ranks.

Of each request a chunk of queries sees the new tokens before it, or with a window the last of these. Those that lie behind its
rank's previous chunk of the request are its *gap*: all of them are other ranks'. A rank lacks its gaps, and each token once.
Tokens are counted over the new tokens of the batch, request after request, which is the order of the chunk table.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.device_tables import IntArray, exclusive_cumsum
from cpattn.metadata.layout import Layout

# Where a rank receives or sends more than this part of an even gather's rows, all of them are gathered. Over NCCL between four H100 an
# all-to-all of three quarters took 0.84 to 1.01 times the gather of 64 MiB, and one of half 0.53 to 0.60 (nccl_uneven.md); and its
# messages are copied once more than a gather's.
MOST_NEEDED = 2 / 3


class Gaps(NamedTuple):
    """Of each entry of a plan's chunk table the tokens ``first .. end - 1``, which its rank lacks just before it; int64 ``[c]``."""

    first: IntArray
    end: IntArray

    @classmethod
    def of(cls, plan: Layout, window: int | None) -> Gaps:
        """For queries that see ``window`` keys, or all; worked out once."""
        key = "gaps", window
        found: Gaps | None = plan.memo.get(key)
        return plan.memo.keep(key, cls._of(plan, window)) if found is None else found

    @classmethod
    def _of(cls, plan: Layout, window: int | None) -> Gaps:
        request, _, length, rank = plan.chunk_table
        begins, order = exclusive_cumsum(length), plan.by_rank.order
        first = exclusive_cumsum(plan.extend_lens)[request]
        before, here = order[:-1], order[1:]
        follows = (rank[here] == rank[before]) & (request[here] == request[before])
        first[here[follows]] = (begins + length)[before[follows]]
        return cls(first if window is None else np.maximum(first, begins - window + 1), begins)


class Lacking(NamedTuple):
    """How many rows of new keys each rank lacks, and how many it has to send to those who lack them; int64 ``[cp_size]``."""

    received: IntArray
    sent: IntArray

    @property
    def most(self) -> int:
        """Of the rank that receives or sends the most."""
        return int(max(self.received.max(), self.sent.max()))

    def is_nearly_all(self, everything: int) -> bool:
        """Whether it is so much of what all others have that all ranks had better receive everything."""
        return self.most > MOST_NEEDED * everything


def lacking_rows(plan: Layout, window: int | None) -> Lacking:
    """Worked out once, in time that grows with the chunks, not with the ranks times the chunks.

    >>> import cpattn
    >>> lacking_rows(cpattn.plan([(0, 8)], cp_size=2), None)  # chunks of 2 tokens, of ranks 0, 1, 1, 0
    Lacking(received=array([4, 2]), sent=array([2, 4]))
    """
    key = "lacking rows", window
    found: Lacking | None = plan.memo.get(key)
    if found is not None:
        return found
    gaps = Gaps.of(plan, window)
    # Each token is lacked as often as it lies in a gap: by a rank that has its chunk later.
    bounds = np.append(gaps.end, plan.num_tokens)
    lacked_before = _sum_below(np.sort(gaps.first), bounds) - _sum_below(gaps.end, bounds)
    made = Lacking(received_rows(plan, window), plan.by_rank.sums(lacked_before[1:] - lacked_before[:-1]))
    plan.memo.keep(key, made)
    return made


def received_rows(plan: Layout, window: int | None) -> IntArray:
    """``[cp_size]`` how many rows of new keys each rank lacks."""
    gaps = Gaps.of(plan, window)
    return plan.by_rank.sums(gaps.end - gaps.first)


def _sum_below(ascending: IntArray, token: IntArray) -> IntArray:
    """The sum of ``token - value`` over all values below it."""
    sums = np.zeros(len(ascending) + 1, dtype=np.int64)
    ascending.cumsum(out=sums[1:])
    count = ascending.searchsorted(token)
    below: IntArray = token * count - sums[count]
    return below


class Pieces(NamedTuple):
    """Runs of tokens that chunks' queries see, each of one chunk; int64 ``[p]``, in the order of those who see them.

    Attributes:
        seen_by: the entry of the chunk table whose gap it is in, or which it is itself.
        entry: the one that it belongs to.
        token: its first.
        length: how many tokens.
    """

    seen_by: IntArray
    entry: IntArray
    token: IntArray
    length: IntArray

    @classmethod
    def of(cls, plan: Layout, window: int | None, entries: IntArray | None = None) -> Pieces:
        """Of some entries of the chunk table, or of all: of each the chunks in its gap, and itself."""
        gaps, ends = Gaps.of(plan, window), plan.chunk_table.length.cumsum()
        if entries is None:
            entries = np.arange(len(ends))
        lowest = ends.searchsorted(gaps.first[entries], side="right")
        counts = entries - lowest + 1
        seen_by = entries.repeat(counts)
        entry = np.arange(len(seen_by)) + (lowest - exclusive_cumsum(counts)).repeat(counts)
        token = np.maximum(gaps.end[entry], gaps.first[seen_by])
        return cls(seen_by, entry, token, ends[entry] - token)

    @classmethod
    def whole(cls, plan: Layout) -> Pieces:
        """All chunks, whoever sees them."""
        length = plan.chunk_table.length
        entries = np.arange(len(length))
        return cls(entries, entries, exclusive_cumsum(length), length)

    @staticmethod
    def how_many(plan: Layout, window: int | None) -> int:
        """Of all entries."""
        ends = plan.chunk_table.length.cumsum()
        lowest = ends.searchsorted(Gaps.of(plan, window).first, side="right")
        return int((np.arange(1, len(ends) + 1) - lowest).sum())

    def take(self, which: IntArray) -> Pieces:
        """Some of them."""
        return Pieces._make(column[which] for column in self)

    def rows(self, plan: Layout) -> IntArray:
        """The row at which each begins, on the rank that owns it."""
        rows: IntArray = plan.chunk_rows[self.entry] + self.token - exclusive_cumsum(plan.chunk_table.length)[self.entry]
        return rows


def unseen_tokens(plan: Layout, window: int | None, viewer: int) -> IntArray:
    """``[c]`` of each chunk how many tokens no query of a rank sees. They are its first ones."""
    pieces = Pieces.of(plan, window, plan.by_rank.entries(viewer))
    unseen: IntArray = plan.chunk_table.length.copy()
    unseen[pieces.entry] -= pieces.length
    return unseen


class SeenKeys(NamedTuple):
    """What one rank's queries see of the batch, in order: of each of its requests the prefix and the new tokens up to its last
    chunk's last one, without those of other requests. With a window rows that no query sees stand there for their places alone.

    Attributes:
        pieces: the runs of new tokens that are seen, in order; holes: how many rows that nobody sees lie before each.
        prefix_len, new_len: of each request ``[num_requests]``, 0 where the rank has no query.
    """

    pieces: Pieces
    holes: IntArray
    prefix_len: IntArray
    new_len: IntArray

    @classmethod
    def of(cls, plan: Layout, cp_rank: int, window: int | None) -> SeenKeys:
        """Of one rank."""
        pieces = Pieces.of(plan, window, plan.by_rank.entries(cp_rank))
        request = plan.chunk_table.request[pieces.entry]
        begins, ends = exclusive_cumsum(plan.extend_lens), pieces.token + pieces.length
        new_len = np.zeros(len(plan.batch), dtype=np.int64)
        np.maximum.at(new_len, request, ends - begins[request])
        after = begins[request]
        follows = request[1:] == request[:-1]
        after[1:][follows] = ends[:-1][follows]
        return cls(pieces, pieces.token - after, plan.prefix_lens * (new_len > 0), new_len)


class View(NamedTuple):
    """How many rows the queries of each rank have in view; int64 ``[cp_size]``. See :class:`SeenKeys`."""

    prefix: IntArray
    new: IntArray

    @classmethod
    def of(cls, plan: Layout, window: int | None = None) -> View:
        """Of all ranks; worked out once. With a window those that it reaches, without the holes between them."""
        key = "view", window
        found: View | None = plan.memo.get(key)
        if found is None:
            found = plan.memo.keep(key, cls._of(plan) if window is None else cls._through(plan, window))
        return found

    @classmethod
    def _of(cls, plan: Layout) -> View:
        request, start, length, rank = plan.chunk_table
        order = plan.by_rank.order
        before, here = order[:-1], order[1:]
        is_last = np.ones(len(order), dtype=bool)
        is_last[before] = (rank[here] != rank[before]) | (request[here] != request[before])
        return cls(plan.by_rank.sums(plan.prefix_lens[request] * is_last), plan.by_rank.sums((start + length) * is_last))

    @classmethod
    def _through(cls, plan: Layout, window: int) -> View:
        request, start, length, rank = plan.chunk_table
        order = plan.by_rank.order
        before, here = order[:-1], order[1:]
        prefix = plan.prefix_lens[request]
        begin, end = prefix + start, prefix + start + length
        # What its rank's chunk before it does not reach, of the same request.
        first = np.maximum(begin - window + 1, 0)
        follows = (rank[here] == rank[before]) & (request[here] == request[before])
        first[here[follows]] = np.maximum(first[here[follows]], end[before[follows]])
        cached = np.maximum(prefix - first, 0)
        return cls(plan.by_rank.sums(cached), plan.by_rank.sums(end - first - cached))
