"""Which rank's cache holds a token after the step, where caches are sharded: what pictures show."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout

Holder: TypeAlias = Callable[[int, int], "int | None"]


def holder_of(plan: Layout, request: int) -> Holder:
    """Of a sharded cache, a function from ``begin, end`` to the rank that holds these tokens of a request; None where several do.

    Of ``prefix_shards`` only counts are known: the tokens of a prefix then stand by rank, those of rank 0 first.

    >>> import cpattn
    >>> holder = holder_of(cpattn.plan([(4, 4)], cp_size=2, owner=cpattn.Striped(2)), 0)
    >>> holder(0, 2), holder(2, 4), holder(4, 5), holder(1, 3)
    (0, 1, 0, None)
    """
    if plan.owner is not None:
        interleave, cp_size = plan.owner.interleave, plan.cp_size

        def by_rule(begin: int, end: int) -> int | None:
            stripe = begin // interleave
            return stripe % cp_size if cp_size == 1 or (end - 1) // interleave == stripe else None

        return by_rule
    ends, ranks = _runs(plan, request)

    def by_runs(begin: int, end: int) -> int | None:
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        held = ranks[first : last + 1]
        return int(held[0]) if (held == held[0]).all() else None

    return by_runs


def _runs(plan: Layout, request: int) -> tuple[IntArray, IntArray]:
    """Where runs of tokens end, and the rank that holds each: those of the prefix, then the chunks, which stay where they are computed."""
    if plan.prefix_ranks is not None:
        ranks = np.asarray(plan.prefix_ranks.ranks[request], dtype=np.int64)
        lengths = np.ones_like(ranks)
    else:
        # Without empty runs, which would stand between two of one rank.
        ranks = plan.shard_lens[request].nonzero()[0]
        lengths = plan.shard_lens[request][ranks]
    owners, _, chunk_lengths, chunk_ranks = plan.chunk_table
    own = slice(*np.searchsorted(owners, [request, request + 1]))
    return np.concatenate([lengths, chunk_lengths[own]]).cumsum(), np.concatenate([ranks, chunk_ranks[own]])
