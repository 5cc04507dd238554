"""Device code: numbers as they are stored, and what they mean.

fp8 is read and written as bytes, by their bits: so it is on GPUs without fp8 of their own, and in the interpreter. Where the compiler
has it, its own conversion is faster and gives the same numbers.

Suffixes: R pairs of a row and a head; D a padded head dim.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl

NO_FP8, E4M3, E5M2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# The bits of NaN that has no sign.
_NAN_BITS: tl.constexpr = tl.constexpr(0x7F)


def fp8_kind(dtype: torch.dtype) -> int:
    """Which of the kinds above a dtype is."""
    kind = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}.get(dtype, NO_FP8)
    return int(kind.value)


def fp8_is_native(capability: tuple[int, int], interpreted: bool) -> bool:
    """Whether the compiler converts bytes of e4m3 by an instruction."""
    return capability >= (8, 9) and not interpreted


@triton.jit
def meant(x, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 numbers that stored ones stand for, bytes where they are fp8."""
    if FP8 == E5M2:
        # It is the upper half of an fp16.
        x = (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    elif FP8 == E4M3:
        if NATIVE:
            x = x.to(tl.float8e4nv, bitcast=True)
        else:
            # With the exponent of an fp16, which counts from 8 less.
            number = (((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)).to(tl.float16, bitcast=True).to(tl.float32)
            x = tl.where((x & 0x7F) == _NAN_BITS, float("nan"), number * 256.0)
    return x.to(tl.float32)


@triton.jit
def in_half(x, FP8: tl.constexpr, SATURATED: tl.constexpr):
    """The numbers in fp16 that bytes of fp8 stand for, which has all of them; with SATURATED its largest for infinities."""
    if FP8 == E5M2:
        x = x.to(tl.float8e5, bitcast=True).to(tl.float16)
        if SATURATED:
            x = in_dtype(x, tl.float16)
    else:
        # There are no infinities in e4m3.
        x = x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return x


@triton.jit
def in_dtype(x, like: tl.constexpr):
    """fp32 numbers in the dtype ``like``: for fp16 what overflows becomes its largest."""
    if like == tl.float16:
        x = _saturated(x, 65504.0)
    return x.to(like)


@triton.jit
def _saturated(x, MOST: tl.constexpr):
    return tl.where(x > MOST, MOST, tl.where(x < -MOST, -MOST, x))


@triton.jit
def stored_fp8(x, FP8: tl.constexpr):
    """The bytes of fp32 numbers: the nearest, the even one of two. What overflows becomes the largest, and NaN stays NaN."""
    # Bits behind the point, exponents, and what those count from.
    BITS: tl.constexpr = 3 if FP8 == E4M3 else 2
    BIAS: tl.constexpr = 7 if FP8 == E4M3 else 15
    MOST: tl.constexpr = 448.0 if FP8 == E4M3 else 57344.0
    # 2 ** (1 - BIAS), the smallest normal number.
    NORMAL: tl.constexpr = 0.015625 if FP8 == E4M3 else 0.00006103515625
    is_nan = x != x
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.abs(x)
    size = tl.where(size > MOST, MOST, size)
    size_bits = size.to(tl.uint32, bitcast=True)
    # Half of the last bit that stays, less where that is even, carries over into it. Exponents of fp32 count from 127.
    odd = (size_bits >> (23 - BITS)) & 1
    rounded = (size_bits + ((1 << (22 - BITS)) - 1) + odd) >> (23 - BITS)
    normal = rounded - ((127 - BIAS) << BITS)
    # Below that numbers are multiples of the smallest one, which the sum with 2 ** 23 rounds to.
    multiple = (size * ((1 << BITS) / NORMAL) + 8388608.0).to(tl.uint32, bitcast=True) & 0xFF
    code = tl.where(size < NORMAL, multiple, normal)
    code = tl.where(is_nan, _NAN_BITS, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _most_given(DTYPE: tl.constexpr):
    """The largest finite number of a dtype that is not fp8."""
    if tl.bfloat16 == DTYPE:
        return 3.3895313892515355e38
    if tl.float16 == DTYPE:
        return 65504.0
    return 3.4028234663852886e38


@triton.jit
def _size(x, most):
    """The largest number of each row, without NaN."""
    size = tl.where(x == x, tl.abs(x), 0.0)
    return tl.max(tl.where(size > most, most, size), axis=1)


@triton.jit
def _quantize_columns(
    to_R, from_R, scale_R, new_scale_R, is_row_R, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, FP8: tl.constexpr, SCALE: tl.constexpr,
    NEW_SCALE: tl.constexpr,
):  # fmt: skip
    column_1D = tl.arange(0, DIM_PADDED)[None, :]
    inside_RD = is_row_R[:, None] & (column_1D < DIM)
    x_RD = tl.load(from_R[:, None] + column_1D, mask=inside_RD, other=0).to(tl.float32)
    if NEW_SCALE:
        MOST: tl.constexpr = 448.0 if FP8 == E4M3 else 57344.0
        size_R = _size(x_RD, _most_given(from_R.dtype.element_ty))
        divisor_R = tl.div_rn(size_R, tl.full(size_R.shape, MOST, tl.float32))
        divisor_R = tl.maximum(divisor_R, 1.1754943508222875e-38)
        tl.store(new_scale_R, divisor_R, mask=is_row_R)
        x_RD = tl.div_rn(x_RD, tl.broadcast_to(divisor_R[:, None], x_RD.shape))
    elif SCALE:
        divisor_R = tl.load(scale_R, mask=is_row_R, other=1.0)
        # With a scale of 0 the rest overflows, and saturates.
        x_RD = tl.where(x_RD == 0, x_RD, tl.div_rn(x_RD, tl.broadcast_to(divisor_R[:, None], x_RD.shape)))
    if FP8:
        stored_RD = stored_fp8(x_RD, FP8)
    else:
        if to_R.dtype.element_ty == tl.bfloat16:
            x_RD = _saturated(x_RD, 3.3895313892515355e38)
        stored_RD = in_dtype(x_RD, to_R.dtype.element_ty)
    tl.store(to_R[:, None] + column_1D, stored_RD, mask=inside_RD)


@triton.jit
def _dequantize_columns(
    to_R, from_R, scale_R, is_row_R, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    column_1D = tl.arange(0, DIM_PADDED)[None, :]
    inside_RD = is_row_R[:, None] & (column_1D < DIM)
    x_RD = meant(tl.load(from_R[:, None] + column_1D, mask=inside_RD, other=0), FP8, NATIVE)
    if SCALE:
        x_RD = x_RD * tl.load(scale_R, mask=is_row_R, other=1.0)[:, None]
    tl.store(to_R[:, None] + column_1D, in_dtype(x_RD, to_R.dtype.element_ty), mask=inside_RD)


# Counts change from batch to batch, and must not compile anew.
@triton.jit(do_not_specialize=["num_rows"])
def stored_rows_kernel(
    plain_k, plain_v, stored_k, stored_v, k_scale, v_scale, num_rows,
    plain_k_stride_row, plain_k_stride_head, plain_v_stride_row, plain_v_stride_head,
    stored_k_stride_row, stored_k_stride_head, stored_v_stride_row, stored_v_stride_head,
    k_scale_stride_row, k_scale_stride_head, v_scale_stride_row, v_scale_stride_head,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
    FP8: tl.constexpr, NATIVE: tl.constexpr, SCALE: tl.constexpr, NEW_SCALE: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_R (row, head) pairs, ``R``, of K or, in the second row of the grid, of V: from plain numbers to stored
    ones with STORE, else back."""
    pair_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_R = pair_R // HEADS
    head_R = pair_R % HEADS
    is_row_R = row_R < num_rows
    if tl.program_id(1) == 0:
        plain_R = plain_k + (row_R * plain_k_stride_row + head_R * plain_k_stride_head)
        stored_R = stored_k + (row_R * stored_k_stride_row + head_R * stored_k_stride_head)
        scale_R = k_scale + (row_R * k_scale_stride_row + head_R * k_scale_stride_head)
        if STORE:
            _quantize_columns(stored_R, plain_R, scale_R, scale_R, is_row_R, D, D_PADDED, FP8, SCALE, NEW_SCALE)
        else:
            _dequantize_columns(plain_R, stored_R, scale_R, is_row_R, D, D_PADDED, FP8, NATIVE, SCALE)
    else:
        plain_R = plain_v + (row_R * plain_v_stride_row + head_R * plain_v_stride_head)
        stored_R = stored_v + (row_R * stored_v_stride_row + head_R * stored_v_stride_head)
        scale_R = v_scale + (row_R * v_scale_stride_row + head_R * v_scale_stride_head)
        if STORE:
            _quantize_columns(stored_R, plain_R, scale_R, scale_R, is_row_R, DV, DV_PADDED, FP8, SCALE, NEW_SCALE)
        else:
            _dequantize_columns(plain_R, stored_R, scale_R, is_row_R, DV, DV_PADDED, FP8, NATIVE, SCALE)
