"""Combining partial attention results by their LSE, in fp32.

Two results over disjoint keys, with weights exp(lse), give the result over all of them (Rabe and Staats,
arXiv:2112.05682; Liu et al., Ring Attention, arXiv:2310.01889). Shapes: T rows, H query heads, D value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(acc_THD: Tensor, acc_lse_TH: Tensor, out_THD: Tensor, lse_TH: Tensor) -> None:
    """Adds the partial result ``(out, lse)`` to ``(acc, acc_lse)`` in place.

    A row of LSE -inf has no keys and changes nothing; the log-sum-exp is taken relative to the larger, so nothing
    overflows. ``acc`` and ``acc_lse`` are fp32; ``out`` may be of a lower precision, which it then costs.
    """
    total_TH = torch.logaddexp(acc_lse_TH, lse_TH)
    # Where neither side has keys, total is -inf; a finite stand-in makes the weights exp(-inf) = 0 rather than NaN.
    finite_TH = torch.where(total_TH == -torch.inf, 0, total_TH)
    acc_THD.mul_(torch.exp(acc_lse_TH - finite_TH)[..., None])
    acc_THD.addcmul_(out_THD, torch.exp(lse_TH - finite_TH)[..., None])
    acc_lse_TH.copy_(total_TH)


def apply_sinks_(out_THD: Tensor, lse_TH: Tensor, sinks_H: Tensor) -> None:
    """Adds each head's sink, a logit without a value, to finished rows in place: a merge with a result of 0."""
    out_THD.mul_(torch.sigmoid(lse_TH - sinks_H)[..., None])
    lse_TH.copy_(torch.logaddexp(lse_TH, sinks_H.expand_as(lse_TH)))
