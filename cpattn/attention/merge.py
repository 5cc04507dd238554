"""Combining partial attention results by their LSE, in fp32.

Two results over disjoint keys, with weights exp(lse), give the result over all of them (Rabe and Staats,
arXiv:2112.05682; Liu et al., Ring Attention, arXiv:2310.01889). Shapes: N parts, T rows, H query heads, D value head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cpattn.kernels.available import has_kernels


def merge_(acc_THD: Tensor, acc_lse_TH: Tensor, out: Tensor, lse: Tensor) -> None:
    """Adds a partial result, or several in their order, to ``(acc, acc_lse)`` in place.

    A row of LSE -inf has no keys and changes nothing, whatever ``out`` holds there, NaN included; where no part has keys,
    acc keeps its bits. The weights are taken relative to the largest LSE, so nothing overflows.

    Args:
        acc_THD, acc_lse_TH: fp32 (or both fp64, in plain torch); what acc holds where its LSE is -inf does not matter.
        out: ``[T, H, D]`` or ``[N, T, H, D]`` of any floating dtype; a lower precision than acc's costs what it costs. The last
            axis is contiguous.
        lse: ``[T, H]`` or ``[N, T, H]``, any strides.
    """
    merge_for(acc_THD.device, acc_THD.dtype)(acc_THD, acc_lse_TH, out, lse)


@cache
def merge_for(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """What :func:`merge_` does for results of this dtype on this device: the kernel, or what defines it."""
    if has_kernels(device) and dtype == torch.float32:
        # Triton need not be there.
        from cpattn.kernels.merge import merge_all

        return merge_all
    return torch_merge_all_


def torch_merge_all_(acc_THD: Tensor, acc_lse_TH: Tensor, out_NTHD: Tensor, lse_NTH: Tensor) -> None:
    """:func:`merge_` in plain torch, which defines it."""
    if out_NTHD.ndim == 3:
        out_NTHD, lse_NTH = out_NTHD[None], lse_NTH[None]
    if not len(out_NTHD):
        return
    newest_TH = lse_NTH.amax(0)
    largest_TH = torch.maximum(acc_lse_TH, newest_TH)
    # Where nobody has keys, a finite stand-in makes the weights exp(-inf) = 0 rather than NaN.
    base_TH = torch.where(largest_TH == -torch.inf, 0, largest_TH)
    unchanged_TH = newest_TH == -torch.inf
    old_weight_TH = torch.where(unchanged_TH, 1, torch.exp(acc_lse_TH - base_TH))
    weight_NTH = torch.exp(lse_NTH - base_TH)
    total_TH = old_weight_TH.clone()
    for weight_TH in weight_NTH:
        total_TH += weight_TH
    acc_THD.copy_(_unless(acc_THD, (acc_lse_TH == -torch.inf) & ~unchanged_TH))
    acc_THD.mul_((old_weight_TH / total_TH)[..., None])
    for out_THD, lse_TH, weight_TH in zip(out_NTHD, lse_NTH, weight_NTH, strict=True):
        acc_THD.addcmul_(_unless(out_THD, lse_TH == -torch.inf), (weight_TH / total_TH)[..., None])
    acc_lse_TH.copy_(torch.where(unchanged_TH, acc_lse_TH, base_TH + torch.log(total_TH)))


def _unless(x_THD: Tensor, empty_TH: Tensor) -> Tensor:
    """x, or where ``empty`` -0.0: a weight of 0 times NaN is NaN, and only -0.0 leaves every sum's bits."""
    if empty_TH.device.type == "cpu" and not empty_TH.any():
        return x_THD
    return x_THD.masked_fill(empty_TH[..., None], -0.0)


def lse_with_nan(out_THD: Tensor, lse_TH: Tensor) -> Tensor:
    """The LSE, NaN where the result is: for kernels that say -inf or +inf there, as for a query without keys."""
    return torch.where(out_THD[..., 0].isnan(), torch.nan, lse_TH)


def nothing_of_padding_(lse_TH: Tensor, num_tokens: int, token_index_T: Tensor | None) -> None:
    """-inf for rows that are no tokens: those after ``num_tokens``, or in a bucket, which has an index, those whose index is negative."""
    if token_index_T is not None:
        lse_TH.masked_fill_((token_index_T < 0)[:, None], -torch.inf)
    elif num_tokens < len(lse_TH):
        lse_TH[num_tokens:].fill_(-torch.inf)


def apply_sinks_(out_THD: Tensor, lse_TH: Tensor, sinks_H: Tensor) -> None:
    """Adds each head's sink, a logit without a value, to finished rows in place: a merge with a result of 0."""
    # A sink of -inf is none, and beside no keys at all their difference is NaN.
    weight_TH = torch.where(lse_TH == -torch.inf, 0, torch.sigmoid(lse_TH - sinks_H))
    out_THD.mul_(weight_TH[..., None])
    lse_TH.copy_(torch.logaddexp(lse_TH, sinks_H.expand_as(lse_TH)))
