"""The attention kernel for Hopper, in Gluon: what :mod:`cpattn.kernels.ragged_attention` computes, with roles for the warps.

The arithmetic and its order are those of that kernel, and so are the bits of the result; what differs is who waits for
what. One warp brings key blocks into shared memory; two warpgroups own 64 rows of the tile each, so that one's products
run during the other's softmax. Within a warpgroup the scores of a block are computed beside the product of the weights
and values of the block before (FlashAttention-3, arXiv:2407.08608).

Suffixes: M rows of a warpgroup, N keys of a block, D and V the padded head dims.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cpattn.kernels.launch import Blocks, Launcher
from cpattn.kernels.ragged_attention import tanh
from cpattn.kernels.tiles import TILE_FIELDS, WARPGROUP_ROWS

_LN_2 = gl.constexpr(math.log(2.0))
_FIELDS = gl.constexpr(TILE_FIELDS)
_ROWS = gl.constexpr(WARPGROUP_ROWS)
# Of values that are copied past the tensor memory accelerator: keys and dims of one copy.
_COPY_KEYS = gl.constexpr(16)
_COPY_DIMS = gl.constexpr(64)
# Triton 3.6 has these under other names than later ones.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_CAN_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
_tanh = gluon.jit(tanh.fn)


@gluon.jit
def _load_tile(tiles, window, HEADS: gl.constexpr, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr):
    """The fields of the program's tile, the keys that any of its queries sees, and the start of the first block of those."""
    tile = tiles + (gl.program_id(0) // HEADS) * _FIELDS
    q_begin = gl.load(tile)
    q_count = gl.load(tile + 1)
    k_start = gl.load(tile + 2)
    k_len = gl.load(tile + 3)
    sees = gl.load(tile + 4)
    key_to = gl.minimum(sees + q_count - 1, k_len)
    key_from = 0
    begin = 0
    if WINDOW:
        key_from = gl.maximum(sees - window, 0)
        begin = key_from // BLOCK_N * BLOCK_N
    return q_begin, q_count, k_start, k_len, sees, key_from, key_to, begin


@gluon.jit
def _reinterpret(smem, COUNT: gl.constexpr, KEYS: gl.constexpr, LEADING: gl.constexpr):
    """Buffers of key blocks as ``COUNT`` parts ``[KEYS, _COPY_DIMS]``, with two unit axes before them if LEADING.

    In shared memory a block lies as columns of _COPY_DIMS, each of all its keys.
    """
    if LEADING:
        paged_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, KEYS, _COPY_DIMS], smem.dtype)
        if _CAN_REINTERPRET:
            parts = smem.reinterpret(smem.dtype, [COUNT, 1, 1, KEYS, _COPY_DIMS], paged_layout)
        else:
            parts = smem._reinterpret(smem.dtype, [COUNT, 1, 1, KEYS, _COPY_DIMS], paged_layout)
    else:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, _COPY_DIMS], smem.dtype)
        if _CAN_REINTERPRET:
            parts = smem.reinterpret(smem.dtype, [COUNT, KEYS, _COPY_DIMS], layout)
        else:
            parts = smem._reinterpret(smem.dtype, [COUNT, KEYS, _COPY_DIMS], layout)
    return parts


