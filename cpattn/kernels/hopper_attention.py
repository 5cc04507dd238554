"""The attention kernel for Hopper, in Gluon: what :mod:`cpattn.kernels.ragged_attention` computes, with roles for the warps.

The arithmetic and its order are those of that kernel, and so are the bits of the result; what differs is who waits for
what. One warp brings queries and key blocks into shared memory; two warpgroups own 64 rows of the tile each, so that one's
products run during the other's softmax. Within a warpgroup the scores of a block are computed beside the product of the
weights and values of the block before (FlashAttention-3, arXiv:2407.08608). A program has a multiprocessor to itself. It
computes one item after another, so that the next one's keys are on their way while a result is written, and draws them
from a queue, so that all are busy to the end and items that share keys run side by side. In long launches it ends after a
while and gives way.

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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cpattn.kernels.arguments import Blocks
from cpattn.kernels.launch import Launcher, LaunchFunction
from cpattn.kernels.ragged_attention import fits_descriptor, tanh
from cpattn.kernels.tiles import TILE_FIELDS, WARPGROUP_ROWS, Launch
from cpattn.kernels.work_queue import counter_for_launch

_LN_2 = gl.constexpr(math.log(2.0))
_FIELDS = gl.constexpr(TILE_FIELDS)
_ROWS = gl.constexpr(WARPGROUP_ROWS)
# Keys and dims of a part of a key block, by which pages are loaded and keys outside of the range cleared.
_PART_KEYS = gl.constexpr(16)
_PART_DIMS = gl.constexpr(64)
# Triton 3.6 has these under other names than later ones.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_CAN_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
_tanh = gluon.jit(tanh.fn)


@gluon.jit
def _load_run(tiles, number, HEADS: gl.constexpr):
    """The run of tiles that the ``number``-th item in the queue's order belongs to: its first tile, and how many it has."""
    tile = tiles + (number // HEADS) * _FIELDS
    return gl.load(tile + 6), gl.load(tile + 7)


@gluon.jit
def _find_item(number, run_begin, run_tiles, HEADS: gl.constexpr):
    """The ``number``-th item as ``tile * HEADS + head``. A run's tiles have the same keys: they come one after another for
    each head, so that those keys are read from memory once."""
    in_run = number - run_begin * HEADS
    return (run_begin + in_run % run_tiles) * HEADS + in_run // run_tiles


@gluon.jit
def _load_tile(tiles, item, HEADS: gl.constexpr):
    """The fields of an item's tile, but for the request."""
    tile = tiles + (item // HEADS) * _FIELDS
    return gl.load(tile), gl.load(tile + 1), gl.load(tile + 2), gl.load(tile + 3), gl.load(tile + 4)


@gluon.jit
def _keys_of(q_count, k_len, sees, window, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr):
    """The keys that any of a tile's queries sees, and the start of the first block of those."""
    key_to = gl.minimum(sees + q_count - 1, k_len)
    key_from = 0
    begin = 0
    if WINDOW:
        key_from = gl.maximum(sees - window, 0)
        begin = key_from // BLOCK_N * BLOCK_N
        # Without a key no block is visited, as a page table need not have an entry for it.
        key_to = gl.where(key_to > key_from, key_to, begin)
    return key_from, key_to, begin


@gluon.jit
def _reinterpret(smem, COUNT: gl.constexpr, KEYS: gl.constexpr, LEADING: gl.constexpr):
    """Buffers of key blocks as ``COUNT`` parts ``[KEYS, _PART_DIMS]``, with two unit axes before them if LEADING.

    In shared memory a block lies as columns of _PART_DIMS, each of all its keys.
    """
    if LEADING:
        paged_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, KEYS, _PART_DIMS], smem.dtype)
        if _CAN_REINTERPRET:
            parts = smem.reinterpret(smem.dtype, [COUNT, 1, 1, KEYS, _PART_DIMS], paged_layout)
        else:
            parts = smem._reinterpret(smem.dtype, [COUNT, 1, 1, KEYS, _PART_DIMS], paged_layout)
    else:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, _PART_DIMS], smem.dtype)
        if _CAN_REINTERPRET:
            parts = smem.reinterpret(smem.dtype, [COUNT, KEYS, _PART_DIMS], layout)
        else:
            parts = smem._reinterpret(smem.dtype, [COUNT, KEYS, _PART_DIMS], layout)
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
    ACROSS: gl.constexpr = PADDED // _PART_DIMS
    parts = _reinterpret(smem, STAGES * DOWN * ACROSS, KEYS, True)
    for down in range(DOWN):
        page, in_page = _find(page_line, page_line_stride, block + down * KEYS, key_from, key_to, KEYS, PAGE_SIZE)
        for across in gl.static_range(ACROSS):
            part = parts.index((stage * ACROSS + across) * DOWN + down)
            _tma_load(source, [page.to(gl.int32), kv_head, in_page, across * _PART_DIMS], full, part)


