"""Device code for Hopper: the warpgroups that multiply, each with 64 rows of a tile.

The scores of a block are computed beside the product of the weights and values of the block before (FlashAttention-3,
arXiv:2407.08608).

Suffixes: M rows of a warpgroup, N keys of a block, D and V the padded head dims.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from cpattn.kernels.hopper_channels import release, take_item, wait_full
from cpattn.kernels.hopper_half import halve_queries, in_half_place, load_factors, with_scales
from cpattn.kernels.online_softmax import mask, tanh, weigh, weigh_in_half, write
from cpattn.kernels.tile_keys import Bounds, TileRows, bounds_of, keys_seen, last_block, load_tile, rows_of, whole_blocks
from cpattn.kernels.tiles import WARPGROUP_ROWS

_ROWS = gl.constexpr(WARPGROUP_ROWS)


class QueryRows(NamedTuple):
    """Queries in memory, and the strides of rows and heads."""

    at: Any
    stride_row: Any
    stride_head: Any


class State(NamedTuple):
    """After some key blocks: weighted values of all but the last, the last block's weights in fp32, their sum, maximum of exponents."""

    acc_MV: Any
    weight_MN: Any
    sum_M: Any
    max_M: Any


class Taken(NamedTuple):
    """How much has been taken from the buffers: key blocks, and queries."""

    blocks: Any
    queries: Any


@gluon.constexpr_function
def _score_layout(C):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BLOCK_N, 16])


@gluon.constexpr_function
def _acc_layout(C):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.DV_PADDED, 16])


@gluon.jit
def _load_queries(q_smem, q, tile, first_head, PART: gl.constexpr, C: gl.constexpr):
    """Brings queries that are no descriptor's into shared memory."""
    D_PADDED: gl.constexpr = C.D_PADDED
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D_PADDED, D_PADDED // 8], [4, 1], [1, 0])
    rows = rows_of(PART * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, layout)), tile, first_head, C)
    dim_1D = gl.arange(0, D_PADDED, gl.SliceLayout(0, layout))[None, :]
    # Strides are a caller's: with a row or a head they make products of more than 32 bits.
    row_M = tile.q_begin.to(gl.int64) + rows.token_M
    q_M1 = q.at + (row_M * q.stride_row + rows.head_M.to(gl.int64) * q.stride_head)[:, None]
    q_MD = gl.load(q_M1 + dim_1D, mask=rows.is_token_M[:, None] & (dim_1D < C.D), other=0.0)
    if C.Q_SIGN != 1:
        q_MD = (q_MD.to(gl.float32) * C.Q_SIGN).to(q_MD.dtype)
    q_smem.store(q_MD)
    fence_async_shared()


@gluon.jit
def _start_scores(q_smem, k, i, C: gl.constexpr):
    """The scores of the ``i``-th key block, once it is there; they are still being computed."""
    BLOCK_N: gl.constexpr = C.BLOCK_N
    D_PADDED: gl.constexpr = C.D_PADDED
    STAGES: gl.constexpr = C.STAGES
    wait_full(k, i, STAGES)
    k_DN = k.smem.index(i % STAGES).reshape([BLOCK_N, D_PADDED]).permute((1, 0))
    unused = gl.zeros([_ROWS, BLOCK_N], gl.float32, _score_layout(C))
    # As cpattn.kernels.tile_shapes.summed_dims says: of 192 in 256 the last quarter is zeros.
    if D_PADDED < 256 or 4 * C.D > 3 * D_PADDED:
        return warpgroup_mma(q_smem, k_DN, unused, use_acc=False, is_async=True)
    MAIN: gl.constexpr = D_PADDED // 2
    REST: gl.constexpr = D_PADDED // 4
    score_MN = warpgroup_mma(q_smem.slice(0, MAIN, dim=1), k_DN.slice(0, MAIN, dim=0), unused, use_acc=False, is_async=True)
    return warpgroup_mma(q_smem.slice(MAIN, REST, dim=1), k_DN.slice(MAIN, REST, dim=0), score_MN, is_async=True)


