"""Device code: the online softmax of Milakov and Gimelshein (arXiv:1805.02867), and what is written in the end.

Both attention kernels compute with it, so that they give the same bits; how to read the NamedTuples:
:mod:`cpattn.kernels.tile_keys`. Exponents are in base 2, and fused multiply-adds are written out, so that no two places can
be contracted differently.

Suffixes: M rows of a tile, N keys of a block, V the padded head dim of v.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from cpattn.kernels.stored_numbers import in_dtype

_LN_2: tl.constexpr = tl.constexpr(math.log(2.0))
_TWO_LOG2_E: tl.constexpr = tl.constexpr(2.0 * math.log2(math.e))
# Weights of up to 2 ** 15, with the largest number of fp16 at just under 2 ** 16.
WEIGHT_BITS: tl.constexpr = tl.constexpr(15)


class Scoring(NamedTuple):
    """How scores become exponents.

    Attributes:
        tanh_scale: with a softcap, what a score is multiplied by before tanh.
        exponent_scale: what makes a score an exponent of 2.

    With products in fp16 that of the two which scores are multiplied by first has a value for each row.
    """

    tanh_scale: Any
    exponent_scale: Any


class Output(NamedTuple):
    """Where results go.

    Attributes:
        out, lse: pointers, with the strides of rows and heads.
        sinks: a pointer to a logit for each query head, where there are sinks.
    """

    out: Any
    out_stride_row: Any
    out_stride_head: Any
    lse: Any
    lse_stride_row: Any
    lse_stride_head: Any
    sinks: Any


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
def mask(score_MN, key_1N, bounds, C: tl.constexpr):
    """-inf for what a row does not see. Keys and bounds may be counted from anywhere."""
    visible_MN = key_1N < bounds.to_M[:, None]
    if C.WINDOW:
        visible_MN = visible_MN & (key_1N >= bounds.from_M[:, None])
    return tl.where(visible_MN, score_MN, float("-inf"))


@triton.jit
def weigh(score_MN, sum_M, max_M, exponent_scale, MASKED: tl.constexpr):
    """The weights of a block; what the state before it decays by; and the new sum of weights and maximum of exponents."""
    new_max_M = tl.maximum(max_M, tl.max(score_MN, 1) * exponent_scale)
    # A query that has seen nothing yet has maximum -inf; 0 in its place gives weights of exp2(-inf) = 0, not NaN.
    # In an unmasked block every query sees something, and the two are the same.
    base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M) if MASKED else new_max_M
    decay_M = tl.exp2(max_M - base_M)
    weight_MN = tl.exp2(tl.fma(score_MN, exponent_scale, -base_M[:, None]))
    sum_M = tl.fma(sum_M, decay_M, tl.sum(weight_MN, 1))
    return weight_MN, decay_M, sum_M, new_max_M


@triton.jit
def weigh_in_half(score_MN, sum_M, max_M, exponent_scale_M):
    """As :func:`weigh`, for products in fp16: weights and sums are 2 ** WEIGHT_BITS times as large, and the maximum is that of scores.

    So what fp16 rounds to a multiple of 2 ** -24 is 2 ** -39 of the largest weight, where a million small ones count. And the
    largest exponent is 0 exactly, however large scores are: nothing overflows.
    """
    new_max_M = tl.maximum(max_M, tl.max(score_MN, 1))
    base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
    decay_M = tl.exp2((max_M - base_M) * exponent_scale_M)
    weight_MN = tl.exp2(tl.fma(score_MN - base_M[:, None], exponent_scale_M[:, None], WEIGHT_BITS * 1.0))
    sum_M = tl.fma(sum_M, decay_M, tl.sum(weight_MN, 1))
    return weight_MN, decay_M, sum_M, new_max_M


@triton.jit
def add_sinks(acc_MV, sum_M, max_M, sinks, rows):
    """One more logit, added last, so that it takes part in the same way wherever the keys come from."""
    sink_M = tl.load(sinks + rows.head_M, mask=rows.is_token_M, other=float("-inf")).to(tl.float32) * (1.0 / _LN_2)
    new_max_M = tl.maximum(max_M, sink_M)
    base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
    decay_M = tl.exp2(max_M - base_M)
    sum_M = tl.fma(sum_M, decay_M, tl.exp2(sink_M - base_M))
    return acc_MV * decay_M[:, None], sum_M, new_max_M


@triton.jit
def merge(result_MV, lse_M, out_MV, lse_at_M, is_token_M, is_out_MV):
    """The result and LSE over these keys and those of the earlier result at ``out_MV`` and ``lse_at_M``."""
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
    merged_MV = old_MV * (old_weight_M / total_M)[:, None] + result_MV * (weight_M / total_M)[:, None]
    return merged_MV, larger_M + tl.log(total_M)


@triton.jit
def write(acc_MV, sum_M, max_M, row_M, rows, dim_1V, output, C: tl.constexpr):
    """Writes the rows' result, or merges it into what is there. ``row_M`` are its rows in the output, in 64 bits: strides are a
    caller's, and with a row or a head make products of more than 32."""
    if C.SINKS:
        acc_MV, sum_M, max_M = add_sinks(acc_MV, sum_M, max_M, output.sinks, rows)
    # Without any logit the sum is 0 and the maximum -inf: 1 in the sum's place gives out 0 and LSE -inf.
    divisor_M = tl.where(sum_M == 0.0, 1.0, sum_M)
    result_MV = acc_MV * (1.0 / divisor_M)[:, None]
    lse_M = (max_M + tl.log2(divisor_M)) * _LN_2
    head_M = rows.head_M.to(tl.int64)
    out_MV = output.out + (row_M * output.out_stride_row + head_M * output.out_stride_head)[:, None] + dim_1V
    lse_at_M = output.lse + row_M * output.lse_stride_row + head_M * output.lse_stride_head
    is_out_MV = rows.is_token_M[:, None] & (dim_1V < C.DV)
    if C.INTO:
        result_MV, lse_M = merge(result_MV, lse_M, out_MV, lse_at_M, rows.is_token_M, is_out_MV)
    DTYPE: tl.constexpr = output.out.dtype.element_ty
    # A stored number times its scale may be more than fp16 has.
    tl.store(out_MV, in_dtype(result_MV, DTYPE) if C.FP8 else result_MV.to(DTYPE), mask=is_out_MV)
    tl.store(lse_at_M, lse_M, mask=rows.is_token_M)
