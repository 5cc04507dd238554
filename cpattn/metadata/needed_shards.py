"""How many rows of each rank's shard every other rank needs: its part of a sharded cache, where there is one, and its new tokens."""

from __future__ import annotations

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import Lacking, Pieces, lacking_rows

# What is worked out for each two ranks, and for each two chunks of which one is seen from the other, may become so much.
_MOST_PAIRS = 2**22


def lacking_shards(plan: Layout, window: int | None) -> Lacking:
    """Like :func:`lacking_rows`, with the cached tokens of requests of which a rank has a query."""
    received, sent = lacking_rows(plan, window)
    if not plan.sharded:
        return Lacking(received, sent)
    has_queries = plan.rank_extends > 0
    viewers = has_queries.sum(axis=1)
    held_by_others = plan.prefix_lens[:, None] - plan.shard_lens
    return Lacking(
        received + (held_by_others * has_queries).sum(axis=0), sent + (plan.shard_lens * (viewers[:, None] - has_queries)).sum(axis=0)
    )


def needed_shards(plan: Layout, window: int | None) -> IntArray | None:
    """int64 ``[owner, viewer]``, 0 for itself; None for so many ranks and chunks that the table would be too large.

    >>> import cpattn
    >>> needed_shards(cpattn.plan([(0, 8)], cp_size=2), None)  # chunks of 2 tokens, of ranks 0, 1, 1, 0
    array([[0, 2],
           [4, 0]])
    """
    key = "needed shards", window
    found: IntArray | None = plan.memo.get(key)
    if found is not None:
        return found
    if plan.cp_size**2 + Pieces.how_many(plan, window) > _MOST_PAIRS:
        return None
    pieces, rank = Pieces.of(plan, window), plan.chunk_table.rank
    share = rank[pieces.entry] * plan.cp_size + rank[pieces.seen_by]
    # Sums in float64 are exact: they are at most 2**31.
    rows = np.bincount(share, pieces.length, minlength=plan.cp_size**2).astype(np.int64).reshape(plan.cp_size, plan.cp_size)
    if plan.sharded:
        rows += plan.shard_lens.T @ (plan.rank_extends > 0)
    np.fill_diagonal(rows, 0)
    plan.memo.keep(key, rows)
    return rows
