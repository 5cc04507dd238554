"""The order in which an all-gather puts keys: each request's in one piece, cached ones before new ones, as far as they are put at all."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from cpattn.device_tables import DeviceTables, IntArray, exclusive_cumsum, expand_runs_on_host
from cpattn.keys import PREFIX_UNIT
from cpattn.metadata.cp_metadata import CPMetadata


class KeyOrder(NamedTuple):
    """Where keys go.

    Attributes:
        rows: all there are.
        k_starts: ``[num_requests]`` of each request where its first key is, or would be: key ``s`` is in row ``k_starts + s``.
        new_rows: int32 ``[num_tokens]`` on the device, the row of each new token; None where they are in their own order.
        prefix_rows: int32 ``[num_prefix_tokens]`` on the device, the row of each cached token, -1 for those that are not put; None
            where none is.
        prefix_places: of those that stay where they are; see :class:`cpattn.keys.PrefixKeys`.
    """

    rows: int
    k_starts: IntArray
    new_rows: Tensor | None
    prefix_rows: Tensor | None
    prefix_places: Tensor | None


def key_order(meta: CPMetadata, packed: bool, in_place: bool) -> KeyOrder:
    """Of a batch.

    Args:
        packed: whether there is a packed cache.
        in_place: whether cached keys are read where they lie, all but the last of each request that share a block with new ones.
    """
    plan = meta.plan
    if not packed:
        return KeyOrder(meta.restore_index.shape[0], meta.k_starts, None, None, None)
    if not in_place or not plan.num_prefix_tokens:
        prefix_rows = meta.prefix_key_rows if plan.num_prefix_tokens else None
        return KeyOrder(plan.num_tokens + plan.num_prefix_tokens, meta.k_starts, meta.extend_key_rows, prefix_rows, None)
    order: KeyOrder = meta.derive("key order in place", lambda: _in_place(meta))
    return order


def _in_place(meta: CPMetadata) -> KeyOrder:
    plan = meta.plan
    prefixes, extends = plan.prefix_lens, plan.extend_lens
    put = prefixes % PREFIX_UNIT
    stay = prefixes - put
    begins, cached = exclusive_cumsum(put + extends), exclusive_cumsum(prefixes)
    prefix_rows = np.full(plan.num_prefix_tokens if put.any() else 0, -1, dtype=np.int64)
    if put.any():
        prefix_rows[runs(cached + stay, put)] = runs(begins, put)
    places = np.stack([stay, cached], axis=1).reshape(-1)
    tables = DeviceTables({"new": runs(begins + put, extends), "prefix": prefix_rows, "places": places}, meta.device)
    return KeyOrder(int((put + extends).sum()), begins - stay, tables["new"], tables["prefix"] if put.any() else None, tables["places"])


def runs(first: IntArray, lengths: IntArray, capacity: int = 0) -> IntArray:
    """One run after another, and then -1.

    >>> runs(np.array([7, 0]), np.array([2, 1]), 4)
    array([ 7,  8,  0, -1], dtype=int32)
    """
    total = int(lengths.sum())
    found: IntArray = expand_runs_on_host(first, lengths, total).numpy()
    return found if total >= capacity else np.pad(found, (0, capacity - total), constant_values=-1)
