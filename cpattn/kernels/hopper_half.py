"""Device code for Hopper: products in fp16 of fp8 keys and of queries in half precision, without the scales of either.

A scale of K and what queries are divided by go into the scale of scores, and a scale of V is what the result is multiplied by. Scores
and sums are in fp32, weights in fp16 (:func:`cpattn.kernels.online_softmax.weigh_in_half`).

fp16 queries stay as they are. Of those in bf16 each row is multiplied by the power of two that brings its largest number to between
2 ** 14 and 2 ** 15. The 8 bits of a number then stay whole down to 2 ** -32 of the row's largest one, and what is smaller becomes a
multiple of 2 ** -24: by less than 2 ** -39 of the largest. So a score errs by at most 2 ** -39 max|q| sum|k|, times the scale. No |q| is
too large or too small.

Suffixes: M rows of a warpgroup, D the padded head dim, V that of v.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from cpattn.kernels.hopper_items import looked_at_as
from cpattn.kernels.online_softmax import WEIGHT_BITS, Scoring
from cpattn.kernels.tiles import WARPGROUP_ROWS

_ROWS = gl.constexpr(WARPGROUP_ROWS)
_WEIGHT_BITS = gl.constexpr(WEIGHT_BITS.value)
# The smallest normal number of fp32, and the largest number.
_LEAST, _MOST = gl.constexpr(2.0**-126), gl.constexpr(3.4028234663852886e38)


class Scales(NamedTuple):
    """Of K and V, each a :class:`cpattn.kernels.tile_keys.Source`; not looked at without C.HALF."""

    k: Any
    v: Any


class Factors(NamedTuple):
    """What the numbers of K and V of a head are multiplied by."""

    k: Any
    v: Any


@gluon.jit
def load_factors(scales, first_head, C: gl.constexpr):
    """Those of an item, whose first query head this is. What is not finite is NaN in all that they are for: scores with a scale that was
    brought down to the largest number would give a result that looks right."""
    k = 1.0
    v = 1.0
    if C.HALF and C.SCALED:
        head = (first_head // C.GROUP).to(gl.int64)
        k = gl.load(scales.k.at + head * scales.k.stride_head)
        v = gl.load(scales.v.at + head * scales.v.stride_head)
        k = gl.where(gl.abs(k) <= _MOST, k, float("nan"))
        v = gl.where((k == k) & (gl.abs(v) <= _MOST), v, float("nan"))
    return Factors(k, v)


@gluon.jit
def in_half_place(smem, PART: gl.constexpr, C: gl.constexpr):
    """A warpgroup's queries as fp16 numbers, in the place of what was brought."""
    shape: gl.constexpr = smem.shape
    layout: gl.constexpr = smem.layout
    return looked_at_as(smem, gl.float16, shape, layout).index(PART).reshape([_ROWS, C.D_PADDED])


@gluon.jit
def _powers(size_M):
    """For each row the power of two that its numbers are multiplied by, and the one that makes up for it."""
    exponent_M = (size_M.to(gl.int32, bitcast=True) >> 23) & 0xFF
    # Exponents of fp32 count from 127; both powers are normal numbers. Those of infinity and NaN stay what they are.
    up_M = gl.minimum(127 + 14 + 127 - exponent_M, 253)
    return (up_M << 23).to(gl.float32, bitcast=True), ((254 - up_M) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _times(scale, factor_M):
    """A scale of scores times a factor of each row: positive and finite, as is what either is for, so that what is masked and what is
    0 do not become NaN. NaN stays NaN."""
    scale_M = factor_M * scale
    scale_M = gl.where(scale_M < _LEAST, _LEAST, scale_M)
    return gl.where(scale_M > _MOST, _MOST, scale_M)


@gluon.jit
def halve_queries(q_smem, half_smem, scoring, factor, row_layout: gl.constexpr, C: gl.constexpr):
    """Puts queries in fp16 in the place of those that were brought; returns how their scores become exponents, with K's factor."""
    D_PADDED: gl.constexpr = C.D_PADDED
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D_PADDED, D_PADDED // 8], [4, 1], [1, 0])
    q_MD = q_smem.load(layout)
    # The sign is the queries', and 0 as well: the running maximum takes a positive scale.
    sign = gl.where(factor > 0, 1.0, gl.where(factor < 0, -1.0, 0.0))
    size = gl.where(factor == 0, 1.0, gl.abs(factor))
    x_MD = q_MD.to(gl.float32)
    scale_M = gl.full([_ROWS], 1.0, gl.float32, row_layout) * size
    if q_MD.dtype == gl.bfloat16:
        up_M, down_M = _powers(gl.max(gl.abs(x_MD), 1))
        scale_M = scale_M * gl.convert_layout(down_M, row_layout)
        x_MD = x_MD * (up_M * sign)[:, None]
    else:
        x_MD = x_MD * sign
    half_smem.store(x_MD.to(gl.float16))
    fence_async_shared()
    # Scores are multiplied by the first of the two that there is.
    tanh_scale_M = scale_M
    exponent_scale_M = _times(scoring.exponent_scale, scale_M)
    if C.SOFTCAP:
        tanh_scale_M = _times(scoring.tanh_scale, scale_M)
        exponent_scale_M = gl.full([_ROWS], 1.0, gl.float32, row_layout) * scoring.exponent_scale
    return Scoring(tanh_scale_M, exponent_scale_M)


@gluon.jit
def with_scales(acc_MV, sum_M, max_M, scoring, factor):
    """Weighted values, sum of weights and maximum of exponents as all kernels have them, with V's factor."""
    LEAST_WEIGHT: gl.constexpr = 2.0**-_WEIGHT_BITS
    return acc_MV * LEAST_WEIGHT * factor, sum_M * LEAST_WEIGHT, max_M * scoring.exponent_scale
