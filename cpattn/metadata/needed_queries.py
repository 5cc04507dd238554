"""Which of each rank's queries see a key of another rank's shard: its part of a sharded cache, where there is one, and its new tokens."""

from __future__ import annotations

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout

# What is worked out for each rank and chunk, and for each two ranks, may become so much.
_MOST_PAIRS = 2**22


def queries_that_see(plan: Layout, window: int | None, owner: int) -> IntArray:
    """``[c]`` of each chunk how many of its queries see a key of the owner's, other than itself: they are its first ones.

    >>> import cpattn
    >>> queries_that_see(cpattn.plan([(0, 8)], cp_size=2), None, 1)  # chunks of 2 tokens, of ranks 0, 1, 1, 0
    array([0, 0, 0, 2])
    """
    request, start, length, rank = plan.chunk_table
    is_owners = rank == owner
    # The owner's last chunk up to each, if it is one of the same request.
    last = np.maximum.accumulate(np.where(is_owners, np.arange(len(rank)), -1))
    sees = last >= request.searchsorted(request)
    many = np.where(sees, length, 0)
    if window is not None:
        reach = (start + length)[last] + window - 1 - start
        many = np.where(sees, np.clip(reach, 0, length), 0)
    if plan.sharded:
        many = np.where(plan.shard_lens[request, owner] > 0, length, many)
    return np.where(is_owners, 0, many)


def needed_queries(plan: Layout, window: int | None) -> IntArray | None:
    """int64 ``[source, owner]``: how many queries of the one see keys of the other, 0 for itself. None for so many ranks and chunks that
    the tables would be too large."""
    key = "needed queries", window
    found: IntArray | None = plan.memo.get(key)
    if found is not None:
        return found
    if plan.cp_size * (plan.cp_size + len(plan.chunk_table.rank)) > _MOST_PAIRS:
        return None
    made = np.stack([plan.by_rank.sums(queries_that_see(plan, window, owner)) for owner in range(plan.cp_size)], axis=1)
    plan.memo.keep(key, made)
    return made
