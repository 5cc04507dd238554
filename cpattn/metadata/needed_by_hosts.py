"""Which new keys cross to a host whose ranks' queries see them, each once, and who passes them on there: from the plan alone.

Ranks that follow each other are on one host. A row crosses from its owner to the rank that has the owner's place on the other host, and
from there to those ranks of that host whose queries see it. Within its owner's host it comes straight from there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.callers_partition import CallersPartition
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import Pieces

# Of all chunks that are seen from others, above which nobody works out what each rank sends.
_MOST_PIECES = 2**22


class Crossing(NamedTuple):
    """Rows that each rank sends, int64 ``[cp_size]``: to other hosts, and within its own; and how many it receives of each."""

    sent_across: IntArray
    sent_within: IntArray
    received_across: IntArray
    received_within: IntArray


def crossing_rows(plan: Layout, window: int | None, within: int) -> Crossing | None:
    """Worked out once; None for so many ranks and chunks that it would take too long.

    >>> import cpattn
    >>> plan = cpattn.plan([(0, 8)], cp_size=4, partition="contiguous")
    >>> crossing_rows(plan, None, within=2)  # the later host sees all of the earlier one, each row of which crosses once
    Crossing(sent_across=array([2, 2, 0, 0]), sent_within=array([2, 0, 4, 2]), received_across=array([0, 0, 2, 2]), \
received_within=array([0, 2, 2, 4]))
    """
    key = "crossing rows", window, within
    found: Crossing | None = plan.memo.get(key)
    if found is None and Pieces.how_many(plan, window) <= _MOST_PIECES:
        found = plan.memo.keep(key, _crossing_rows(plan, window, within))
    return found


def _crossing_rows(plan: Layout, window: int | None, within: int) -> Crossing:
    rank, size = plan.chunk_table.rank, plan.cp_size
    seen = seen_by_hosts(plan, window, within)
    owner, host = rank[seen.entry], rank[seen.seen_by] // within
    there = host * within + owner % within
    crosses = host != owner // within
    across = Pieces.of(plan, window)
    viewer = rank[across.seen_by]
    provider = providers(plan, across, within)
    passes = provider != viewer

    def sums(ranks: IntArray, lengths: IntArray) -> IntArray:
        # Sums in float64 are exact: they are at most 2**31.
        return np.bincount(ranks, lengths, minlength=size).astype(np.int64)

    return Crossing(
        sums(owner[crosses], seen.length[crosses]),
        sums(provider[passes], across.length[passes]),
        sums(there[crosses], seen.length[crosses]),
        sums(viewer[passes], across.length[passes]),
    )


def seen_by_hosts(plan: Layout, window: int | None, within: int) -> Pieces:
    """What the queries of each host's ranks see, as if those were one rank; entries are those of the plan's own chunks."""
    table = plan.chunk_table
    key = "hosts", within
    hosts: Layout | None = plan.memo.get(key)
    if hosts is None:
        partition = CallersPartition(f"{plan.kind} of hosts", table._replace(rank=table.rank // within))
        hosts = plan.memo.keep(key, Layout(plan.batch, plan.cp_size // within, partition))
    return Pieces.of(hosts, window)


def providers(plan: Layout, pieces: Pieces, within: int) -> IntArray:
    """Of pieces that ranks see, from which rank of its own host each gets it."""
    rank = plan.chunk_table.rank
    found: IntArray = rank[pieces.seen_by] // within * within + rank[pieces.entry] % within
    return found
