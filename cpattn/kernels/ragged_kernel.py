"""Device code: causal attention over spans in one Triton launch, with the LSE, or merged into an earlier result.

The online softmax (:mod:`cpattn.kernels.online_softmax`) in the loop order of FlashAttention-2 (arXiv:2307.08691): a program
owns a tile of queries and visits its key blocks from the last to the first.

Suffixes: M rows of a query tile, N keys of a block, D and V the padded head dims of q/k and of v.

Same bits in every batch: a query's key blocks lie at multiples of C.BLOCK_N from the start of its key range, and a block
in which it sees nothing leaves its state as it is. Its running maximum then does not change, so that the state is
multiplied by exp2(0) = 1 and 0 is added to it. Fused multiply-adds are written out, so that the loops with
and without a mask cannot be contracted differently.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from cpattn.kernels.online_softmax import Output, Scoring, mask, tanh, weigh, write
from cpattn.kernels.stored_numbers import in_dtype, meant
from cpattn.kernels.tile_keys import (
    PageLine,
    Source,
    bounds_of,
    find_in_run,
    keys_seen,
    last_block,
    load_page_line,
    load_run,
    load_tile,
    page_entry,
    rows_of,
    whole_blocks,
)

_INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Keys(NamedTuple):
    """A tile's keys: ``first .. end - 1`` of a range, which begins at ``k_start`` or is what ``line`` says.

    Attributes:
        k, v: all keys and values; tail: K's columns from C.D_MAIN on, where they are computed apart.
        k_scale, v_scale: with C.SCALED, what they are multiplied by.
        head: the KV head.
    """

    k: Any
    tail: Any
    v: Any
    k_scale: Any
    v_scale: Any
    head: Any
    k_start: Any
    line: Any
    first: Any
    end: Any


class Queries(NamedTuple):
    """A tile's queries; tail: their columns from C.D_MAIN on, where they are computed apart."""

    q_MD: Any
    tail_MD: Any


class State(NamedTuple):
    """Of the online softmax: weighted values, sum of weights, maximum of exponents."""

    acc_MV: Any
    sum_M: Any
    max_M: Any