@gluon.jit
def _draw(counter, draws):
    """The number of the next item in the queue, in the first of 32 places: so that no thread waits for it until
    :func:`_drawn` asks for it."""
    place = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    return gl.atomic_add(counter + place * 0, place * 0 + 1, mask=(place == 0) & draws, sem="relaxed")


@gluon.jit
def _drawn(places, draws, num_items):
    """The number that was drawn; ``num_items``, of which there is no item, if none was."""
    place = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    return gl.where(draws, gl.max(gl.where(place == 0, places, 0), 0), num_items)


@gluon.jit
def _put_item(item_smem, item_full, item_empty, n, item):
    """Tells the warpgroups the program's ``n``-th item; -1 if there is none."""
    slot = n % 2
    mbarrier.wait(item_empty.index(slot), n // 2 & 1 ^ 1)
    item_smem.index(slot).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + item)
    mbarrier.arrive(item_full.index(slot), count=1)


@gluon.jit
def _next_item(tiles, item_smem, item_full, item_empty, n, HEADS: gl.constexpr):
    """The program's ``n``-th item, and what a warpgroup has to know of its tile; -1 if there is none."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = n % 2
    mbarrier.wait(item_full.index(slot), n // 2 & 1)
    item = gl.max(item_smem.index(slot).load(layout), 0)
    mbarrier.arrive(item_empty.index(slot), count=1)
    q_begin, q_count, _, k_len, sees = _load_tile(tiles, gl.maximum(item, 0), HEADS)
    return item, q_begin, q_count, k_len, sees


@gluon.jit
def _clear(
    v_smem, stage, block, key_from, key_to, v_edge, edges, v_full, DV_PADDED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Puts 0 in the place of a block's values outside of the key range, once they have come: a weight of 0 times NaN is NaN."""
    DOWN: gl.constexpr = BLOCK_N // _PART_KEYS
    ACROSS: gl.constexpr = DV_PADDED // _PART_DIMS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    parts = _reinterpret(v_smem, STAGES * DOWN * ACROSS, _PART_KEYS, False)
    mbarrier.wait(v_edge, edges & 1)
    for down in range(DOWN):
        first = block + down * _PART_KEYS
        if first < key_from or first + _PART_KEYS > key_to:
            key = first + gl.arange(0, _PART_KEYS, gl.SliceLayout(1, layout))
            inside = ((key >= key_from) & (key < key_to))[:, None]
            for across in gl.static_range(ACROSS):
                part = parts.index((stage * ACROSS + across) * DOWN + down)
                values = part.load(layout)
                part.store(gl.where(inside, values, gl.zeros_like(values)))
    fence_async_shared()
    mbarrier.arrive(v_full.index(stage), count=1)