@gluon.jit
def _softmax(score_MN, state, block, bounds, scoring, MASKED: gl.constexpr, C: gl.constexpr):
    """The weights of a block, what the state before it decays by, and the new sum and maximum."""
    if C.SOFTCAP:
        score_MN = tanh(score_MN * (scoring.tanh_scale[:, None] if C.HALF else scoring.tanh_scale))
    if MASKED:
        # Compared with constants, as key numbers cost registers and instructions.
        key_1N = gl.arange(0, C.BLOCK_N, gl.SliceLayout(0, _score_layout(C)))[None, :]
        score_MN = mask(score_MN, key_1N, Bounds(bounds.from_M - block, bounds.to_M - block), C)
    if C.HALF:
        weighed = weigh_in_half(score_MN, state.sum_M, state.max_M, scoring.exponent_scale)
    else:
        weighed = weigh(score_MN, state.sum_M, state.max_M, scoring.exponent_scale, MASKED)
    return weighed


@gluon.jit
def _as_operand(weight_MN, v, C: gl.constexpr):
    """Weights as the product with the values takes them."""
    layout: gl.constexpr = gl.DotOperandLayout(0, _acc_layout(C), 2)
    weight_MN = gl.convert_layout(weight_MN, layout)
    # By hand, as two numbers that are rounded by one instruction lie in one register: compilers take them apart, and spill.
    ROUND: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if v.smem.dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(ROUND, "=r,f,f", [weight_MN], dtype=v.smem.dtype, is_pure=True, pack=2)


@gluon.jit
def _start_values(state, v, i, C: gl.constexpr):
    """acc and the weighted values of the ``i``-th key block, once it is there; they are still being added. And the weights as operands,
    which must stay until then."""
    BLOCK_N: gl.constexpr = C.BLOCK_N
    DV_PADDED: gl.constexpr = C.DV_PADDED
    STAGES: gl.constexpr = C.STAGES
    # Rounded only now, so that tensor cores, which compute the next scores meanwhile, need not wait for it.
    weight_MN = _as_operand(state.weight_MN, v, C)
    wait_full(v, i, STAGES)
    v_NV = v.smem.index(i % STAGES).reshape([BLOCK_N, DV_PADDED])
    return warpgroup_mma(weight_MN, v_NV, state.acc_MV, is_async=True), weight_MN


@gluon.constexpr_function
def _decay_asm(numbers):
    """Multiplies so many numbers of a thread by what their rows decay by, unless that is 1 in all of a warp. In a product's layout a
    thread has two rows, of which the first begins with the first number, and the second with the third."""
    first, second = (f"${2 * numbers + place}" for place in (0, 2))
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * numbers + i};" for i in range(numbers))
    return (
        "{ .reg .pred first, second, any; "
        f"setp.neu.f32 first, {first}, 0f3F800000; setp.neu.f32 second, {second}, 0f3F800000; "
        "or.pred any, first, second; vote.sync.any.pred any, any, 0xffffffff; @!any bra SAME; "
        f"{products} SAME: }}"
    )


@gluon.constexpr_function
def _decay_operands(numbers):
    """The results, in the place of the numbers; and what these are multiplied by."""
    return ",".join(["=f"] * numbers + [str(i) for i in range(numbers)] + ["f"] * numbers)


@gluon.jit
def _decayed(acc_MV, decay_M, C: gl.constexpr):
    """acc, of which each row decays. A warp none of whose maxima has grown leaves its rows as they are: of random scores that is a third of
    its blocks at 4k keys, and two thirds at 16k. Near its power limit a GPU is faster with fewer instructions."""
    NUMBERS: gl.constexpr = C.DV_PADDED // 2
    ASM: gl.constexpr = _decay_asm(NUMBERS)
    OPERANDS: gl.constexpr = _decay_operands(NUMBERS)
    decay_MV = gl.zeros_like(acc_MV) + gl.convert_layout(decay_M, gl.SliceLayout(1, _acc_layout(C)))[:, None]
    return gl.inline_asm_elementwise(ASM, OPERANDS, [acc_MV, decay_MV], dtype=gl.float32, is_pure=False, pack=NUMBERS)


