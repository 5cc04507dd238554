"""Causal attention over spans in one Triton launch, with the LSE, or merged into an earlier result.

The online softmax of Milakov and Gimelshein (arXiv:1805.02867) in the loop order of FlashAttention-2
(arXiv:2307.08691): a program owns a tile of queries and visits its key blocks in order, with the exponents in base 2.

Suffixes: M rows of a query tile, N keys of a block, D and V the padded head dims of q/k and of v.

Same bits in every batch: a query's key blocks lie at multiples of BLOCK_N from the start of its key range, and a block
in which it sees nothing leaves its state as it is. Its running maximum then does not change, so that the state is
multiplied by exp2(0) = 1 and 0 is added to it; fused multiply-adds are written out, so that the loops with
and without a mask can not be contracted differently.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cpattn.current import is_on_current_device
from cpattn.kernels.arguments import Blocks
from cpattn.kernels.launch import Launcher, LaunchFunction, launch_nothing
from cpattn.kernels.release import HOPPER_KERNEL, warn_if_slow
from cpattn.kernels.tile_shapes import PAGE_UNIT, TileShape, has_specialized, packs_for, padded_dims, tile_shapes, warn_of_tile_file
from cpattn.kernels.tiles import TILE_FIELDS, launch_for
from cpattn.keys import Keys
from cpattn.options import AttentionOptions
from cpattn.spans import Spans

_LOG2_E = math.log2(math.e)
_LN_2: tl.constexpr = tl.constexpr(math.log(2.0))
_TWO_LOG2_E: tl.constexpr = tl.constexpr(2.0 * math.log2(math.e))
_FIELDS: tl.constexpr = tl.constexpr(TILE_FIELDS)
_INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


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
    source, page_stride, stride_row, stride_head, head, k_start, page_line, page_line_stride, begin, key_from, key_to,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr, TMA: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Keys (or values) ``begin .. begin + BLOCK_N - 1`` of a range, ``[N, DIM_PADDED]``: the one place that knows where keys lie.

    With BOUNDED, keys outside ``key_from .. key_to - 1`` are 0; without it all of the block must be in the range. With
    pages (PAGE_SIZE is not 0), ``page_line`` is the request's line of the table; no entry outside of the range is looked at.
    """
    key_N = begin + tl.arange(0, BLOCK_N)
    valid_N1 = ((key_N >= key_from) & (key_N < key_to))[:, None]
    if TMA:
        block = source.load([head, k_start + begin, 0]).reshape(BLOCK_N, DIM_PADDED)
        if BOUNDED:
            block = tl.where(valid_N1, block, tl.zeros_like(block))
    else:
        dim_1D = tl.arange(0, DIM_PADDED)[None, :]
        first = source + head.to(tl.int64) * stride_head
        if PAGE_SIZE == 0 or PAGE_SIZE % BLOCK_N == 0:
            if PAGE_SIZE == 0:
                first += (k_start + begin).to(tl.int64) * stride_row
            else:
                # The whole block lies in one page.
                page = tl.load(page_line + (begin // PAGE_SIZE).to(tl.int64) * page_line_stride)
                first += page.to(tl.int64) * page_stride + (begin % PAGE_SIZE).to(tl.int64) * stride_row
            pointers = first + (tl.arange(0, BLOCK_N).to(tl.int64) * stride_row)[:, None] + dim_1D
        else:
            entry_N = page_line + (key_N // PAGE_SIZE).to(tl.int64) * page_line_stride
            page_N = tl.load(entry_N, mask=(key_N >= key_from) & (key_N < key_to), other=0) if BOUNDED else tl.load(entry_N)
            pointers = first + (page_N.to(tl.int64) * page_stride + (key_N % PAGE_SIZE).to(tl.int64) * stride_row)[:, None] + dim_1D
        if BOUNDED:
            block = tl.load(pointers, mask=valid_N1 & (dim_1D < DIM), other=0.0)
        elif DIM < DIM_PADDED:
            block = tl.load(pointers, mask=dim_1D < DIM, other=0.0)
        else:
            block = tl.load(pointers)
    return block


@triton.jit
def tanh(x):
    """tanh to about 2 ulp of fp32: the polynomial of Cephes' tanhf near 0, where 1 - 2 / (exp(2x) + 1) cancels."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = series * square * x + x
    far = 1.0 - 2.0 / (tl.exp2(x * _TWO_LOG2_E) + 1.0)
    return tl.where(square < 0.625 * 0.625, near, far)


@triton.jit
def _attend(
    acc_MV, sum_M, max_M, q_MD, q_tail_MD, k, v, k_page_stride, k_stride_row, k_stride_head, v_page_stride, v_stride_row, v_stride_head,
    kv_head, k_start, page_line, page_line_stride, key_from, key_to, begin, end, sees_from_M, sees_to_M, tanh_scale, exponent_scale,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, D_TAIL: tl.constexpr, D_TAIL_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    PAGE_SIZE: tl.constexpr, V_IN_K: tl.constexpr,
):  # fmt: skip
    """The state ``(acc, sum, max)`` after the key blocks from ``begin`` to ``end``; max is in units of log2."""
    D_MAIN: tl.constexpr = D - D_TAIL
    for block in tl.range(begin, end, BLOCK_N):
        block = tl.multiple_of(block, BLOCK_N)
        k_ND = _load_block(
            k, k_page_stride, k_stride_row, k_stride_head, kv_head, k_start, page_line, page_line_stride, block, key_from, key_to,
            D_MAIN, D_PADDED, BLOCK_N,
            # A descriptor's K may hold anything outside of the range: its scores are masked below.
            MASKED and not TMA, TMA, PAGE_SIZE,
        )  # fmt: skip
        score_MN = _dot(q_MD, tl.trans(k_ND), None)
        if D_TAIL:
            k_tail_ND = _load_block(
                k + D_MAIN, k_page_stride, k_stride_row, k_stride_head, kv_head, k_start, page_line, page_line_stride, block,
                key_from, key_to, D_TAIL, D_TAIL_PADDED, BLOCK_N, MASKED, False, PAGE_SIZE,
            )  # fmt: skip
            score_MN = _dot(q_tail_MD, tl.trans(k_tail_ND), score_MN)
        if SOFTCAP:
            score_MN = tanh(score_MN * tanh_scale)
        if MASKED:
            key_1N = (block + tl.arange(0, BLOCK_N))[None, :]
            visible_MN = key_1N < sees_to_M[:, None]
            if WINDOW:
                visible_MN = visible_MN & (key_1N >= sees_from_M[:, None])
            score_MN = tl.where(visible_MN, score_MN, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MN, 1) * exponent_scale)
        # A query that has seen nothing yet has maximum -inf; 0 in its place gives weights of exp2(-inf) = 0, not NaN.
        # In an unmasked block every query sees something, and the two are the same.
        base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M) if MASKED else new_max_M
        decay_M = tl.exp2(max_M - base_M)
        weight_MN = tl.exp2(tl.fma(score_MN, exponent_scale, -base_M[:, None]))
        sum_M = tl.fma(sum_M, decay_M, tl.sum(weight_MN, 1))
        if V_IN_K:
            # Values of other keys are 0 here, too, and K's columns after V's make columns of the result that are not stored.
            v_NV = k_ND
        else:
            v_NV = _load_block(
                v, v_page_stride, v_stride_row, v_stride_head, kv_head, k_start, page_line, page_line_stride, block, key_from, key_to,
                DV, DV_PADDED, BLOCK_N, MASKED, TMA, PAGE_SIZE,
            )  # fmt: skip
        acc_MV = _dot(weight_MN.to(v_NV.dtype), v_NV, acc_MV * decay_M[:, None])
        max_M = new_max_M
    return acc_MV, sum_M, max_M


@triton.jit
def _attention_kernel(
    q, k, v, out, lse, sinks, tiles, page_table,
    q_stride_row, q_stride_head, k_page_stride, k_stride_row, k_stride_head, v_page_stride, v_stride_row, v_stride_head,
    page_table_stride_request, page_table_stride_page, out_stride_row, out_stride_head, lse_stride_row, lse_stride_head,
    tanh_scale, exponent_scale, window,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, D_TAIL: tl.constexpr, D_TAIL_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_SIGN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, INTO: tl.constexpr, TMA: tl.constexpr,
    PAGE_SIZE: tl.constexpr, V_IN_K: tl.constexpr,
):  # fmt: skip
    """One program for each tile and head: of a run of tiles, which have the same keys, all for one head after another, so
    that they run side by side and share those keys in the L2 cache."""
    HEADS: tl.constexpr = NUM_HEADS // PACK
    run = tiles + (tl.program_id(0) // HEADS) * _FIELDS
    run_begin = tl.load(run + 6)
    run_tiles = tl.load(run + 7)
    # Fixed spans have tiles to spare.
    if run_tiles == 0:
        return
    in_run = tl.program_id(0) - run_begin * HEADS
    tile = tiles + (run_begin + in_run % run_tiles) * _FIELDS
    first_head = in_run // run_tiles * PACK
    kv_head = first_head // GROUP
    q_begin = tl.load(tile)
    q_count = tl.load(tile + 1)
    k_start = tl.load(tile + 2)
    k_len = tl.load(tile + 3)
    sees = tl.load(tile + 4)
    page_line = page_table
    if PAGE_SIZE:
        page_line += tl.load(tile + 5).to(tl.int64) * page_table_stride_request

    # Row r of the tile is query head r % PACK of token r // PACK.
    token_M = tl.arange(0, BLOCK_M) // PACK
    head_M = first_head + tl.arange(0, BLOCK_M) % PACK
    is_token_M = token_M < q_count
    sees_to_M = tl.minimum(sees + token_M, k_len)
    sees_from_M = sees + token_M - window

    # Keys that any query of the tile sees, and whole blocks of those that all of them see.
    last_sees = sees + q_count - 1
    key_to = tl.minimum(last_sees, k_len)
    all_to = tl.maximum(tl.minimum(sees, k_len), 0) // BLOCK_N * BLOCK_N
    key_from = 0
    begin = 0
    all_from = 0
    if WINDOW:
        key_from = tl.maximum(sees - window, 0)
        begin = key_from // BLOCK_N * BLOCK_N
        all_from = (tl.maximum(last_sees - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        all_to = tl.maximum(all_to, all_from)
    MAY_SKIP: tl.constexpr = INTO and not SINKS
    if MAY_SKIP:
        sees_nothing = key_to <= key_from
        if sees_nothing:
            return

    dim_1D = tl.arange(0, D_PADDED)[None, :]
    # Strides are a caller's: with a row or a head they make products of more than 32 bits.
    q_M1 = q + (q_begin.to(tl.int64) * q_stride_row + token_M.to(tl.int64) * q_stride_row + head_M.to(tl.int64) * q_stride_head)[:, None]
    q_MD = tl.load(
        q_M1 + dim_1D,
        mask=is_token_M[:, None] & (dim_1D < D), other=0.0,
    )  # fmt: skip
    if Q_SIGN != 1:
        q_MD = (q_MD.to(tl.float32) * Q_SIGN).to(q_MD.dtype)
    q_tail_MD = q_MD
    if D_TAIL:
        tail_1D = D - D_TAIL + tl.arange(0, D_TAIL_PADDED)[None, :]
        q_tail_MD = tl.load(
            q_M1 + tail_1D,
            mask=is_token_M[:, None] & (tail_1D < D), other=0.0,
        )  # fmt: skip
        if Q_SIGN != 1:
            q_tail_MD = (q_tail_MD.to(tl.float32) * Q_SIGN).to(q_tail_MD.dtype)

    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MV = tl.zeros([BLOCK_M, DV_PADDED], tl.float32)
    if WINDOW:
        acc_MV, sum_M, max_M = _attend(
            acc_MV, sum_M, max_M, q_MD, q_tail_MD, k, v, k_page_stride, k_stride_row, k_stride_head, v_page_stride, v_stride_row,
            v_stride_head, kv_head, k_start, page_line, page_table_stride_page,
            key_from, key_to, begin, tl.minimum(all_from, key_to), sees_from_M, sees_to_M, tanh_scale, exponent_scale,
            D, DV, D_PADDED, D_TAIL, D_TAIL_PADDED, DV_PADDED, BLOCK_N, True, WINDOW, SOFTCAP, TMA, PAGE_SIZE, V_IN_K,
        )  # fmt: skip
    acc_MV, sum_M, max_M = _attend(
        acc_MV, sum_M, max_M, q_MD, q_tail_MD, k, v, k_page_stride, k_stride_row, k_stride_head, v_page_stride, v_stride_row,
        v_stride_head, kv_head, k_start, page_line, page_table_stride_page,
        key_from, key_to, all_from, all_to, sees_from_M, sees_to_M, tanh_scale, exponent_scale,
        D, DV, D_PADDED, D_TAIL, D_TAIL_PADDED, DV_PADDED, BLOCK_N, False, WINDOW, SOFTCAP, TMA, PAGE_SIZE, V_IN_K,
    )  # fmt: skip
    acc_MV, sum_M, max_M = _attend(
        acc_MV, sum_M, max_M, q_MD, q_tail_MD, k, v, k_page_stride, k_stride_row, k_stride_head, v_page_stride, v_stride_row,
        v_stride_head, kv_head, k_start, page_line, page_table_stride_page,
        key_from, key_to, all_to, key_to, sees_from_M, sees_to_M, tanh_scale, exponent_scale,
        D, DV, D_PADDED, D_TAIL, D_TAIL_PADDED, DV_PADDED, BLOCK_N, True, WINDOW, SOFTCAP, TMA, PAGE_SIZE, V_IN_K,
    )  # fmt: skip

    if SINKS:
        # One more logit, added last, so that it takes part in the same way wherever the keys come from.
        sink_M = tl.load(sinks + head_M, mask=is_token_M, other=float("-inf")).to(tl.float32) * (1.0 / _LN_2)
        new_max_M = tl.maximum(max_M, sink_M)
        base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
        decay_M = tl.exp2(max_M - base_M)
        sum_M = tl.fma(sum_M, decay_M, tl.exp2(sink_M - base_M))
        acc_MV = acc_MV * decay_M[:, None]
        max_M = new_max_M
    # Without any logit the sum is 0 and the maximum -inf: 1 in the sum's place gives out 0 and LSE -inf.
    divisor_M = tl.where(sum_M == 0.0, 1.0, sum_M)
    result_MV = acc_MV * (1.0 / divisor_M)[:, None]
    lse_M = (max_M + tl.log2(divisor_M)) * _LN_2

    dim_1V = tl.arange(0, DV_PADDED)[None, :]
    out_tile = out + q_begin.to(tl.int64) * out_stride_row
    out_MV = out_tile + (token_M.to(tl.int64) * out_stride_row + head_M.to(tl.int64) * out_stride_head)[:, None] + dim_1V
    is_out_MV = is_token_M[:, None] & (dim_1V < DV)
    lse_tile = lse + q_begin.to(tl.int64) * lse_stride_row
    lse_at_M = lse_tile + token_M.to(tl.int64) * lse_stride_row + head_M.to(tl.int64) * lse_stride_head
    if INTO:
        old_lse_M = tl.load(lse_at_M, mask=is_token_M, other=float("-inf"))
        # Not tl.maximum, which drops NaN: an earlier result of NaN must not pass for one without keys.
        larger_M = tl.where(lse_M > old_lse_M, lse_M, old_lse_M)
        base_M = tl.where(larger_M == float("-inf"), 0.0, larger_M)
        # A query without keys here keeps its old result to the bit, also where that is the result of no keys.
        old_weight_M = tl.where(lse_M == float("-inf"), 1.0, tl.exp(old_lse_M - base_M))
        # A first result comes through to the bit as well; a contracted lse - base need not be 0.
        is_first_M = (old_lse_M == float("-inf")) & (lse_M > float("-inf"))
        weight_M = tl.where(is_first_M, 1.0, tl.exp(lse_M - base_M))
        total_M = old_weight_M + weight_M
        old_MV = tl.load(out_MV, mask=is_out_MV, other=0.0)
        result_MV = old_MV * (old_weight_M / total_M)[:, None] + result_MV * (weight_M / total_M)[:, None]
        lse_M = larger_M + tl.log(total_M)
    tl.store(out_MV, result_MV.to(out.dtype.element_ty), mask=is_out_MV)
    tl.store(lse_at_M, lse_M, mask=is_token_M)


_attention = Launcher(_attention_kernel)


def ragged_attention(
    q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype | None = None,
    into: tuple[Tensor, Tensor] | None = None, *, shapes: tuple[TileShape, ...] | None = None, packs: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attends all spans in one launch; the meaning is that of :class:`cpattn.attention.backend.AttentionFunction`.

    Args:
        q: ``[T, Hq, D]``, fp32, bf16 or fp16, the last axis contiguous.
        keys: of the same dtype. Where v is a view of k's first columns (multi-head latent attention: D = 576, Dv = 512),
            these are loaded once.
        spans: the work, on the same device.
        options: scale, window, softcap, sinks.
        out_dtype: of the result; q's by default.
        into: an earlier result ``(acc fp32 [T, Hq, Dv], lse fp32 [T, Hq])`` over other keys, into which this one is
            merged in place, in fp32; what has no keys here is left as it is. ``out_dtype`` then does not apply.
        shapes: tile shapes to choose from; by default those for this head dim, dtype and GPU.
        packs: query heads of one KV head that may share a tile, to choose from; by default 1 and as many as fit.

    Returns:
        ``(out [T, Hq, Dv], lse fp32 [T, Hq])``, or ``into``. Rows of q beyond the last query range are not written.
    """
    k, v, page_table, _, _ = keys
    if into is None:
        num_queries, num_heads, _ = q.shape
        out = q.new_empty((num_queries, num_heads, v.shape[-1]), dtype=out_dtype)
        lse = q.new_empty((num_queries, num_heads), dtype=torch.float32)
    else:
        out, lse = into
    sinks = options.sinks
    # All that decides the launch, beside the spans and the tensors' addresses; of these, what a descriptor can take, and
    # whether V is K's first columns.
    k_address, v_address = k.data_ptr(), v.data_ptr()
    key = (
        q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype, k_address == v_address,
        (k_address | v_address) % 16 == 0, q.data_ptr() % 16 == 0, out.stride(), out.dtype, lse.stride(), into is None,
        options.scale, options.window, options.softcap, None if sinks is None else sinks.dtype,
        None if page_table is None else (page_table.stride(), page_table.dtype), shapes, packs,
    )  # fmt: skip
    launch = spans.derive(key, _prepare, q, keys, spans, options, out, lse, into is not None, shapes, packs)
    tensors = (q, k, v, out, lse, lse if sinks is None else sinks, *(() if page_table is None else (page_table,)))
    if is_on_current_device(q):
        launch(*tensors)
    else:
        # Changing the device costs microseconds even if it is the current one.
        with torch.cuda.device_of(q):
            launch(*tensors)
    return out, lse


# Which of the tensors above the kernels' parameters are.
_TENSORS = {"q": 0, "q_pointer": 0, "k": 1, "v": 2, "out": 3, "lse": 4, "sinks": 5}
_PAGED_TENSORS = _TENSORS | {"page_table": 6}


def _prepare(
    q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out: Tensor, lse: Tensor, into: bool,
    shapes: tuple[TileShape, ...] | None, packs: tuple[int, ...] | None,
) -> LaunchFunction:  # fmt: skip
    """What launches the kernel over these spans, given the tensors alone."""
    k, v, page_table, _, _ = keys
    scale, window, softcap, sinks = options.scale, options.window, options.softcap, options.sinks
    num_heads, num_kv_heads = q.shape[1], k.shape[-2]
    head_dim, v_head_dim = q.shape[2], v.shape[-1]
    group = num_heads // num_kv_heads
    processors, capability = device_properties(q.device)
    dims = padded_dims(head_dim, v_head_dim)
    # V as K's first columns, where the two blocks in shared memory are of one size.
    v_in_k = v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and dims.d == dims.dv
    if shapes is None:
        shapes = tile_shapes(head_dim, v_head_dim, q.dtype, capability, specialized_kernel(q.device) is not None, v_in_k)
    if packs is None:
        packs = packs_for(group, shapes[0].block_m)
    launch = launch_for(spans, shapes, packs, num_heads, window, processors)
    if launch.num_tiles == 0:
        return launch_nothing

    shape = launch.shape
    page_size = keys.page_size
    specialized = None
    tma = shape.tma and fits_descriptor(k) and fits_descriptor(v)
    if shape.specialized and tma and page_size % PAGE_UNIT == 0:
        specialized = specialized_kernel(q.device)
    tma = tma and page_table is None
    warn_of_tile_file()
    if q.is_cuda:
        warn_if_slow(has_specialized(head_dim, v_head_dim, q.dtype, capability, page_size))
    # The running maximum is taken before scaling, which needs a positive scale: its sign goes into q. With a scale of
    # 0 all scores are 0, as they are with a q of 0.
    sign = (scale > 0) - (scale < 0)
    magnitude = abs(scale) or 1.0
    grid = launch.num_tiles * (num_heads // launch.pack)
    arguments: dict[str, Any] = {
        "out": out, "lse": lse, "sinks": lse if sinks is None else sinks, "tiles": launch.table,
        "page_table": launch.table if page_table is None else page_table,
        "q_stride_row": q.stride(0), "q_stride_head": q.stride(1),
        "page_table_stride_request": 0 if page_table is None else page_table.stride(0),
        "page_table_stride_page": 0 if page_table is None else page_table.stride(1),
        "out_stride_row": out.stride(0), "out_stride_head": out.stride(1),
        "lse_stride_row": lse.stride(0), "lse_stride_head": lse.stride(1),
        "tanh_scale": 1.0 if softcap is None else magnitude / softcap,
        "exponent_scale": _LOG2_E * (magnitude if softcap is None else softcap),
        "window": 0 if window is None else window,
        "NUM_HEADS": num_heads, "GROUP": group, "PACK": launch.pack,
        "D": head_dim, "DV": v_head_dim, "D_PADDED": dims.d, "DV_PADDED": dims.dv, "Q_SIGN": sign,
        "WINDOW": window is not None, "SOFTCAP": softcap is not None, "SINKS": sinks is not None, "INTO": into,
        "PAGE_SIZE": page_size,
    }  # fmt: skip
    tensors = _TENSORS if page_table is None else _PAGED_TENSORS
    if specialized is not None:
        launch_function: LaunchFunction = specialized.launch(launch, q, k, v, tensors=tensors, arguments=arguments)
        return launch_function
    return _attention.prepare(
        (grid, 1), {"num_warps": shape.num_warps, "num_stages": shape.num_stages}, tensors, q=q,
        k=_blocks(k, shape.block_n, dims.d) if tma else k,
        v=_blocks(v, shape.block_n, dims.dv) if tma else v,
        k_page_stride=k.stride(0), k_stride_row=k.stride(-3), k_stride_head=k.stride(-2),
        v_page_stride=v.stride(0), v_stride_row=v.stride(-3), v_stride_head=v.stride(-2),
        D_TAIL=dims.d_tail, D_TAIL_PADDED=dims.d_tail_padded, BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, TMA=tma,
        V_IN_K=v_in_k and not tma, **arguments,
    )  # fmt: skip


def specialized_kernel(device: torch.device) -> Any:
    """The module of the kernel for Hopper, or None where this GPU or this Triton can not run it."""
    if device_properties(device)[1] != (9, 0) or not HOPPER_KERNEL.is_open(device):
        return None
    # It takes a release of Triton that has Gluon.
    from cpattn.kernels import hopper_attention

    return hopper_attention


@lru_cache
def device_properties(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Multiprocessors and compute capability; the interpreter stands in for an SM90."""
    if device.type != "cuda":
        return 132, (9, 0)
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


def fits_descriptor(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can address x: 16-byte aligned, and not empty."""
    *strides, _ = x.stride()
    unit = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and not any(stride % unit for stride in strides) and x.numel() > 0


def _blocks(x_SHD: Tensor, block_n: int, padded: int) -> Blocks:
    """Blocks ``[1 head, block_n keys, padded]``; the unit axis leads, so that the compiler can drop it."""
    tokens, heads, dim = x_SHD.shape
    return Blocks(x_SHD, [heads, tokens, dim], [x_SHD.stride(1), x_SHD.stride(0), 1], (1, block_n, padded), TensorDescriptor)