@triton.jit
def _dot(a, b, acc):
    """a @ b + acc in fp32; "ieee" keeps fp32 operands from being rounded to tf32."""
    if _INTERPRETED:
        # The interpreter multiplies the bit patterns of bf16; products of bf16 and fp16 are exact in fp32.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load_block(
    source, scale, keys, begin, DTYPE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr, BOUNDED: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Keys (or values) ``begin .. begin + C.BLOCK_N - 1`` of a range in DTYPE, ``[N, PADDED]``.

    With BOUNDED, those outside ``keys.first .. keys.end - 1`` are 0; without it all of the block must be in the range.
    """
    BLOCK_N: tl.constexpr = C.BLOCK_N
    key_N = begin + tl.arange(0, BLOCK_N)
    valid_N1 = ((key_N >= keys.first) & (key_N < keys.end))[:, None]
    if TMA:
        block = source.at.load([keys.head, keys.k_start + begin, 0]).reshape(BLOCK_N, PADDED)
        if BOUNDED:
            block = tl.where(valid_N1, block, tl.zeros_like(block))
    else:
        dim_1D = tl.arange(0, PADDED)[None, :]
        pointers = _find_keys(source, keys, begin, BOUNDED, C)[:, None] + dim_1D
        if BOUNDED:
            block = tl.load(pointers, mask=valid_N1 & (dim_1D < DIM), other=0)
        elif DIM < PADDED:
            block = tl.load(pointers, mask=dim_1D < DIM, other=0)
        else:
            block = tl.load(pointers)
    if C.STORED:
        block = meant(block, C.FP8, C.NATIVE)
        if C.OF_TOKENS:
            scale_N = _find_keys(scale, keys, begin, BOUNDED, C)
            if BOUNDED:
                key_N = begin + tl.arange(0, BLOCK_N)
                factor_N = tl.load(scale_N, mask=(key_N >= keys.first) & (key_N < keys.end), other=0.0)
            else:
                factor_N = tl.load(scale_N)
            block = block * factor_N[:, None]
        elif C.SCALED:
            block = block * tl.load(scale.at + keys.head * scale.stride_head)
        block = in_dtype(block, DTYPE)
    return block


@triton.jit
def _find_keys(source, keys, begin, BOUNDED: tl.constexpr, C: tl.constexpr):
    """Where each key of a block begins: the one place that knows where keys lie. No entry of the page table outside of the
    range is looked at."""
    BLOCK_N: tl.constexpr = C.BLOCK_N
    PAGE_SIZE: tl.constexpr = C.PAGE_SIZE
    first = source.at + keys.head.to(tl.int64) * source.stride_head
    if PAGE_SIZE == 0:
        first += (keys.k_start + begin).to(tl.int64) * source.stride_row
        pointers_N = first + tl.arange(0, BLOCK_N).to(tl.int64) * source.stride_row
    elif PAGE_SIZE % BLOCK_N == 0:
        # The whole block lies in one page.
        page = tl.load(page_entry(keys.line, begin, PAGE_SIZE))
        first += page.to(tl.int64) * source.page_stride + (begin % PAGE_SIZE).to(tl.int64) * source.stride_row
        pointers_N = first + tl.arange(0, BLOCK_N).to(tl.int64) * source.stride_row
    else:
        key_N = begin + tl.arange(0, BLOCK_N)
        entry_N = page_entry(keys.line, key_N, PAGE_SIZE)
        page_N = tl.load(entry_N, mask=(key_N >= keys.first) & (key_N < keys.end), other=0) if BOUNDED else tl.load(entry_N)
        pointers_N = first + (page_N.to(tl.int64) * source.page_stride + (key_N % PAGE_SIZE).to(tl.int64) * source.stride_row)
    return pointers_N


@triton.jit
def _load_queries(q_M1, dim_1D, is_token_M, C: tl.constexpr):
    q_MD = tl.load(q_M1 + dim_1D, mask=is_token_M[:, None] & (dim_1D < C.D), other=0.0)
    if C.Q_SIGN != 1:
        q_MD = (q_MD.to(tl.float32) * C.Q_SIGN).to(q_MD.dtype)
    return q_MD


@triton.jit
def _attend(state, queries, keys, begin, end, bounds, scoring, MASKED: tl.constexpr, C: tl.constexpr):
    """The state after the key blocks from ``end`` down to ``begin``."""
    BLOCK_N: tl.constexpr = C.BLOCK_N
    TMA: tl.constexpr = C.TMA
    V_IN_K: tl.constexpr = C.V_IN_K
    DTYPE: tl.constexpr = queries.q_MD.dtype
    acc_MV, sum_M, max_M = state
    for left in tl.range(begin, end, BLOCK_N):
        block = tl.multiple_of(end - BLOCK_N - (left - begin), BLOCK_N)
        # A descriptor's K may hold anything outside of the range: its scores are masked below.
        k_ND = _load_block(keys.k, keys.k_scale, keys, block, DTYPE, C.D_MAIN, C.D_PADDED, TMA, MASKED and not TMA, C)
        score_MN = _dot(queries.q_MD, tl.trans(k_ND), None)
        if C.D_TAIL:
            tail_ND = _load_block(keys.tail, keys.k_scale, keys, block, DTYPE, C.D_TAIL, C.D_TAIL_PADDED, False, MASKED, C)
            score_MN = _dot(queries.tail_MD, tl.trans(tail_ND), score_MN)
        if C.SOFTCAP:
            score_MN = tanh(score_MN * scoring.tanh_scale)
        if MASKED:
            score_MN = mask(score_MN, (block + tl.arange(0, BLOCK_N))[None, :], bounds, C)
        weight_MN, decay_M, sum_M, max_M = weigh(score_MN, sum_M, max_M, scoring.exponent_scale, MASKED)
        # Values of other keys are 0 in K, too, and K's columns after V's make columns of the result that are not stored.
        v_NV = k_ND
        if not V_IN_K:
            v_NV = _load_block(keys.v, keys.v_scale, keys, block, DTYPE, C.DV, C.DV_PADDED, TMA, MASKED, C)
        acc_MV = _dot(weight_MN.to(v_NV.dtype), v_NV, acc_MV * decay_M[:, None])
    return State(acc_MV, sum_M, max_M)


@triton.jit
def _attend_all(state, queries, keys, tile, window, rows, scoring, C: tl.constexpr):
    """The state after all keys that any of the tile's queries sees; without a mask where all of them see all."""
    bounds = bounds_of(rows.token_M, tile, window)
    seen = keys_seen(tile, window, C)
    whole_begin, whole_end = whole_blocks(tile, window, C)
    end = tl.where(seen.end > seen.begin, last_block(seen, C) + C.BLOCK_N, seen.begin)
    state = _attend(state, queries, keys, whole_end, end, bounds, scoring, True, C)
    state = _attend(state, queries, keys, whole_begin, tl.minimum(whole_end, end), bounds, scoring, False, C)
    if C.WINDOW:
        state = _attend(state, queries, keys, seen.begin, tl.minimum(whole_begin, end), bounds, scoring, True, C)
    return state


