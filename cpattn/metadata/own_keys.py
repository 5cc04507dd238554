"""Which new keys a rank can read in its own rows, as they lie: those of requests that no other rank has a part of. Nobody else sees them,
and there they follow each other. All others are put in order, and so is what shares a block with cached keys.
"""

from __future__ import annotations

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.keys import NOT_HERE, PREFIX_UNIT
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import Pieces


def only_owners(plan: Layout) -> IntArray:
    """``[num_requests]`` the rank that has all new tokens of a request; -1 where several have some, or there is none. Worked out once.

    >>> import cpattn
    >>> only_owners(cpattn.plan([(0, 8), (9, 0), (0, 1)], cp_size=2))
    array([-1, -1,  0])
    """
    found: IntArray | None = plan.memo.get("only owners")
    return plan.memo.keep("only owners", _only_owners(plan)) if found is None else found


def _only_owners(plan: Layout) -> IntArray:
    request, _, length, rank = plan.chunk_table
    holds = length > 0
    request, rank = request[holds], rank[holds]
    owner = np.full(len(plan.batch), -1, dtype=np.int64)
    owner[request] = rank
    owner[request[owner[request] != rank]] = -1
    return owner


def own_begins(plan: Layout, cp_rank: int) -> IntArray:
    """``[num_requests]`` from which key of each request on a rank reads its own rows; :data:`cpattn.keys.NOT_HERE` where it does not."""
    return np.where(only_owners(plan) == cp_rank, -(-plan.prefix_lens // PREFIX_UNIT) * PREFIX_UNIT, NOT_HERE)


def tokens_before(plan: Layout, pieces: Pieces, begins: IntArray) -> IntArray:
    """``[p]`` how many tokens of each piece come before the keys that are read in own rows: all of it, or its first ones."""
    request = plan.chunk_table.request[pieces.entry]
    first_key = (plan.prefix_lens + plan.extend_lens - plan.extend_lens.cumsum())[request] + pieces.token
    many: IntArray = np.clip(begins[request] - first_key, 0, pieces.length)
    return many


def rows_put(plan: Layout) -> IntArray:
    """``[cp_size]`` how many of its own rows each rank puts in order where it reads all others as they lie; worked out once.

    >>> import cpattn
    >>> rows_put(cpattn.plan([(0, 8), (0, 500), (120, 500)], cp_size=2, partition="uncut"))
    array([8, 0])
    """
    found: IntArray | None = plan.memo.get("rows put")
    return plan.memo.keep("rows put", _rows_put(plan)) if found is None else found


def _rows_put(plan: Layout) -> IntArray:
    owner = only_owners(plan)
    request, _, length, rank = plan.chunk_table
    is_cut, is_whole = owner[request] < 0, owner >= 0
    beside = np.minimum(plan.extend_lens, beside_cached(plan))
    # Sums in float64 are exact: they are at most 2**31.
    of_cut = np.bincount(rank[is_cut], length[is_cut], minlength=plan.cp_size)
    return (of_cut + np.bincount(owner[is_whole], beside[is_whole], minlength=plan.cp_size)).astype(np.int64)


def beside_cached(plan: Layout) -> IntArray:
    """``[num_requests]`` how many keys behind the cached ones share a block with some of those."""
    return -plan.prefix_lens % PREFIX_UNIT
