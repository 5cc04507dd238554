"""Triton kernels that post this rank's rows, or bytes, in its heap, and pull all ranks' from theirs; :mod:`cpattn.moves.peer_moves`
launches them.

Suffixes: R rows, or pairs of a row and a head; D a padded head dim; W words.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from cpattn.kernels.move_pages import slots_of
from cpattn.kernels.peer_flags import (
    await_messages,
    await_readers,
    end_post,
    end_pull,
    found_no_fault,
    heap_of,
    let_post,
    let_pull,
    may_post,
    may_pull,
    posts_of,
)


@triton.jit
def at(table, rank, offset, like, WIDE: tl.constexpr = True):
    """What lies ``offset`` bytes behind the beginning of a rank's heap, as a pointer to the kind of number that ``like`` points
    to. With WIDE the offset is a multiple of 16, as that of each board, which the compiler cannot see."""
    pointer = (tl.load(table + rank) + offset).to(like.dtype)
    return tl.multiple_of(pointer, 16) if WIDE else pointer


@triton.jit(do_not_specialize=["rank", "board"])
def await_readers_kernel(table, rank, board, FIRST: tl.constexpr, WORLD: tl.constexpr, FLAGS: tl.constexpr, THREADS: tl.constexpr):
    """One warp, before a post."""
    heap = heap_of(table, rank)
    let_post(heap, board, await_readers(table, heap, board, FIRST, WORLD, FLAGS, THREADS) & found_no_fault(table, heap, WORLD, THREADS))


@triton.jit(do_not_specialize=["rank", "board", "size", "first_rank", "many"])
def await_messages_kernel(table, rank, board, size, first_rank, many, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """One warp, before a pull or a copy."""
    heap = heap_of(table, rank)
    are_there = await_messages(table, heap, board, posts_of(heap, board), size, first_rank, many, WORLD, THREADS)
    let_pull(heap, board, are_there & found_no_fault(table, heap, WORLD, THREADS))


@triton.jit
def _post_columns(to_R, from_R, is_row_R, is_token_R, DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    """DIM columns from the pointers ``to_R`` on: the source's on tokens, 0 on padding, which is not read."""
    column_1D = tl.arange(0, DIM_PADDED)[None, :]
    values_RD = tl.load(from_R[:, None] + column_1D, mask=is_token_R[:, None] & (column_1D < DIM), other=0)
    tl.store(to_R[:, None] + column_1D, values_RD, mask=is_row_R[:, None] & (column_1D < DIM))


