"""Triton kernels that move rows into a message, and into order; :mod:`cpattn.moves.triton_moves` launches them.

Suffixes: R rows, or pairs of a row and a head; D a padded head dim; W words of a row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_columns(to_R, from_R, is_row_R, is_token_R, DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    """DIM columns from the pointers ``to_R`` on: the source's on tokens, 0 on padding, which is not read."""
    column_1D = tl.arange(0, DIM_PADDED)[None, :]
    values_RD = tl.load(from_R[:, None] + column_1D, mask=is_token_R[:, None] & (column_1D < DIM), other=0)
    tl.store(to_R[:, None] + column_1D, values_RD, mask=is_row_R[:, None] & (column_1D < DIM))


# Counts change from batch to batch, and must not compile anew.
@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def pack_kernel(
    message, k, v, slots, rows, num_rows, num_tokens, message_stride_row, message_stride_head,
    k_stride_row, k_stride_head, v_stride_row, v_stride_head,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, HAS_V: tl.constexpr, COUNT_ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_R (row, head) pairs, ``R``."""
    if COUNT_ON_DEVICE:
        num_tokens = tl.load(num_tokens)
    pair_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_R = pair_R // HEADS
    head_R = pair_R % HEADS
    is_row_R = row_R < num_rows
    is_token_R = row_R < num_tokens
    to_row_R = row_R
    if SLOTS:
        is_row_R = is_row_R & is_token_R
        to_row_R = tl.load(slots + row_R, mask=is_row_R, other=-1).to(tl.int64)
        is_row_R = is_row_R & (to_row_R >= 0)
        is_token_R = is_row_R
    if ROWS:
        row_R = tl.load(rows + row_R, mask=is_row_R, other=0).to(tl.int64)
    to_R = message + (to_row_R * message_stride_row + head_R * message_stride_head)
    pack_columns(to_R, k + (row_R * k_stride_row + head_R * k_stride_head), is_row_R, is_token_R, D, D_PADDED)
    if HAS_V:
        pack_columns(to_R + D, v + (row_R * v_stride_row + head_R * v_stride_head), is_row_R, is_token_R, DV, DV_PADDED)


@triton.jit(do_not_specialize=["num_rows"])
def gather_kernel(
    out, source, index, slots, num_rows, out_stride, source_stride,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_R rows, ``R``, and BLOCK_W of their words, ``W``. Strides are in units of UNIT words."""
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    word_1W = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    is_row_R = row_R < num_rows
    from_R = tl.load(index + row_R, mask=is_row_R, other=0).to(tl.int64)
    from_inside_RW = (is_row_R & (from_R >= 0))[:, None] & (word_1W < WIDTH)
    to_R = row_R
    if SLOTS:
        to_R = tl.load(slots + row_R, mask=is_row_R, other=-1).to(tl.int64)
        is_row_R = is_row_R & (to_R >= 0)
    to_inside_RW = is_row_R[:, None] & (word_1W < WIDTH)
    # Multiplied by a constant, from which the compiler sees that rows are aligned and that it may use wide accesses.
    values_RW = tl.load(source + (from_R * source_stride)[:, None] * UNIT + word_1W, mask=from_inside_RW, other=0)
    tl.store(out + (to_R * out_stride)[:, None] * UNIT + word_1W, values_RW, mask=to_inside_RW)
