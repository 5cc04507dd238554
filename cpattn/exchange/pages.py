"""K and V into and out of an engine's pages: which kernel moves them, and its twin in plain torch, which defines it.

Shapes: P pages, n rows to move, R requests. Row ``i`` is token ``position[i]`` of request ``request[i]``; its slot is
``page_table[request[i], position[i] // page_size] * page_size + position[i] % page_size``, or, without a page table,
``position[i]`` itself. A row of negative position is padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpattn.exchange.put_rows import put_rows_
from cpattn.kernels.available import has_kernels, kernel_module


def write_pages_(
    k_pages: Tensor,
    v_pages: Tensor | None,
    page_table: Tensor | None,
    request: Tensor | None,
    position: Tensor,
    k: Tensor,
    v: Tensor | None,
) -> None:
    """Writes row i of k and v into its slot; padding rows are skipped.

    Args:
        k_pages: ``[P, page_size, Hkv, D]``, any strides but a contiguous last axis; v_pages ``[P, page_size, Hkv, Dv]``,
            or None where V is a part of K.
        page_table: int32 or int64 ``[R, max_pages]``, or None; only the entries of tokens that are moved are looked at.
        request: int32 or int64 ``[n]``; not looked at without a page table.
        position: int32 or int64 ``[n]``; all slots are different.
        k, v: ``[>= n, Hkv, D]`` and ``[>= n, Hkv, Dv]`` of the pages' dtype, such as the halves of a message.
    """
    if has_kernels(k_pages.device):
        kernel_module("pages").write_pages(k_pages, v_pages, page_table, request, position, k, v)
    else:
        torch_write_pages(k_pages, v_pages, page_table, request, position, k, v)


def torch_write_pages(
    k_pages: Tensor,
    v_pages: Tensor | None,
    page_table: Tensor | None,
    request: Tensor | None,
    position: Tensor,
    k: Tensor,
    v: Tensor | None,
) -> None:
    """:func:`write_pages_` in plain torch, which defines it."""
    if not k_pages.numel():
        return
    is_token, slot = _slots(k_pages, page_table, request, position)
    put_rows_(k_pages, slot, k[: len(position)], is_token)
    if v_pages is not None and v is not None:
        put_rows_(v_pages, slot, v[: len(position)], is_token)


def read_pages_(
    k_pages: Tensor,
    v_pages: Tensor | None,
    page_table: Tensor | None,
    request: Tensor | None,
    position: Tensor,
    k: Tensor,
    v: Tensor | None,
    out_rows: Tensor | None = None,
) -> None:
    """Reads each row's slot into row i of k and v, or into row ``out_rows[i]``; padding rows become 0.

    Args:
        out_rows: int32 or int64 ``[n]``, all different; the rest as for :func:`write_pages_`.
    """
    if has_kernels(k_pages.device):
        kernel_module("pages").read_pages(k_pages, v_pages, page_table, request, position, k, v, out_rows)
    else:
        torch_read_pages(k_pages, v_pages, page_table, request, position, k, v, out_rows)


def torch_read_pages(
    k_pages: Tensor,
    v_pages: Tensor | None,
    page_table: Tensor | None,
    request: Tensor | None,
    position: Tensor,
    k: Tensor,
    v: Tensor | None,
    out_rows: Tensor | None = None,
) -> None:
    """:func:`read_pages_` in plain torch, which defines it."""
    to = slice(0, len(position)) if out_rows is None else out_rows
    if not k_pages.numel():
        k[to] = 0
        if v is not None:
            v[to] = 0
        return
    is_token, slot = _slots(k_pages, page_table, request, position)
    k[to] = torch.where(is_token[:, None, None], k_pages[slot], 0)
    if v_pages is not None and v is not None:
        v[to] = torch.where(is_token[:, None, None], v_pages[slot], 0)


def _slots(k_pages: Tensor, page_table: Tensor | None, request: Tensor | None, position: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Which rows are tokens, and each row's page and place in it: those of slot 0 for padding."""
    page_size = k_pages.shape[1]
    is_token = position >= 0
    position = torch.where(is_token, position, 0).long()
    page = position // page_size
    if page_table is not None and page_table.numel():
        assert request is not None
        page = torch.where(is_token, page_table[torch.where(is_token, request, 0), page].long(), 0)
    return is_token, (page, position % page_size)