@triton.jit(do_not_specialize=["rank", "board", "offset", "size", "num_rows", "num_tokens"])
def post_rows_kernel(
    table, k, v, rank, board, offset, size, num_rows, num_tokens,
    k_stride_row, k_stride_head, v_stride_row, v_stride_head,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
    COUNT_ON_DEVICE: tl.constexpr, WORLD: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """K and V side by side, as a message ``[num_rows, HEADS, D + DV]``; zeros after the tokens. DV is 0 where V is in K."""
    heap, can_write = may_post(table, rank, board)
    if COUNT_ON_DEVICE:
        num_tokens = tl.load(num_tokens)
    message = at(table, rank, offset, k)
    for first in range(tl.program_id(0) * BLOCK_R, num_rows * HEADS, tl.num_programs(0) * BLOCK_R):
        pair_R = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        row_R = pair_R // HEADS
        head_R = pair_R % HEADS
        is_row_R = row_R < tl.where(can_write, num_rows, 0)
        is_token_R = row_R < num_tokens
        to_R = message + (row_R * HEADS + head_R) * (D + DV)
        from_R = k + (row_R * k_stride_row + head_R * k_stride_head)
        _post_columns(to_R, from_R, is_row_R, is_token_R, D, D_PADDED)
        if DV:
            from_R = v + (row_R * v_stride_row + head_R * v_stride_head)
            _post_columns(to_R + D, from_R, is_row_R, is_token_R, DV, DV_PADDED)
    end_post(table, heap, rank, board, size, WORLD, THREADS)


@triton.jit(do_not_specialize=["rank", "board", "offset", "num_rows", "rows_of_rank"])
def pull_rows_kernel(
    table, out, index, slots, rank, board, offset, num_rows, rows_of_rank, out_stride,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, SLOTS: tl.constexpr,
    WORLD: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """``out[i] = gathered[index[i]]`` or ``out[slots[i]] = gathered[index[i]]``, where ``gathered`` are all ranks' rows, rank after
    rank, of WIDTH words; zeros for a negative index. Strides are in units of UNIT words."""
    heap, is_there = may_pull(table, rank, board)
    word_1W = tl.arange(0, BLOCK_W)[None, :]
    for first in range(tl.program_id(0) * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        is_row_R = row_R < num_rows
        from_R = tl.load(index + row_R, mask=is_row_R, other=-1).to(tl.int64)
        is_read_R = tl.where(is_there, from_R, -1) >= 0
        to_R = row_R.to(tl.int64)
        if SLOTS:
            to_R = tl.load(slots + row_R, mask=is_row_R, other=-1).to(tl.int64)
            is_row_R = is_row_R & (to_R >= 0)
        from_R = tl.maximum(from_R, 0)
        source_R = at(table, from_R // rows_of_rank, offset, out) + (from_R % rows_of_rank) * (WIDTH // UNIT) * UNIT
        for word in tl.static_range(0, WIDTH, BLOCK_W):
            inside_1W = word + word_1W < WIDTH
            values_RW = tl.load(source_R[:, None] + (word + word_1W), mask=is_read_R[:, None] & inside_1W, other=0, cache_modifier=".cg")
            # All bits set are NaN in every floating dtype.
            values_RW = tl.where(is_there, values_RW, -1)
            tl.store(out + (to_R * out_stride)[:, None] * UNIT + (word + word_1W), values_RW, mask=is_row_R[:, None] & inside_1W)
    end_pull(table, heap, rank, board, WORLD, THREADS)


@triton.jit(do_not_specialize=["rank", "board", "offset", "num_rows", "rows_of_rank", "page_size", "table_stride_request"])
def pull_pages_kernel(
    table, k_pages, v_pages, page_table, request, position, rank, board, offset, num_rows, rows_of_rank,
    page_size, table_stride_request, table_stride_page,
    k_page_stride, k_page_stride_token, k_page_stride_head, v_page_stride, v_page_stride_token, v_page_stride_head,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
    TABLE: tl.constexpr, ENDS: tl.constexpr, WORLD: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Row i of all ranks' messages ``[rows_of_rank, HEADS, D + DV]``, rank after rank, into its slot; none for a negative position.
    With ENDS the messages have been read then."""
    heap, is_there = may_pull(table, rank, board)
    for first in range(tl.program_id(0) * BLOCK_R, num_rows * HEADS, tl.num_programs(0) * BLOCK_R):
        pair_R = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        row_R = pair_R // HEADS
        head_R = pair_R % HEADS
        is_row_R, page_R, inside_R = slots_of(
            request, position, page_table, row_R, row_R < num_rows, page_size, table_stride_request, table_stride_page, TABLE
        )
        source_R = at(table, tl.minimum(row_R, num_rows - 1) // rows_of_rank, offset, k_pages)
        source_R += ((row_R % rows_of_rank) * HEADS + head_R) * (D + DV)
        to_R = k_pages + (page_R * k_page_stride + inside_R * k_page_stride_token + head_R * k_page_stride_head)
        _pull_columns(to_R, source_R, is_row_R, is_there, D, D_PADDED)
        if DV:
            to_R = v_pages + (page_R * v_page_stride + inside_R * v_page_stride_token + head_R * v_page_stride_head)
            _pull_columns(to_R, source_R + D, is_row_R, is_there, DV, DV_PADDED)
    if ENDS:
        end_pull(table, heap, rank, board, WORLD, THREADS)


@triton.jit
def _pull_columns(to_R, from_R, is_row_R, is_there, DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    """DIM columns, or NaN where the group has a fault."""
    column_1D = tl.arange(0, DIM_PADDED)[None, :]
    is_read_RD = is_row_R[:, None] & (column_1D < tl.where(is_there, DIM, 0))
    values_RD = tl.load(from_R[:, None] + column_1D, mask=is_read_RD, other=0, cache_modifier=".cg")
    if values_RD.dtype.is_floating():
        values_RD = tl.where(is_there, values_RD, float("nan"))
    else:
        # Bytes of fp8, of which all bits set are NaN.
        values_RD = tl.where(is_there, values_RD, tl.full(values_RD.shape, 255, values_RD.dtype))
    tl.store(to_R[:, None] + column_1D, values_RD, mask=is_row_R[:, None] & (column_1D < DIM))


@triton.jit(do_not_specialize=["rank", "board", "offset", "size", "num_units"])
def post_words_kernel(
    table, x, rank, board, offset, size, num_units,
    UNIT: tl.constexpr, BLOCK_W: tl.constexpr, WORLD: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """A message as it is, in units of UNIT words, from which the compiler sees how wide its accesses may be."""
    heap, can_write = may_post(table, rank, board)
    message = at(table, rank, offset, x)
    num_words = tl.where(can_write, num_units, 0) * UNIT
    for block in range(tl.program_id(0), tl.cdiv(num_words, BLOCK_W), tl.num_programs(0)):
        word_W = block * BLOCK_W + tl.arange(0, BLOCK_W)
        tl.store(message + word_W, tl.load(x + word_W, mask=word_W < num_words), mask=word_W < num_words)
    end_post(table, heap, rank, board, size, WORLD, THREADS)


@triton.jit(do_not_specialize=["rank", "board", "offset", "num_units", "first_rank", "many"])
def pull_words_kernel(
    table, out, rank, board, offset, num_units, first_rank, many,
    UNIT: tl.constexpr, BLOCK_W: tl.constexpr, WORLD: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """``num_units`` units of UNIT words, ``offset`` bytes behind the beginning of each of ``many`` ranks' heaps, from ``first_rank``
    on around the ring; where there are several, ``out`` has a part for each rank."""
    heap, is_there = may_pull(table, rank, board)
    num_words = num_units * UNIT
    blocks = tl.cdiv(num_words, BLOCK_W)
    for block in range(tl.program_id(0), blocks * many, tl.num_programs(0)):
        # Each rank begins with another's memory, so that not all of them read the same one at once.
        source = (first_rank + rank * (many > 1) + block // blocks) % WORLD
        word_W = (block % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
        # What is not there is read all the same, and not used: a mask that depends on it would make accesses narrow.
        values_W = tl.load(at(table, source, offset, out, UNIT > 1) + word_W, mask=word_W < num_words, other=0, cache_modifier=".cg")
        to_W = out + (source * (many > 1)).to(tl.int64) * num_words + word_W
        # All bits set are NaN in every floating dtype.
        tl.store(to_W, tl.where(is_there, values_W, -1), mask=word_W < num_words)
    end_pull(table, heap, rank, board, WORLD, THREADS)


@triton.jit(do_not_specialize=["rank", "board", "num_words"])
def end_copy_kernel(table, out, rank, board, num_words, BLOCK_W: tl.constexpr, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """One program, after a message was copied: NaN in its place where the group has a fault; and the message has been read."""
    heap, is_there = may_pull(table, rank, board)
    if not is_there:
        for block in range(tl.cdiv(num_words, BLOCK_W)):
            word_W = block * BLOCK_W + tl.arange(0, BLOCK_W)
            # All bits set are NaN in every floating dtype.
            tl.store(out + word_W, tl.full([BLOCK_W], -1, out.dtype.element_ty), mask=word_W < num_words)
    end_pull(table, heap, rank, board, WORLD, THREADS)
