"""The Triton kernel that moves K and V into and out of pages; :mod:`cpattn.moves.triton_moves` launches it.

Suffixes: R pairs of a row and a head; D a padded head dim.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _move_columns(paged_R, flat_R, is_row_R, is_token_R, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, WRITE: tl.constexpr):
    """All columns of K or of V, from these pointers on; pages of padding rows are not looked at."""
    column_1D = tl.arange(0, DIM_PADDED)[None, :]
    paged_RD, flat_RD = paged_R[:, None] + column_1D, flat_R[:, None] + column_1D
    is_token_RD = is_token_R[:, None] & (column_1D < DIM)
    if WRITE:
        tl.store(paged_RD, tl.load(flat_RD, mask=is_token_RD), mask=is_token_RD)
    else:
        tl.store(flat_RD, tl.load(paged_RD, mask=is_token_RD, other=0), mask=is_row_R[:, None] & (column_1D < DIM))


@triton.jit
def slots_of(
    request, position, page_table, row_R, is_row_R, page_size, table_stride_request, table_stride_page, TABLE: tl.constexpr
):  # fmt: skip
    """Of each row whether it is a token, and its page and its place in that."""
    position_R = tl.load(position + row_R, mask=is_row_R, other=-1).to(tl.int64)
    is_token_R = position_R >= 0
    page_R = position_R // page_size
    in_page_R = position_R - page_R * page_size
    if TABLE:
        request_R = tl.load(request + row_R, mask=is_token_R, other=0).to(tl.int64)
        page_R = tl.load(page_table + request_R * table_stride_request + page_R * table_stride_page, mask=is_token_R, other=0).to(tl.int64)
    return is_token_R, page_R, in_page_R


# The number of rows and the width of a page table change from batch to batch, and must not compile anew.
@triton.jit(do_not_specialize=["num_rows", "table_stride_request"])
def pages_kernel(
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
    is_token_R, page_R, in_page_R = slots_of(
        request, position, page_table, row_R, is_row_R, page_size, table_stride_request, table_stride_page, TABLE
    )
    if OUT_ROWS:
        row_R = tl.load(out_rows + row_R, mask=is_row_R, other=0).to(tl.int64)
    paged_R = k_pages + (page_R * k_page_stride + in_page_R * k_page_stride_token + head_R * k_page_stride_head)
    _move_columns(paged_R, k + (row_R * k_stride_row + head_R * k_stride_head), is_row_R, is_token_R, D, D_PADDED, WRITE)
    if HAS_V:
        paged_R = v_pages + (page_R * v_page_stride + in_page_R * v_page_stride_token + head_R * v_page_stride_head)
        _move_columns(paged_R, v + (row_R * v_stride_row + head_R * v_stride_head), is_row_R, is_token_R, DV, DV_PADDED, WRITE)