@gluon.jit
def _attend_first(state, i, q_smem, channels, block, bounds, scoring, C: gl.constexpr):
    """The state after the key block that a tile begins with: its last one."""
    score_MN = _start_scores(q_smem, channels.k, i, C)
    score_MN = warpgroup_mma_wait(0, deps=[score_MN])
    release(channels.k, i, C.STAGES)
    # A mask changes nothing where all is visible.
    weight_MN, _decay_M, sum_M, max_M = _softmax(score_MN, state, block, bounds, scoring, True, C)
    return State(state.acc_MV, weight_MN, sum_M, max_M)


@gluon.jit
def _attend(state, i, q_smem, channels, begin, end, bounds, scoring, MASKED: gl.constexpr, C: gl.constexpr):
    """The state after the key blocks from ``end`` down to ``begin``, the program's ``i``-th and on; and the number of the next."""
    BLOCK_N: gl.constexpr = C.BLOCK_N
    STAGES: gl.constexpr = C.STAGES
    for left in range(begin, end, BLOCK_N):
        block = end - BLOCK_N - (left - begin)
        score_MN = _start_scores(q_smem, channels.k, i, C)
        acc_MV, weight_MN = _start_values(state, channels.v, i - 1, C)
        score_MN = warpgroup_mma_wait(1, deps=[score_MN])
        release(channels.k, i, STAGES)
        new_weight_MN, decay_M, sum_M, max_M = _softmax(score_MN, state, block, bounds, scoring, MASKED, C)
        # The compilers would wait for the product before the softmax. Two things keep them from it: the new weights as a
        # dependency of the wait, and the branch in another wait, for a barrier that is open.
        wait_full(channels.v, i - 1, STAGES)
        acc_MV, _weight_MN, new_weight_MN = warpgroup_mma_wait(0, deps=[acc_MV, weight_MN, new_weight_MN])
        release(channels.v, i - 1, STAGES)
        acc_MV = _decayed(acc_MV, decay_M, C)
        state = State(acc_MV, new_weight_MN, sum_M, max_M)
        i += 1
    return state, i


