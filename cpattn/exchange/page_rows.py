"""Rows of K and V into pages and out of them, as they are stored, and with the scales that tokens have."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.exchange.message import KVFormat
from cpattn.kv_cache import PagedKV
from cpattn.moves.moves import moves_for

Places = tuple[Tensor, Tensor]
"""The request and the number of the token of each row; see :mod:`cpattn.moves.moves`."""


class _Part(NamedTuple):
    """Pages and the rows that go with them: of K and V, or of their scales."""

    k_pages: Tensor
    v_pages: Tensor | None
    k: Tensor
    v: Tensor | None


def write_rows(kv: KVFormat, cache: PagedKV, places: Places, k: Tensor, v: Tensor | None) -> None:
    """:meth:`cpattn.moves.moves.Moves.write_pages` of parts of a message."""
    moves = moves_for(kv.device)
    if not kv.as_bytes:
        moves.write_pages(cache.k_pages, cache.v_pages, cache.page_table, *places, k, v)
        return
    for part in _parts(kv, cache, k, v):
        moves.write_pages(part.k_pages, part.v_pages, cache.page_table, *places, part.k, part.v)


def write_slots(kv: KVFormat, cache: PagedKV, slots: Tensor, k: Tensor, v: Tensor | None) -> None:
    """The same into slots, without the page table."""
    moves = moves_for(kv.device)
    for part in _parts(kv, cache, k, v):
        moves.write_pages(part.k_pages, part.v_pages, None, None, slots, part.k, part.v)


def read_rows(kv: KVFormat, cache: PagedKV, places: Places, k: Tensor, v: Tensor | None, out_rows: Tensor | None = None) -> None:
    """:meth:`cpattn.moves.moves.Moves.read_pages` into parts of a message."""
    moves = moves_for(kv.device)
    for part in _parts(kv, cache, k, v):
        moves.read_pages(part.k_pages, part.v_pages, cache.page_table, *places, part.k, part.v, out_rows)


def as_bytes(kv: KVFormat, cache: PagedKV) -> tuple[Tensor, Tensor | None]:
    """The pages as messages have their numbers."""
    k_pages, v_pages = cache.k_pages, cache.v_pages
    if not kv.as_bytes:
        return k_pages, v_pages
    return k_pages.view(torch.uint8), None if v_pages is None else v_pages.view(torch.uint8)


def _parts(kv: KVFormat, cache: PagedKV, k: Tensor, v: Tensor | None) -> list[_Part]:
    k_pages, v_pages = as_bytes(kv, cache)
    if not kv.as_bytes:
        return [_Part(k_pages, v_pages, k, v)]
    numbers = _Part(k_pages, v_pages, k[..., : kv.head_dim], None if v is None else v[..., : kv.v_head_dim])
    if kv.scales != "token":
        return [numbers]
    stored, k_scale, v_scale = kv.stored(k, v), cache.k_scale, cache.v_scale
    assert k_scale is not None  # checked
    assert stored.k_scale is not None
    # As heads of one number.
    scales = [None if x is None else x.unsqueeze(-1) for x in (k_scale, v_scale, stored.k_scale, stored.v_scale)]
    return [numbers, _Part(*scales)]  # type: ignore[arg-type]