@gluon.jit
def _find(page_line, page_line_stride, key, key_from, key_to, KEYS: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The page of the keys ``key .. key + KEYS - 1`` and where in it they begin; instead of keys outside of the range, whose
    entries may be anything, those of the nearest inside."""
    key = gl.maximum(gl.minimum(key, key_to - 1), key_from) // KEYS * KEYS
    page = gl.load(page_line + (key // PAGE_SIZE).to(gl.int64) * page_line_stride)
    return page, key % PAGE_SIZE


@gluon.jit
def _load_pages(
    source, page_line, page_line_stride, kv_head, block, key_from, key_to, full, smem, stage,
    PADDED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PAGE_SIZE: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Brings a key block in parts of KEYS keys, which lie in one page each."""
    DOWN: gl.constexpr = BLOCK_N // KEYS
    ACROSS: gl.constexpr = PADDED // _COPY_DIMS
    parts = _reinterpret(smem, STAGES * DOWN * ACROSS, KEYS, True)
    for down in range(DOWN):
        page, in_page = _find(page_line, page_line_stride, block + down * KEYS, key_from, key_to, KEYS, PAGE_SIZE)
        for across in gl.static_range(ACROSS):
            part = parts.index((stage * ACROSS + across) * DOWN + down)
            _tma_load(source, [page.to(gl.int32), kv_head, in_page, across * _COPY_DIMS], full, part)


@gluon.jit
def _produce(
    k, v, v_pointer, v_page_stride8, v_stride_row8, v_stride_head8, tiles, page_table, page_table_stride_request, page_table_stride_page,
    window, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, DV: gl.constexpr, D_PADDED: gl.constexpr,
    DV_PADDED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr, PAGE_SIZE: gl.constexpr,
    PAGE_KEYS: gl.constexpr,
):  # fmt: skip
    """The warp that brings key blocks. Stage ``i % STAGES`` of the buffers holds the tile's block ``i``."""
    HEADS: gl.constexpr = NUM_HEADS // PACK
    K_BYTES: gl.constexpr = BLOCK_N * D_PADDED * k_smem.dtype.primitive_bitwidth // 8
    V_BYTES: gl.constexpr = BLOCK_N * DV_PADDED * v_smem.dtype.primitive_bitwidth // 8
    copies_down: gl.constexpr = BLOCK_N // _COPY_KEYS
    copies: gl.constexpr = copies_down * (DV_PADDED // _COPY_DIMS)
    copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    v_parts = _reinterpret(v_smem, STAGES * copies, _COPY_KEYS, False)

    _, _, k_start, _, _, key_from, key_to, begin = _load_tile(tiles, window, HEADS, BLOCK_N, WINDOW)
    kv_head = (gl.program_id(0) % HEADS) * PACK // GROUP
    page_line = page_table
    if PAGE_SIZE:
        page_line += gl.load(tiles + (gl.program_id(0) // HEADS) * _FIELDS + 5).to(gl.int64) * page_table_stride_request
    for i in range((key_to - begin + BLOCK_N - 1) // BLOCK_N):
        block = begin + i * BLOCK_N
        stage = i % STAGES
        was_emptied = (i // STAGES) & 1 ^ 1
        mbarrier.wait(k_empty.index(stage), was_emptied)
        mbarrier.expect(k_full.index(stage), K_BYTES)
        # K may hold anything outside of the range: its scores are masked.
        if PAGE_SIZE:
            _load_pages(k, page_line, page_table_stride_page, kv_head, block, key_from, key_to, k_full.index(stage), k_smem, stage,
                        D_PADDED, BLOCK_N, STAGES, PAGE_SIZE, PAGE_KEYS)  # fmt: skip
        else:
            _tma_load(k, [kv_head, k_start + block, 0], k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_empty.index(stage), was_emptied)
        if block >= key_from and block + BLOCK_N <= key_to:
            mbarrier.expect(v_full.index(stage), V_BYTES)
            if PAGE_SIZE:
                _load_pages(v, page_line, page_table_stride_page, kv_head, block, key_from, key_to, v_full.index(stage), v_smem, stage,
                            DV_PADDED, BLOCK_N, STAGES, PAGE_SIZE, PAGE_KEYS)  # fmt: skip
            else:
                _tma_load(v, [kv_head, k_start + block, 0], v_full.index(stage), v_smem.index(stage))
        else:
            # A weight of 0 times NaN is NaN: values outside of the range become 0.
            # In units of 8, so that the compiler sees that 16 bytes can be copied at a time.
            v_stride_row = v_stride_row8 * 8
            first = v_pointer + kv_head.to(gl.int64) * (v_stride_head8 * 8)
            if not PAGE_SIZE:
                first += (k_start + block).to(gl.int64) * v_stride_row
            for copy in range(copies):
                row = copy % copies_down * _COPY_KEYS + gl.arange(0, _COPY_KEYS, gl.SliceLayout(1, copy_layout))
                dim = copy // copies_down * _COPY_DIMS + gl.arange(0, _COPY_DIMS, gl.SliceLayout(0, copy_layout))
                valid = ((block + row >= key_from) & (block + row < key_to))[:, None] & (dim < DV)[None, :]
                pointers = first + row[:, None] * v_stride_row + dim[None, :]
                if PAGE_SIZE:
                    # All keys of a copy lie in one page.
                    page, in_page = _find(
                        page_line, page_table_stride_page, block + copy % copies_down * _COPY_KEYS, key_from, key_to, _COPY_KEYS, PAGE_SIZE
                    )
                    in_page_row = in_page - copy % copies_down * _COPY_KEYS
                    pointers += page.to(gl.int64) * (v_page_stride8 * 8) + in_page_row.to(gl.int64) * v_stride_row
                _copy(v_parts.index(stage * copies + copy), pointers, valid)
            async_copy.commit_group()
            async_copy.wait_group(0)
            fence_async_shared()
            mbarrier.arrive(v_full.index(stage), count=1)


@gluon.jit
def _softmax(
    score_MN, sum_M, max_M, block, sees_from_M, sees_to_M, tanh_scale, exponent_scale,
    BLOCK_N: gl.constexpr, MASKED: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The weights of a block, what the state before it decays by, and the new sum and maximum, as in the other kernel."""
    if SOFTCAP:
        score_MN = _tanh(score_MN * tanh_scale)
    if MASKED:
        # Compared with constants, as key numbers cost registers and instructions.
        key_1N = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))[None, :]
        visible_MN = key_1N < (sees_to_M - block)[:, None]
        if WINDOW:
            visible_MN = visible_MN & (key_1N >= (sees_from_M - block)[:, None])
        score_MN = gl.where(visible_MN, score_MN, float("-inf"))
    new_max_M = gl.maximum(max_M, gl.max(score_MN, 1) * exponent_scale)
    base_M = new_max_M
    if MASKED:
        base_M = gl.where(new_max_M == float("-inf"), 0.0, new_max_M)
    decay_M = gl.exp2(max_M - base_M)
    weight_MN = gl.exp2(gl.fma(score_MN, exponent_scale, -base_M[:, None]))
    sum_M = gl.fma(sum_M, decay_M, gl.sum(weight_MN, 1))
    return weight_MN, decay_M, sum_M, new_max_M


@gluon.jit
def _attend(
    acc_MV, weight_MN, sum_M, max_M, i, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, begin, end,
    sees_from_M, sees_to_M, tanh_scale, exponent_scale,
    D_PADDED: gl.constexpr, DV_PADDED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, S_LAYOUT: gl.constexpr, ACC_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The state after the key blocks from ``begin`` to ``end``, the tile's ``i``-th and on.

    ``weight_MN`` are the weights of the block before, which acc lacks.
    """
    acc_row: gl.constexpr = gl.SliceLayout(1, ACC_LAYOUT)
    unused = gl.zeros([_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    for block in range(begin, end, BLOCK_N):
        stage = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        k_DN = k_smem.index(stage).reshape([BLOCK_N, D_PADDED]).permute((1, 0))
        score_MN = warpgroup_mma(q_smem, k_DN, unused, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        v_NV = v_smem.index(before).reshape([BLOCK_N, DV_PADDED])
        acc_MV = warpgroup_mma(weight_MN, v_NV, acc_MV, is_async=True)

        score_MN = warpgroup_mma_wait(1, deps=[score_MN])
        mbarrier.arrive(k_empty.index(stage), count=1)
        new_weight_MN, decay_M, sum_M, max_M = _softmax(
            score_MN, sum_M, max_M, block, sees_from_M, sees_to_M, tanh_scale, exponent_scale, BLOCK_N, MASKED, WINDOW, SOFTCAP, S_LAYOUT
        )
        new_weight_MN = gl.convert_layout(new_weight_MN.to(v_smem.dtype), P_LAYOUT)
        # The compilers would wait for the product before the softmax. Two things keep them from it: the new weights as a
        # dependency of the wait, and the branch in another wait, for a barrier that is open.
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        acc_MV, weight_MN, new_weight_MN = warpgroup_mma_wait(0, deps=[acc_MV, weight_MN, new_weight_MN])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc_MV = acc_MV * gl.convert_layout(decay_M, acc_row)[:, None]
        weight_MN = new_weight_MN
        i += 1
    return acc_MV, weight_MN, sum_M, max_M, i


@gluon.jit
def _consume(
    q, out, lse, sinks, tiles, q_stride_row, q_stride_head, out_stride_row, out_stride_head, lse_stride_row, lse_stride_head,
    tanh_scale, exponent_scale, window, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    PART: gl.constexpr, NUM_HEADS: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    D_PADDED: gl.constexpr, DV_PADDED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_SIGN: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, INTO: gl.constexpr,
):  # fmt: skip
    """The warpgroup of the rows from ``PART * _ROWS`` on."""
    HEADS: gl.constexpr = NUM_HEADS // PACK
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV_PADDED, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D_PADDED, D_PADDED // 8], [4, 1], [1, 0])
    s_row: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    acc_row: gl.constexpr = gl.SliceLayout(1, ACC_LAYOUT)

    q_begin, q_count, _, k_len, sees, key_from, key_to, begin = _load_tile(tiles, window, HEADS, BLOCK_N, WINDOW)
    first_head = (gl.program_id(0) % HEADS) * PACK
    if q_count > PART * _ROWS // PACK:
        # Row r of the tile is query head r % PACK of token r // PACK.
        row = PART * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, q_layout))
        dim_1D = gl.arange(0, D_PADDED, gl.SliceLayout(0, q_layout))[None, :]
        q_tile = q + q_begin.to(gl.int64) * q_stride_row
        q_MD = gl.load(
            q_tile + (row // PACK * q_stride_row + (first_head + row % PACK) * q_stride_head)[:, None] + dim_1D,
            mask=(row // PACK < q_count)[:, None] & (dim_1D < D), other=0.0,
        )  # fmt: skip
        if Q_SIGN != 1:
            q_MD = (q_MD.to(gl.float32) * Q_SIGN).to(q_MD.dtype)
        q_smem.store(q_MD)
        fence_async_shared()

        token_M = (PART * _ROWS + gl.arange(0, _ROWS, s_row)) // PACK
        sees_to_M = gl.minimum(sees + token_M, k_len)
        sees_from_M = sees + token_M - window
        # Whole blocks of keys that all queries of the tile see.
        all_to = gl.maximum(gl.minimum(sees, k_len), 0) // BLOCK_N * BLOCK_N
        all_from = 0
        if WINDOW:
            all_from = (gl.maximum(sees + q_count - 1 - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
            all_to = gl.maximum(all_to, all_from)

        max_M = gl.full([_ROWS], float("-inf"), gl.float32, s_row)
        sum_M = gl.zeros([_ROWS], gl.float32, s_row)
        acc_MV = gl.zeros([_ROWS, DV_PADDED], gl.float32, ACC_LAYOUT)
        if key_to > begin:
            mbarrier.wait(k_full.index(0), 0)
            k_DN = k_smem.index(0).reshape([BLOCK_N, D_PADDED]).permute((1, 0))
            unused = gl.zeros([_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
            score_MN = warpgroup_mma(q_smem, k_DN, unused, use_acc=False, is_async=True)
            score_MN = warpgroup_mma_wait(0, deps=[score_MN])
            mbarrier.arrive(k_empty.index(0), count=1)
            # A mask changes nothing where all is visible.
            weight_MN, _decay_M, sum_M, max_M = _softmax(
                score_MN, sum_M, max_M, begin, sees_from_M, sees_to_M, tanh_scale, exponent_scale, BLOCK_N, True, WINDOW, SOFTCAP, S_LAYOUT
            )
            weight_MN = gl.convert_layout(weight_MN.to(v_smem.dtype), P_LAYOUT)
            i = 1
            second = begin + BLOCK_N
            if WINDOW:
                acc_MV, weight_MN, sum_M, max_M, i = _attend(
                    acc_MV, weight_MN, sum_M, max_M, i, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                    second, gl.minimum(all_from, key_to), sees_from_M, sees_to_M, tanh_scale, exponent_scale,
                    D_PADDED, DV_PADDED, BLOCK_N, STAGES, True, WINDOW, SOFTCAP, S_LAYOUT, ACC_LAYOUT, P_LAYOUT,
                )  # fmt: skip
            acc_MV, weight_MN, sum_M, max_M, i = _attend(
                acc_MV, weight_MN, sum_M, max_M, i, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                gl.maximum(all_from, second), all_to, sees_from_M, sees_to_M, tanh_scale, exponent_scale,
                D_PADDED, DV_PADDED, BLOCK_N, STAGES, False, WINDOW, SOFTCAP, S_LAYOUT, ACC_LAYOUT, P_LAYOUT,
            )  # fmt: skip
            acc_MV, weight_MN, sum_M, max_M, i = _attend(
                acc_MV, weight_MN, sum_M, max_M, i, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                gl.maximum(all_to, second), key_to, sees_from_M, sees_to_M, tanh_scale, exponent_scale,
                D_PADDED, DV_PADDED, BLOCK_N, STAGES, True, WINDOW, SOFTCAP, S_LAYOUT, ACC_LAYOUT, P_LAYOUT,
            )  # fmt: skip
            last = (i - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((i - 1) // STAGES) & 1)
            acc_MV = warpgroup_mma(weight_MN, v_smem.index(last).reshape([BLOCK_N, DV_PADDED]), acc_MV, is_async=True)
            acc_MV, weight_MN = warpgroup_mma_wait(0, deps=[acc_MV, weight_MN])

        max_M = gl.convert_layout(max_M, acc_row)
        sum_M = gl.convert_layout(sum_M, acc_row)
        row_M = PART * _ROWS + gl.arange(0, _ROWS, acc_row)
        token_M = row_M // PACK
        head_M = first_head + row_M % PACK
        is_token_M = token_M < q_count
        if SINKS:
            sink_M = gl.load(sinks + head_M, mask=is_token_M, other=float("-inf")).to(gl.float32) * (1.0 / _LN_2)
            new_max_M = gl.maximum(max_M, sink_M)
            base_M = gl.where(new_max_M == float("-inf"), 0.0, new_max_M)
            decay_M = gl.exp2(max_M - base_M)
            sum_M = gl.fma(sum_M, decay_M, gl.exp2(sink_M - base_M))
            acc_MV = acc_MV * decay_M[:, None]
            max_M = new_max_M
        divisor_M = gl.where(sum_M == 0.0, 1.0, sum_M)
        result_MV = acc_MV * (1.0 / divisor_M)[:, None]
        lse_M = (max_M + gl.log2(divisor_M)) * _LN_2

        dim_1V = gl.arange(0, DV_PADDED, gl.SliceLayout(0, ACC_LAYOUT))[None, :]
        out_tile = out + q_begin.to(gl.int64) * out_stride_row
        out_MV = out_tile + (token_M * out_stride_row + head_M * out_stride_head)[:, None] + dim_1V
        lse_tile = lse + q_begin.to(gl.int64) * lse_stride_row + token_M * lse_stride_row + head_M * lse_stride_head
        if INTO:
            if not SINKS:
                is_token_M = is_token_M & (key_to > key_from)
            old_lse_M = gl.load(lse_tile, mask=is_token_M, other=float("-inf"))
            larger_M = gl.maximum(old_lse_M, lse_M)
            base_M = gl.where(larger_M == float("-inf"), 0.0, larger_M)
            old_weight_M = gl.where(lse_M == float("-inf"), 1.0, gl.exp(old_lse_M - base_M))
            is_first_M = (old_lse_M == float("-inf")) & (lse_M > float("-inf"))
            weight_M = gl.where(is_first_M, 1.0, gl.exp(lse_M - base_M))
            total_M = old_weight_M + weight_M
            old_MV = gl.load(out_MV, mask=is_token_M[:, None] & (dim_1V < DV), other=0.0)
            result_MV = old_MV * (old_weight_M / total_M)[:, None] + result_MV * (weight_M / total_M)[:, None]
            lse_M = larger_M + gl.log(total_M)
        gl.store(out_MV, result_MV.to(out.dtype.element_ty), mask=is_token_M[:, None] & (dim_1V < DV))
        gl.store(lse_tile, lse_M, mask=is_token_M)
    else:
        # All of these rows are beyond the tile's end: only the buffers go back to the producer.
        for i in range((key_to - begin + BLOCK_N - 1) // BLOCK_N):
            stage = i % STAGES
            mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
            mbarrier.arrive(v_empty.index(stage), count=1)


@gluon.jit(do_not_specialize=["window"])
def _attention_kernel(
    q, k, v, v_pointer, out, lse, sinks, tiles, page_table, page_table_stride_request, page_table_stride_page,
    q_stride_row, q_stride_head, v_page_stride8, v_stride_row8, v_stride_head8,
    out_stride_row, out_stride_head, lse_stride_row, lse_stride_head,
    tanh_scale, exponent_scale, window,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, D_PADDED: gl.constexpr, DV_PADDED: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_SIGN: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, INTO: gl.constexpr, PAGE_SIZE: gl.constexpr,
    PAGE_KEYS: gl.constexpr,
):  # fmt: skip
    """Program ``tile * heads + head``, as in the other kernel."""
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, D_PADDED], k.dtype)
    q_smem = gl.allocate_shared_memory(k.dtype, [2, _ROWS, D_PADDED], q_layout)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK_N, D_PADDED], k.dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK_N, DV_PADDED], v.dtype)
    k_smem = gl.allocate_shared_memory(k.dtype, [STAGES, 1, BLOCK_N, D_PADDED], k_layout)
    v_smem = gl.allocate_shared_memory(v.dtype, [STAGES, 1, BLOCK_N, DV_PADDED], v_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    # Fixed rows have tiles to spare.
    if gl.load(tiles + (gl.program_id(0) // (NUM_HEADS // PACK)) * _FIELDS + 1) > 0:
        # A multiprocessor has 512 registers for each of a warpgroup's threads: two times 240, and 24 for the producer.
        gl.warp_specialize(
            [
                (_consume, (
                    q, out, lse, sinks, tiles, q_stride_row, q_stride_head, out_stride_row, out_stride_head, lse_stride_row,
                    lse_stride_head, tanh_scale, exponent_scale, window, q_smem.index(0), k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                    0, NUM_HEADS, PACK, D, DV, D_PADDED, DV_PADDED, BLOCK_N, STAGES, Q_SIGN, WINDOW, SOFTCAP, SINKS, INTO,
                )),
                (_consume, (
                    q, out, lse, sinks, tiles, q_stride_row, q_stride_head, out_stride_row, out_stride_head, lse_stride_row,
                    lse_stride_head, tanh_scale, exponent_scale, window, q_smem.index(1), k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                    1, NUM_HEADS, PACK, D, DV, D_PADDED, DV_PADDED, BLOCK_N, STAGES, Q_SIGN, WINDOW, SOFTCAP, SINKS, INTO,
                )),
                (_produce, (
                    k, v, v_pointer, v_page_stride8, v_stride_row8, v_stride_head8, tiles, page_table, page_table_stride_request,
                    page_table_stride_page, window, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                    NUM_HEADS, GROUP, PACK, DV, D_PADDED, DV_PADDED, BLOCK_N, STAGES, WINDOW, PAGE_SIZE, PAGE_KEYS,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


_attention = Launcher(_attention_kernel)


def launch(grid: int, k: Tensor, v: Tensor, *, arguments: dict[str, Any], block_n: int, num_stages: int) -> None:
    """Launches ``grid`` programs; ``arguments`` are those that the other kernel has as well.

    k and v must suit a tensor descriptor, their head dims be multiples of 8, and pages multiples of
    :data:`cpattn.kernels.ragged_attention.PAGE_UNIT`.
    """
    k_padded, v_padded = arguments["D_PADDED"], arguments["DV_PADDED"]
    # As many keys of a block as lie in one page for certain.
    page_size = arguments["PAGE_SIZE"]
    page_keys = min(block_n, page_size & -page_size)
    _attention(
        (grid, 1), {"num_warps": 4}, k=_blocks(k, block_n, k_padded, page_keys), v=_blocks(v, block_n, v_padded, page_keys), v_pointer=v,
        v_page_stride8=v.stride(0) // 8, v_stride_row8=v.stride(-3) // 8, v_stride_head8=v.stride(-2) // 8,
        BLOCK_N=block_n, STAGES=num_stages, PAGE_KEYS=page_keys, **arguments,
    )  # fmt: skip


def _blocks(x: Tensor, block_n: int, padded: int, page_keys: int) -> Blocks:
    """As in the other kernel; or of pages, with blocks ``[1 page, 1 head, page_keys, _COPY_DIMS]``."""
    *pages, tokens, heads, dim = x.shape
    *page_stride, stride_row, stride_head, _ = x.stride()
    block = (1, 1, page_keys, _COPY_DIMS.value) if pages else (1, block_n, padded)
    return Blocks(x, [*pages, heads, tokens, dim], [*page_stride, stride_head, stride_row, 1], block, _descriptor)


def _descriptor(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(x, shape, strides, block, layout)