# A page table is as wide as the longest request of its batch: of a width of its own nothing must be compiled anew.
@triton.jit(do_not_specialize=["page_table_stride_request"])
def ragged_attention_kernel(
    q, k, v, out, lse, sinks, tiles, page_table,
    q_stride_row, q_stride_head, k_page_stride, k_stride_row, k_stride_head, v_page_stride, v_stride_row, v_stride_head,
    page_table_stride_request, page_table_stride_page, out_stride_row, out_stride_head, lse_stride_row, lse_stride_head,
    tanh_scale, exponent_scale, window, k_scale, v_scale, k_scale_page_stride, k_scale_stride_row, k_scale_stride_head,
    v_scale_page_stride, v_scale_stride_row, v_scale_stride_head, C: tl.constexpr,
):  # fmt: skip
    """One program for each tile and head. The tiles of a run have the same keys, and come all for one head, then for the
    next, so that they run side by side and share those keys in the L2 cache. C is a
    :class:`cpattn.kernels.attention_config.RaggedConfig`."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    DV_PADDED: tl.constexpr = C.DV_PADDED
    run = load_run(tiles, tl.program_id(0), C)
    # Fixed spans have tiles to spare.
    if run.tiles == 0:
        return
    number, head = find_in_run(tl.program_id(0), run, C)
    tile, k_start = load_tile(tiles, number)
    page_line = page_table
    if C.PAGE_SIZE:
        page_line = load_page_line(page_table, page_table_stride_request, tiles, number)
    rows = rows_of(tl.arange(0, BLOCK_M), tile, head * C.PACK, C)
    seen = keys_seen(tile, window, C)
    if C.SKIPS:
        sees_nothing = seen.end <= seen.first
        if sees_nothing:
            return

    # Strides are a caller's: with a row or a head they make products of more than 32 bits.
    row_M = tile.q_begin.to(tl.int64) * q_stride_row + rows.token_M.to(tl.int64) * q_stride_row
    q_M1 = q + (row_M + rows.head_M.to(tl.int64) * q_stride_head)[:, None]
    q_MD = _load_queries(q_M1, tl.arange(0, C.D_PADDED)[None, :], rows.is_token_M, C)
    tail_MD = q_MD
    k_source = Source(k, k_page_stride, k_stride_row, k_stride_head)
    tail = k_source
    if C.D_TAIL:
        tail_MD = _load_queries(q_M1, C.D_MAIN + tl.arange(0, C.D_TAIL_PADDED)[None, :], rows.is_token_M, C)
        tail = Source(k + C.D_MAIN, k_page_stride, k_stride_row, k_stride_head)
    v_source = Source(v, v_page_stride, v_stride_row, v_stride_head)
    line = PageLine(page_line, page_table_stride_page)
    k_scales = Source(k_scale, k_scale_page_stride, k_scale_stride_row, k_scale_stride_head)
    v_scales = Source(v_scale, v_scale_page_stride, v_scale_stride_row, v_scale_stride_head)
    keys = Keys(k_source, tail, v_source, k_scales, v_scales, head * C.PACK // C.GROUP, k_start, line, seen.first, seen.end)

    sum_M = tl.zeros([BLOCK_M], tl.float32)
    state = State(tl.zeros([BLOCK_M, DV_PADDED], tl.float32), sum_M, tl.full([BLOCK_M], float("-inf"), tl.float32))
    acc_MV, sum_M, max_M = _attend_all(state, Queries(q_MD, tail_MD), keys, tile, window, rows, Scoring(tanh_scale, exponent_scale), C)
    out += tile.q_begin.to(tl.int64) * out_stride_row
    lse += tile.q_begin.to(tl.int64) * lse_stride_row
    output = Output(out, out_stride_row, out_stride_head, lse, lse_stride_row, lse_stride_head, sinks)
    write(acc_MV, sum_M, max_M, rows.token_M.to(tl.int64), rows, tl.arange(0, DV_PADDED)[None, :], output, C)
