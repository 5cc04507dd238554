"""Triton kernels that move K and V into and out of pages: one launch for both, each row read once and written once."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, uint8

from cpattn.kernels.arguments import Words
from cpattn.kernels.launch import Launcher, LaunchFunction

# Bytes that one program moves of the wider of K and V: 128 for each of its 128 threads.
_BYTES_PER_PROGRAM = 16384


@triton.jit
def _move_columns(
    pages, flat, page_R, in_page_R, row_R, head_R, is_row_R, is_token_R,
    page_stride, page_stride_token, page_stride_head, flat_stride_row, flat_stride_head,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """All columns of K or of V; pages of padding rows are not looked at."""
    column_1D = tl.arange(0, DIM_PADDED)[None, :]
    paged = pages + (page_R * page_stride + in_page_R * page_stride_token + head_R * page_stride_head)[:, None] + column_1D
    unpaged = flat + (row_R * flat_stride_row + head_R * flat_stride_head)[:, None] + column_1D
    is_token_RD = is_token_R[:, None] & (column_1D < DIM)
    if WRITE:
        tl.store(paged, tl.load(unpaged, mask=is_token_RD), mask=is_token_RD)
    else:
        tl.store(unpaged, tl.load(paged, mask=is_token_RD, other=0), mask=is_row_R[:, None] & (column_1D < DIM))


# The number of rows changes from batch to batch, and must not compile anew.
@triton.jit(do_not_specialize=["num_rows"])
def _pages_kernel(
    k_pages, v_pages, page_table, request, position, k, v, out_rows, num_rows, page_size, table_stride_request, table_stride_page,
    k_page_stride, k_page_stride_token, k_page_stride_head, v_page_stride, v_page_stride_token, v_page_stride_head,
    k_stride_row, k_stride_head, v_stride_row, v_stride_head,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
    WRITE: tl.constexpr, TABLE: tl.constexpr, OUT_ROWS: tl.constexpr, HAS_V: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_R (row, head) pairs, ``R``."""
    pair_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_R = pair_R // HEADS
    head_R = pair_R % HEADS
    is_row_R = row_R < num_rows
    position_R = tl.load(position + row_R, mask=is_row_R, other=-1).to(tl.int64)
    is_token_R = position_R >= 0
    page_R = position_R // page_size
    in_page_R = position_R - page_R * page_size
    if TABLE:
        request_R = tl.load(request + row_R, mask=is_token_R, other=0).to(tl.int64)
        page_R = tl.load(page_table + request_R * table_stride_request + page_R * table_stride_page, mask=is_token_R, other=0).to(tl.int64)
    if OUT_ROWS:
        row_R = tl.load(out_rows + row_R, mask=is_row_R, other=0).to(tl.int64)
    _move_columns(
        k_pages, k, page_R, in_page_R, row_R, head_R, is_row_R, is_token_R,
        k_page_stride, k_page_stride_token, k_page_stride_head, k_stride_row, k_stride_head, D, D_PADDED, WRITE,
    )  # fmt: skip
    if HAS_V:
        _move_columns(
            v_pages, v, page_R, in_page_R, row_R, head_R, is_row_R, is_token_R,
            v_page_stride, v_page_stride_token, v_page_stride_head, v_stride_row, v_stride_head, DV, DV_PADDED, WRITE,
        )  # fmt: skip


_pages = Launcher(_pages_kernel)
_TENSORS = {name: i for i, name in enumerate(("k_pages", "v_pages", "page_table", "request", "position", "k", "v", "out_rows"))}


def write_pages(
    k_pages: Tensor,
    v_pages: Tensor | None,
    page_table: Tensor | None,
    request: Tensor | None,
    position: Tensor,
    k: Tensor,
    v: Tensor | None,
) -> None:
    """The twin of :func:`cpattn.exchange.pages.torch_write_pages`, with the same bits; arguments as for
    :func:`cpattn.exchange.pages.write_pages_`."""
    _move(k_pages, v_pages, page_table, request, position, k, v, None, write=True)


def read_pages(
    k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor | None, request: Tensor | None, position: Tensor, k: Tensor,
    v: Tensor | None, out_rows: Tensor | None = None,
) -> None:  # fmt: skip
    """The twin of :func:`cpattn.exchange.pages.torch_read_pages`, with the same bits; arguments as for
    :func:`cpattn.exchange.pages.read_pages_`."""
    _move(k_pages, v_pages, page_table, request, position, k, v, out_rows, write=False)


def _move(
    k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor | None, request: Tensor | None, position: Tensor, k: Tensor,
    v: Tensor | None, out_rows: Tensor | None, *, write: bool,
) -> None:  # fmt: skip
    # Without V, K stands in for a pointer that is not looked at.
    has_v = v_pages is not None and v is not None
    if v_pages is None or v is None:
        v_pages, v = k_pages, k
    key = (
        k_pages.shape, k_pages.stride(), k_pages.dtype, v_pages.stride(), k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype,
        has_v, write,
        position.shape, position.dtype, None if page_table is None else (page_table.stride(), page_table.dtype),
        None if request is None else request.dtype, None if out_rows is None else out_rows.dtype,
    )  # fmt: skip
    tensors = (
        k_pages, v_pages, position if page_table is None else page_table, position if request is None else request, position, k, v,
        position if out_rows is None else out_rows,
    )  # fmt: skip
    launch = _pages.prepared.get(key)
    if launch is None:
        table_stride = None if page_table is None else page_table.stride()
        launch = _pages.prepared.keep(key, _prepare(*tensors, table_stride, out_rows is not None, has_v, write))
    launch(*tensors)


def _prepare(
    k_pages: Tensor, v_pages: Tensor, page_table: Tensor, request: Tensor, position: Tensor, k: Tensor, v: Tensor, out_rows: Tensor,
    table_stride: tuple[int, ...] | None, has_out_rows: bool, has_v: bool, write: bool,
) -> LaunchFunction:  # fmt: skip
    rows, heads = position.shape[0], k.shape[1]
    d_padded, dv_padded = triton.next_power_of_2(k.shape[2]), triton.next_power_of_2(v.shape[2])
    block = max(1, _BYTES_PER_PROGRAM // (k.element_size() * max(d_padded, dv_padded)))
    table_stride_request, table_stride_page = table_stride or (0, 0)
    moved: dict[str, Any] = {"k_pages": k_pages, "v_pages": v_pages, "k": k, "v": v}
    if k.element_size() == 1:
        # fp8 is moved as bytes, which every GPU and the interpreter have.
        moved = {name: Words(x, uint8) for name, x in moved.items()}
    return _pages.prepare(
        (triton.cdiv(rows * heads, block), 1), {}, _TENSORS, **moved,
        page_table=page_table, request=request, position=position, out_rows=out_rows,
        num_rows=rows, page_size=k_pages.shape[1], table_stride_request=table_stride_request, table_stride_page=table_stride_page,
        k_page_stride=k_pages.stride(0), k_page_stride_token=k_pages.stride(1), k_page_stride_head=k_pages.stride(2),
        v_page_stride=v_pages.stride(0), v_page_stride_token=v_pages.stride(1), v_page_stride_head=v_pages.stride(2),
        k_stride_row=k.stride(0), k_stride_head=k.stride(1), v_stride_row=v.stride(0), v_stride_head=v.stride(1),
        HEADS=heads, D=k.shape[2], DV=v.shape[2], D_PADDED=d_padded, DV_PADDED=dv_padded, BLOCK_R=block,
        WRITE=write, TABLE=table_stride is not None, OUT_ROWS=has_out_rows, HAS_V=has_v,
    )  # fmt: skip
