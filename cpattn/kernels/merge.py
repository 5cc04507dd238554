"""A Triton kernel that merges partial results by their LSE: one launch for any number of them, each read once.

Suffixes: R pairs of a row and a head, V the padded value head dim.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cpattn.kernels.launch import Launcher, LaunchFunction

# Values of one program: 16 for each of its 128 threads, so that several parts are in flight.
_VALUES_PER_PROGRAM = 2048


# Counts change from batch to batch, and must not compile anew.
@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _merge_kernel(
    acc, acc_lse, out, lse, num_rows, num_parts, acc_stride_row, acc_stride_head, acc_lse_stride_row, acc_lse_stride_head,
    out_stride_part, out_stride_row, out_stride_head, lse_stride_part, lse_stride_row, lse_stride_head,
    HEADS: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_R pairs. The weights are taken relative to the largest LSE, so that nothing overflows."""
    pair_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_R = pair_R // HEADS
    head_R = pair_R % HEADS
    is_row_R = row_R < num_rows
    acc_lse_R = acc_lse + row_R * acc_lse_stride_row + head_R * acc_lse_stride_head
    lse_R = lse + row_R * lse_stride_row + head_R * lse_stride_head
    old_lse_R = tl.load(acc_lse_R, mask=is_row_R, other=float("-inf"))

    largest_R = tl.full([BLOCK_R], float("-inf"), tl.float32)
    part_R = lse_R
    for _ in range(num_parts):
        part_lse_R = tl.load(part_R, mask=is_row_R, other=float("-inf")).to(tl.float32)
        # A maximum that keeps NaN, which tl.maximum drops: a part of NaN must not pass for one without keys.
        largest_R = tl.where((part_lse_R > largest_R) | (part_lse_R != part_lse_R), part_lse_R, largest_R)
        part_R += lse_stride_part
    # What has no keys in any part is neither read nor written.
    is_row_R = is_row_R & (largest_R != float("-inf"))
    # Of the others the largest LSE is not infinite; 0 in its place keeps the rest from computing inf - inf.
    largest_R = tl.where(is_row_R, tl.where(old_lse_R > largest_R, old_lse_R, largest_R), 0.0)

    old_weight_R = tl.exp(old_lse_R - largest_R)
    total_R = old_weight_R
    part_R = lse_R
    for _ in range(num_parts):
        part_lse_R = tl.load(part_R, mask=is_row_R, other=float("-inf")).to(tl.float32)
        total_R += tl.exp(part_lse_R - largest_R)
        part_R += lse_stride_part
    total_R = tl.where(is_row_R, total_R, 1.0)

    dim_1V = tl.arange(0, DV_PADDED)[None, :]
    acc_RV = acc + (row_R * acc_stride_row + head_R * acc_stride_head)[:, None] + dim_1V
    out_RV = out + (row_R * out_stride_row + head_R * out_stride_head)[:, None] + dim_1V
    is_value_RV = is_row_R[:, None] & (dim_1V < DV)
    # A weight of 0 times NaN is NaN: values of a part without keys are not read.
    merged_RV = tl.load(acc_RV, mask=is_value_RV & (old_lse_R > float("-inf"))[:, None], other=0.0) * (old_weight_R / total_R)[:, None]
    part_R = lse_R
    for _ in range(num_parts):
        part_lse_R = tl.load(part_R, mask=is_row_R, other=float("-inf")).to(tl.float32)
        has_keys_RV = is_value_RV & (part_lse_R > float("-inf"))[:, None]
        value_RV = tl.load(out_RV, mask=has_keys_RV, other=0.0).to(tl.float32)
        merged_RV = tl.fma(value_RV, (tl.exp(part_lse_R - largest_R) / total_R)[:, None].broadcast_to(value_RV.shape), merged_RV)
        part_R += lse_stride_part
        out_RV += out_stride_part
    tl.store(acc_RV, merged_RV, mask=is_value_RV)
    tl.store(acc_lse_R, largest_R + tl.log(total_R), mask=is_row_R)


_merge = Launcher(_merge_kernel)


def merge_all(acc: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """The same bits as :func:`cpattn.attention.merge.torch_merge_all_`; see :func:`cpattn.attention.merge.merge_`."""
    key = (
        acc.shape, acc.stride(), acc_lse.stride(), out.shape, out.stride(), lse.shape, lse.stride(), acc.dtype, acc_lse.dtype, out.dtype,
        lse.dtype,
    )  # fmt: skip
    launch = _merge.prepared.get(key) or _merge.prepared.keep(key, _prepare(acc, acc_lse, out, lse))
    launch(acc, acc_lse, out, lse)


def _prepare(acc: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor) -> LaunchFunction:
    num_rows, heads, dim = acc.shape
    padded = triton.next_power_of_2(dim)
    block = max(1, _VALUES_PER_PROGRAM // padded)
    # One partial result may come without an axis of parts.
    if out.ndim == 3:
        out, lse = out[None], lse[None]
    return _merge.prepare(
        (triton.cdiv(num_rows * heads, block) if dim else 0, 1), {}, {"acc": 0, "acc_lse": 1, "out": 2, "lse": 3},
        acc=acc, acc_lse=acc_lse, out=out, lse=lse, num_rows=num_rows, num_parts=len(out),
        acc_stride_row=acc.stride(0), acc_stride_head=acc.stride(1),
        acc_lse_stride_row=acc_lse.stride(0), acc_lse_stride_head=acc_lse.stride(1),
        out_stride_part=out.stride(0), out_stride_row=out.stride(1), out_stride_head=out.stride(2),
        lse_stride_part=lse.stride(0), lse_stride_row=lse.stride(1), lse_stride_head=lse.stride(2),
        HEADS=heads, DV=dim, DV_PADDED=padded, BLOCK_R=block,
    )  # fmt: skip