@gluon.jit
def _attend_all(taken, q_smem, channels, tile, window, scoring, factors, PART: gl.constexpr, C: gl.constexpr):
    """The state after all of a tile's key blocks, weighted values of the last included; and what has been taken."""
    DV_PADDED: gl.constexpr = C.DV_PADDED
    s_row: gl.constexpr = gl.SliceLayout(1, _score_layout(C))
    seen = keys_seen(tile, window, C)
    bounds = bounds_of((PART * _ROWS + gl.arange(0, _ROWS, s_row)) // C.PACK, tile, window)
    whole_begin, whole_end = whole_blocks(tile, window, C)
    max_M = gl.full([_ROWS], float("-inf"), gl.float32, s_row)
    sum_M = gl.zeros([_ROWS], gl.float32, s_row)
    acc_MV = gl.zeros([_ROWS, DV_PADDED], gl.float32, _acc_layout(C))
    i = taken.blocks
    queries = taken.queries
    if seen.end > seen.begin:
        if C.Q_TMA:
            mbarrier.wait(channels.q.full.index(PART), queries & 1)
        operand = q_smem
        of_rows = scoring
        if C.HALF:
            operand = in_half_place(channels.q.smem, PART, C)
            of_rows = halve_queries(q_smem, operand, scoring, factors.k, s_row, C)
        none = State(acc_MV, acc_MV, sum_M, max_M)
        last = last_block(seen, C)
        state = _attend_first(none, i, operand, channels, last, bounds, of_rows, C)
        i += 1
        state, i = _attend(state, i, operand, channels, gl.minimum(whole_end, last), last, bounds, of_rows, True, C)
        state, i = _attend(state, i, operand, channels, whole_begin, gl.minimum(whole_end, last), bounds, of_rows, False, C)
        if C.WINDOW:
            state, i = _attend(state, i, operand, channels, seen.begin, gl.minimum(whole_begin, last), bounds, of_rows, True, C)
        if C.Q_TMA:
            mbarrier.arrive(channels.q.empty.index(PART), count=1)
            queries += 1
        acc_MV, weight_MN = _start_values(state, channels.v, i - 1, C)
        acc_MV, _weight_MN = warpgroup_mma_wait(0, deps=[acc_MV, weight_MN])
        release(channels.v, i - 1, C.STAGES)
        sum_M = state.sum_M
        max_M = state.max_M
        if C.HALF:
            acc_MV, sum_M, max_M = with_scales(acc_MV, sum_M, max_M, of_rows, factors.v)
    return acc_MV, sum_M, max_M, Taken(i, queries)


@gluon.jit
def _pass_over(taken, channels, tile, window, C: gl.constexpr):
    """Gives a tile's key blocks back unread; returns what has been taken."""
    STAGES: gl.constexpr = C.STAGES
    seen = keys_seen(tile, window, C)
    i = taken.blocks
    for _block in range(seen.begin, seen.end, C.BLOCK_N):
        wait_full(channels.k, i, STAGES)
        release(channels.k, i, STAGES)
        wait_full(channels.v, i, STAGES)
        release(channels.v, i, STAGES)
        i += 1
    return Taken(i, taken.queries)


@gluon.jit
def _write(acc_MV, sum_M, max_M, tile, window, first_head, output, PART: gl.constexpr, C: gl.constexpr):
    """Writes a tile's result."""
    layout: gl.constexpr = _acc_layout(C)
    acc_row: gl.constexpr = gl.SliceLayout(1, layout)
    max_M = gl.convert_layout(max_M, acc_row)
    sum_M = gl.convert_layout(sum_M, acc_row)
    rows = rows_of(PART * _ROWS + gl.arange(0, _ROWS, acc_row), tile, first_head, C)
    if C.SKIPS:
        seen = keys_seen(tile, window, C)
        rows = TileRows(rows.token_M, rows.head_M, rows.is_token_M & (seen.end > seen.first))
    dim_1V = gl.arange(0, C.DV_PADDED, gl.SliceLayout(0, layout))[None, :]
    write(acc_MV, sum_M, max_M, tile.q_begin.to(gl.int64) + rows.token_M, rows, dim_1V, output, C)


@gluon.jit
def _take_tile(tiles, items, n, C: gl.constexpr):
    """The program's ``n``-th item and its tile; -1 if there is none."""
    item = take_item(items, n)
    tile, _k_start = load_tile(tiles, gl.maximum(item, 0) // C.HEADS)
    return item, tile


@gluon.jit
def consume(q, output, tiles, channels, scoring, scales, window, PART: gl.constexpr, C: gl.constexpr):
    """The warpgroup of the rows from ``PART * _ROWS`` of each tile on."""
    D_PADDED: gl.constexpr = C.D_PADDED
    q_smem = channels.q.smem.index(PART).reshape([_ROWS, D_PADDED])
    taken = Taken(0, 0)
    n = 0
    item, tile = _take_tile(tiles, channels.items, n, C)
    while item >= 0:
        n += 1
        first_head = item % C.HEADS * C.PACK
        if tile.q_count > PART * _ROWS // C.PACK:
            if not C.Q_TMA:
                _load_queries(q_smem, q, tile, first_head, PART, C)
            factors = load_factors(scales, first_head, C)
            acc_MV, sum_M, max_M, taken = _attend_all(taken, q_smem, channels, tile, window, scoring, factors, PART, C)
            # The next tile's fields arrive while this one's result is written.
            next_item, next_tile = _take_tile(tiles, channels.items, n, C)
            _write(acc_MV, sum_M, max_M, tile, window, first_head, output, PART, C)
        else:
            # All of these rows are beyond the tile's end: only the buffers go back to the producer.
            taken = _pass_over(taken, channels, tile, window, C)
            next_item, next_tile = _take_tile(tiles, channels.items, n, C)
        item = next_item
        tile = next_tile