@gluon.jit
def _bring(
    block, begin, i, q_loads0, q_loads1, edges, q, k, v, q_begin, q_count, k_start, first_head, kv_head, page_line, page_line_stride,
    key_from, key_to, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, v_edge,
    PACK: gl.constexpr, D_PADDED: gl.constexpr, DV_PADDED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    Q_TMA: gl.constexpr, WINDOW: gl.constexpr, PAGE_SIZE: gl.constexpr, PAGE_KEYS: gl.constexpr,
):  # fmt: skip
    """Brings one key block, the program's ``i``-th, and with an item's first one the queries; values that have to be cleared
    come with ``v_edge``. Returns the new counts of what has been brought."""
    Q_BYTES: gl.constexpr = _ROWS * D_PADDED * k_smem.dtype.primitive_bitwidth // 8
    K_BYTES: gl.constexpr = BLOCK_N * D_PADDED * k_smem.dtype.primitive_bitwidth // 8
    V_BYTES: gl.constexpr = BLOCK_N * DV_PADDED * v_smem.dtype.primitive_bitwidth // 8
    stage = i % STAGES
    was_emptied = (i // STAGES) & 1 ^ 1
    mbarrier.wait(k_empty.index(stage), was_emptied)
    mbarrier.expect(k_full.index(stage), K_BYTES)
    # K may hold anything outside of the range: its scores are masked.
    if PAGE_SIZE:
        _load_pages(k, page_line, page_line_stride, kv_head, block, key_from, key_to, k_full.index(stage), k_smem, stage,
                    D_PADDED, BLOCK_N, STAGES, PAGE_SIZE, PAGE_KEYS)  # fmt: skip
    else:
        _tma_load(k, [kv_head, k_start + block, 0], k_full.index(stage), k_smem.index(stage))
    if Q_TMA:  # noqa: SIM102, as this one is for the compiler
        # After the first keys, which need not wait until the warpgroups are done with the last queries. Rows after the
        # tile's end are others' queries, or 0: what they give is not written.
        if block == begin:
            mbarrier.wait(q_empty.index(0), q_loads0 & 1 ^ 1)
            mbarrier.expect(q_full.index(0), Q_BYTES)
            _tma_load(q, [q_begin, first_head, 0], q_full.index(0), q_smem.index(0))
            q_loads0 += 1
            if q_count > _ROWS // PACK:
                mbarrier.wait(q_empty.index(1), q_loads1 & 1 ^ 1)
                mbarrier.expect(q_full.index(1), Q_BYTES)
                _tma_load(q, [q_begin + _ROWS // PACK, first_head, 0], q_full.index(1), q_smem.index(1))
                q_loads1 += 1
    mbarrier.wait(v_empty.index(stage), was_emptied)
    is_edge = block < key_from or block + BLOCK_N > key_to
    if is_edge:
        mbarrier.expect(v_edge, V_BYTES)
        if PAGE_SIZE:
            _load_pages(v, page_line, page_line_stride, kv_head, block, key_from, key_to, v_edge, v_smem, stage,
                        DV_PADDED, BLOCK_N, STAGES, PAGE_SIZE, PAGE_KEYS)  # fmt: skip
        else:
            _tma_load(v, [kv_head, k_start + block, 0], v_edge, v_smem.index(stage))
    else:
        mbarrier.expect(v_full.index(stage), V_BYTES)
        if PAGE_SIZE:
            _load_pages(v, page_line, page_line_stride, kv_head, block, key_from, key_to, v_full.index(stage), v_smem, stage,
                        DV_PADDED, BLOCK_N, STAGES, PAGE_SIZE, PAGE_KEYS)  # fmt: skip
        else:
            _tma_load(v, [kv_head, k_start + block, 0], v_full.index(stage), v_smem.index(stage))
    if WINDOW:  # noqa: SIM102
        # The last block is cleared later, when the next item is known.
        if is_edge and block + BLOCK_N < key_to:
            _clear(v_smem, stage, block, key_from, key_to, v_edge, edges, v_full, DV_PADDED, BLOCK_N, STAGES)
            edges += 1
    return i + 1, q_loads0, q_loads1, edges


@gluon.jit
def _produce(
    q, k, v, tiles, page_table, page_table_stride_request, page_table_stride_page, window, limits, counter,
    item_smem, item_full, item_empty, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, v_edge,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, D_PADDED: gl.constexpr,
    DV_PADDED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_TMA: gl.constexpr, WINDOW: gl.constexpr,
    PAGE_SIZE: gl.constexpr, PAGE_KEYS: gl.constexpr,
):  # fmt: skip
    """The warp that draws items, and brings their queries and key blocks. Stage ``i % STAGES`` of the buffers holds the
    program's ``i``-th block.

    An item is drawn when the one before has three blocks to go: late, so that no program keeps one from another that would
    be sooner, but early enough for three reads of memory that follow from each other: the number, the run, the tile.
    Where there is a program for each item there is no queue: those reads would come before the first keys.
    So the last blocks are written out: draw, the last but one, find the run, the last, load the tile, and only then clear
    the last block's values, which takes as long as that load.
    """
    HEADS: gl.constexpr = NUM_HEADS // PACK
    # What has been put into the buffers: items, blocks, queries of both warpgroups, blocks with values to clear.
    n = 0
    i = 0
    q_loads0 = 0
    q_loads1 = 0
    edges = 0
    # Fixed spans have tiles to spare.
    num_items = gl.load(limits) * HEADS
    quota = gl.load(limits + 1)
    has_queue = num_items > gl.num_programs(0)
    number = gl.program_id(0)
    item = number
    q_begin, q_count, k_start, k_len, sees = _load_tile(tiles, item, HEADS)
    if has_queue:
        number = _drawn(_draw(counter, True), True, num_items)
        run_begin, run_tiles = _load_run(tiles, gl.minimum(number, num_items - 1), HEADS)
        item = _find_item(gl.minimum(number, num_items - 1), run_begin, run_tiles, HEADS)
        q_begin, q_count, k_start, k_len, sees = _load_tile(tiles, item, HEADS)
    while number < num_items:
        _put_item(item_smem, item_full, item_empty, n, item)
        n += 1
        key_from, key_to, begin = _keys_of(q_count, k_len, sees, window, BLOCK_N, WINDOW)
        first_head = item % HEADS * PACK
        kv_head = first_head // GROUP
        page_line = page_table
        if PAGE_SIZE:
            page_line += gl.load(tiles + (item // HEADS) * _FIELDS + 5).to(gl.int64) * page_table_stride_request
        last = begin + gl.maximum(key_to - begin - 1, 0) // BLOCK_N * BLOCK_N
        for block in range(begin, last - BLOCK_N, BLOCK_N):
            i, q_loads0, q_loads1, edges = _bring(
                block, begin, i, q_loads0, q_loads1, edges, q, k, v, q_begin, q_count, k_start, first_head, kv_head, page_line,
                page_table_stride_page, key_from, key_to, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                v_edge, PACK, D_PADDED, DV_PADDED, BLOCK_N, STAGES, Q_TMA, WINDOW, PAGE_SIZE, PAGE_KEYS,
            )  # fmt: skip
        draws = has_queue & (n < quota)
        places = _draw(counter, draws)
        for block in range(gl.maximum(begin, last - BLOCK_N), last, BLOCK_N):
            i, q_loads0, q_loads1, edges = _bring(
                block, begin, i, q_loads0, q_loads1, edges, q, k, v, q_begin, q_count, k_start, first_head, kv_head, page_line,
                page_table_stride_page, key_from, key_to, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                v_edge, PACK, D_PADDED, DV_PADDED, BLOCK_N, STAGES, Q_TMA, WINDOW, PAGE_SIZE, PAGE_KEYS,
            )  # fmt: skip
        number = _drawn(places, draws, num_items)
        run_begin, run_tiles = _load_run(tiles, gl.minimum(number, num_items - 1), HEADS)
        for block in range(last, key_to, BLOCK_N):
            i, q_loads0, q_loads1, edges = _bring(
                block, begin, i, q_loads0, q_loads1, edges, q, k, v, q_begin, q_count, k_start, first_head, kv_head, page_line,
                page_table_stride_page, key_from, key_to, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                v_edge, PACK, D_PADDED, DV_PADDED, BLOCK_N, STAGES, Q_TMA, WINDOW, PAGE_SIZE, PAGE_KEYS,
            )  # fmt: skip
        item = _find_item(gl.minimum(number, num_items - 1), run_begin, run_tiles, HEADS)
        q_begin, q_count, k_start, k_len, sees = _load_tile(tiles, item, HEADS)
        if last < key_to and (last < key_from or last + BLOCK_N > key_to):
            _clear(v_smem, (i - 1) % STAGES, last, key_from, key_to, v_edge, edges, v_full, DV_PADDED, BLOCK_N, STAGES)
            edges += 1
    _put_item(item_smem, item_full, item_empty, n, -1)
    # The last program to end leaves the counters as they were.
    if has_queue:  # noqa: SIM102, as the other must not be asked without it
        if gl.atomic_add(counter + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:
            gl.store(counter, 0)
            gl.store(counter + 1, 0)


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
def _attend_all(
    q, q_stride_row, q_stride_head, tanh_scale, exponent_scale, window, q_begin, q_count, k_len, sees, first_head, i, q_loads,
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    PART: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, D_PADDED: gl.constexpr, DV_PADDED: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_SIGN: gl.constexpr, Q_TMA: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """The state after all of an item's key blocks; and how many key blocks and queries have been taken from the buffers."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV_PADDED, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D_PADDED, D_PADDED // 8], [4, 1], [1, 0])
    s_row: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)

    q_MD_smem = q_smem.index(PART).reshape([_ROWS, D_PADDED])
    _, key_to, begin = _keys_of(q_count, k_len, sees, window, BLOCK_N, WINDOW)
    # Row r of the tile is query head r % PACK of token r // PACK.
    if not Q_TMA:
        row = PART * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, q_layout))
        dim_1D = gl.arange(0, D_PADDED, gl.SliceLayout(0, q_layout))[None, :]
        # As below, in 64 bits.
        q_row = q_begin.to(gl.int64) + row // PACK
        q_head = (first_head + row % PACK).to(gl.int64)
        q_MD = gl.load(
            q + (q_row * q_stride_row + q_head * q_stride_head)[:, None] + dim_1D,
            mask=(row // PACK < q_count)[:, None] & (dim_1D < D), other=0.0,
        )  # fmt: skip
        if Q_SIGN != 1:
            q_MD = (q_MD.to(gl.float32) * Q_SIGN).to(q_MD.dtype)
        q_MD_smem.store(q_MD)
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
        if Q_TMA:
            mbarrier.wait(q_full.index(PART), q_loads & 1)
        stage = i % STAGES
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        k_DN = k_smem.index(stage).reshape([BLOCK_N, D_PADDED]).permute((1, 0))
        unused = gl.zeros([_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
        score_MN = warpgroup_mma(q_MD_smem, k_DN, unused, use_acc=False, is_async=True)
        score_MN = warpgroup_mma_wait(0, deps=[score_MN])
        mbarrier.arrive(k_empty.index(stage), count=1)
        # A mask changes nothing where all is visible.
        weight_MN, _decay_M, sum_M, max_M = _softmax(
            score_MN, sum_M, max_M, begin, sees_from_M, sees_to_M, tanh_scale, exponent_scale, BLOCK_N, True, WINDOW, SOFTCAP, S_LAYOUT
        )
        weight_MN = gl.convert_layout(weight_MN.to(v_smem.dtype), P_LAYOUT)
        i += 1
        second = begin + BLOCK_N
        if WINDOW:
            acc_MV, weight_MN, sum_M, max_M, i = _attend(
                acc_MV, weight_MN, sum_M, max_M, i, q_MD_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                second, gl.minimum(all_from, key_to), sees_from_M, sees_to_M, tanh_scale, exponent_scale,
                D_PADDED, DV_PADDED, BLOCK_N, STAGES, True, WINDOW, SOFTCAP, S_LAYOUT, ACC_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        acc_MV, weight_MN, sum_M, max_M, i = _attend(
            acc_MV, weight_MN, sum_M, max_M, i, q_MD_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
            gl.maximum(all_from, second), all_to, sees_from_M, sees_to_M, tanh_scale, exponent_scale,
            D_PADDED, DV_PADDED, BLOCK_N, STAGES, False, WINDOW, SOFTCAP, S_LAYOUT, ACC_LAYOUT, P_LAYOUT,
        )  # fmt: skip
        acc_MV, weight_MN, sum_M, max_M, i = _attend(
            acc_MV, weight_MN, sum_M, max_M, i, q_MD_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
            gl.maximum(all_to, second), key_to, sees_from_M, sees_to_M, tanh_scale, exponent_scale,
            D_PADDED, DV_PADDED, BLOCK_N, STAGES, True, WINDOW, SOFTCAP, S_LAYOUT, ACC_LAYOUT, P_LAYOUT,
        )  # fmt: skip
        if Q_TMA:
            mbarrier.arrive(q_empty.index(PART), count=1)
            q_loads += 1
        last = (i - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((i - 1) // STAGES) & 1)
        acc_MV = warpgroup_mma(weight_MN, v_smem.index(last).reshape([BLOCK_N, DV_PADDED]), acc_MV, is_async=True)
        acc_MV, weight_MN = warpgroup_mma_wait(0, deps=[acc_MV, weight_MN])
        mbarrier.arrive(v_empty.index(last), count=1)
    return acc_MV, sum_M, max_M, i, q_loads


@gluon.jit
def _write(
    acc_MV, sum_M, max_M, out, lse, sinks, out_stride_row, out_stride_head, lse_stride_row, lse_stride_head,
    window, q_begin, q_count, k_len, sees, first_head,
    PART: gl.constexpr, PACK: gl.constexpr, DV: gl.constexpr, DV_PADDED: gl.constexpr, BLOCK_N: gl.constexpr,
    WINDOW: gl.constexpr, SINKS: gl.constexpr, INTO: gl.constexpr,
):  # fmt: skip
    """Writes the result of an item, or merges it into what is there, as the other kernel does."""
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV_PADDED, 16])
    acc_row: gl.constexpr = gl.SliceLayout(1, ACC_LAYOUT)
    key_from, key_to, _ = _keys_of(q_count, k_len, sees, window, BLOCK_N, WINDOW)
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
    # Strides are a caller's: with a row or a head they make products of more than 32 bits.
    out_row_M = q_begin.to(gl.int64) + token_M
    out_head_M = head_M.to(gl.int64)
    out_MV = out + (out_row_M * out_stride_row + out_head_M * out_stride_head)[:, None] + dim_1V
    lse_at_M = lse + out_row_M * lse_stride_row + out_head_M * lse_stride_head
    if INTO:
        if not SINKS:
            is_token_M = is_token_M & (key_to > key_from)
        old_lse_M = gl.load(lse_at_M, mask=is_token_M, other=float("-inf"))
        # Not gl.maximum, which drops NaN: an earlier result of NaN must not pass for one without keys.
        larger_M = gl.where(lse_M > old_lse_M, lse_M, old_lse_M)
        base_M = gl.where(larger_M == float("-inf"), 0.0, larger_M)
        old_weight_M = gl.where(lse_M == float("-inf"), 1.0, gl.exp(old_lse_M - base_M))
        is_first_M = (old_lse_M == float("-inf")) & (lse_M > float("-inf"))
        weight_M = gl.where(is_first_M, 1.0, gl.exp(lse_M - base_M))
        total_M = old_weight_M + weight_M
        old_MV = gl.load(out_MV, mask=is_token_M[:, None] & (dim_1V < DV), other=0.0)
        result_MV = old_MV * (old_weight_M / total_M)[:, None] + result_MV * (weight_M / total_M)[:, None]
        lse_M = larger_M + gl.log(total_M)
    gl.store(out_MV, result_MV.to(out.dtype.element_ty), mask=is_token_M[:, None] & (dim_1V < DV))
    gl.store(lse_at_M, lse_M, mask=is_token_M)


@gluon.jit
def _consume(
    q, out, lse, sinks, tiles, q_stride_row, q_stride_head, out_stride_row, out_stride_head, lse_stride_row, lse_stride_head,
    tanh_scale, exponent_scale, window, item_smem, item_full, item_empty,
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    PART: gl.constexpr, NUM_HEADS: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    D_PADDED: gl.constexpr, DV_PADDED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_SIGN: gl.constexpr,
    Q_TMA: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, INTO: gl.constexpr,
):  # fmt: skip
    """The warpgroup of the rows from ``PART * _ROWS`` of each tile on."""
    HEADS: gl.constexpr = NUM_HEADS // PACK
    # Key blocks and queries that have been taken from the buffers.
    i = 0
    q_loads = 0
    n = 0
    item, q_begin, q_count, k_len, sees = _next_item(tiles, item_smem, item_full, item_empty, n, HEADS)
    while item >= 0:
        n += 1
        if q_count > PART * _ROWS // PACK:
            acc_MV, sum_M, max_M, i, q_loads = _attend_all(
                q, q_stride_row, q_stride_head, tanh_scale, exponent_scale, window, q_begin, q_count, k_len, sees, item % HEADS * PACK,
                i, q_loads, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                PART, PACK, D, D_PADDED, DV_PADDED, BLOCK_N, STAGES, Q_SIGN, Q_TMA, WINDOW, SOFTCAP,
            )  # fmt: skip
            # The next tile's fields arrive while this one's result is written.
            next_item, next_q_begin, next_q_count, next_k_len, next_sees = _next_item(tiles, item_smem, item_full, item_empty, n, HEADS)
            _write(
                acc_MV, sum_M, max_M, out, lse, sinks, out_stride_row, out_stride_head, lse_stride_row, lse_stride_head,
                window, q_begin, q_count, k_len, sees, item % HEADS * PACK, PART, PACK, DV, DV_PADDED, BLOCK_N, WINDOW, SINKS, INTO,
            )  # fmt: skip
        else:
            # All of these rows are beyond the tile's end: only the buffers go back to the producer.
            _, key_to, begin = _keys_of(q_count, k_len, sees, window, BLOCK_N, WINDOW)
            for _block in range(begin, key_to, BLOCK_N):
                stage = i % STAGES
                mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
                mbarrier.arrive(v_empty.index(stage), count=1)
                i += 1
            next_item, next_q_begin, next_q_count, next_k_len, next_sees = _next_item(tiles, item_smem, item_full, item_empty, n, HEADS)
        item = next_item
        q_begin = next_q_begin
        q_count = next_q_count
        k_len = next_k_len
        sees = next_sees


@gluon.jit(do_not_specialize=["window"])
def _attention_kernel(
    q, q_pointer, k, v, out, lse, sinks, tiles, limits, counter, page_table, page_table_stride_request, page_table_stride_page,
    q_stride_row, q_stride_head, out_stride_row, out_stride_head, lse_stride_row, lse_stride_head,
    tanh_scale, exponent_scale, window,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, D_PADDED: gl.constexpr, DV_PADDED: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_SIGN: gl.constexpr, Q_TMA: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, INTO: gl.constexpr, PAGE_SIZE: gl.constexpr,
    PAGE_KEYS: gl.constexpr,
):  # fmt: skip
    """One of the programs that share all items, ``tile * heads + head`` each. ``counter``, numbers drawn and
    programs that have ended, is 0 before and after a launch."""
    TOKENS: gl.constexpr = _ROWS // PACK if Q_TMA else _ROWS
    HEADS: gl.constexpr = PACK if Q_TMA else 1
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, HEADS, D_PADDED], k.dtype)
    q_smem = gl.allocate_shared_memory(k.dtype, [2, TOKENS, HEADS, D_PADDED], q_layout)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK_N, D_PADDED], k.dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK_N, DV_PADDED], v.dtype)
    k_smem = gl.allocate_shared_memory(k.dtype, [STAGES, 1, BLOCK_N, D_PADDED], k_layout)
    v_smem = gl.allocate_shared_memory(v.dtype, [STAGES, 1, BLOCK_N, DV_PADDED], v_layout)
    item_smem = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_edge = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(v_edge.index(0), count=1)
    for i in gl.static_range(2):
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_empty.index(i), count=2)
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    # A multiprocessor has 512 registers for each of a warpgroup's threads: two times 240, and 24 for the producer.
    gl.warp_specialize(
        [
            (_consume, (
                q_pointer, out, lse, sinks, tiles, q_stride_row, q_stride_head, out_stride_row, out_stride_head, lse_stride_row,
                lse_stride_head, tanh_scale, exponent_scale, window, item_smem, item_full, item_empty,
                q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                0, NUM_HEADS, PACK, D, DV, D_PADDED, DV_PADDED, BLOCK_N, STAGES, Q_SIGN, Q_TMA, WINDOW, SOFTCAP, SINKS, INTO,
            )),
            (_consume, (
                q_pointer, out, lse, sinks, tiles, q_stride_row, q_stride_head, out_stride_row, out_stride_head, lse_stride_row,
                lse_stride_head, tanh_scale, exponent_scale, window, item_smem, item_full, item_empty,
                q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                1, NUM_HEADS, PACK, D, DV, D_PADDED, DV_PADDED, BLOCK_N, STAGES, Q_SIGN, Q_TMA, WINDOW, SOFTCAP, SINKS, INTO,
            )),
            (_produce, (
                q, k, v, tiles, page_table, page_table_stride_request, page_table_stride_page, window, limits, counter,
                item_smem, item_full, item_empty, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                v_edge.index(0), NUM_HEADS, GROUP, PACK, D_PADDED, DV_PADDED, BLOCK_N, STAGES, Q_TMA, WINDOW, PAGE_SIZE, PAGE_KEYS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


_attention = Launcher(_attention_kernel)


def launch(work: Launch, q: Tensor, k: Tensor, v: Tensor, *, tensors: dict[str, int], arguments: dict[str, Any]) -> LaunchFunction:
    """What launches the programs of ``work``; ``arguments`` are those that the other kernel has as well, and
    ``tensors`` those of all that are given at each launch (:meth:`cpattn.kernels.launch.Launcher.prepare`).

    k and v must suit a tensor descriptor, their head dims be multiples of 8, and pages multiples of
    :data:`cpattn.kernels.tile_shapes.PAGE_UNIT`.
    """
    block_n, d_padded, dv_padded = work.shape.block_n, arguments["D_PADDED"], arguments["DV_PADDED"]
    # As many keys of a block as lie in one page for certain.
    page_size = arguments["PAGE_SIZE"]
    page_keys = min(block_n, page_size & -page_size)
    # Rows of whole tokens, and a plain copy.
    q_tma = fits_descriptor(q) and WARPGROUP_ROWS % work.pack == 0 and arguments["Q_SIGN"] == 1
    q_block = (WARPGROUP_ROWS // work.pack, work.pack, d_padded)
    device = q.device
    launch = _attention.prepare(
        (work.num_programs, 1), {"num_warps": 4}, tensors | {"counter": max(tensors.values()) + 1},
        q=Blocks(q, list(q.shape), list(q.stride()), q_block, _descriptor) if q_tma else q, q_pointer=q,
        k=_blocks(k, block_n, d_padded, page_keys), v=_blocks(v, block_n, dv_padded, page_keys),
        limits=work.limits, counter=work.limits, BLOCK_N=block_n, STAGES=work.shape.num_stages, Q_TMA=q_tma, PAGE_KEYS=page_keys,
        **arguments,
    )  # fmt: skip
    return lambda *given: launch(*given, counter_for_launch(device))


def _blocks(x: Tensor, block_n: int, padded: int, page_keys: int) -> Blocks:
    """As in the other kernel; or of pages, with blocks ``[1 page, 1 head, page_keys, _PART_DIMS]``."""
    *pages, tokens, heads, dim = x.shape
    *page_stride, stride_row, stride_head, _ = x.stride()
    block = (1, 1, page_keys, _PART_DIMS.value) if pages else (1, block_n, padded)
    return Blocks(x, [*pages, heads, tokens, dim], [*page_stride, stride_head, stride_row, 1], block, _descriptor)


def _descriptor(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(x, shape, strides, block, layout)
