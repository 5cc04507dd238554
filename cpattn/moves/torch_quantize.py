"""Numbers as they are stored, and back, in plain torch: what :class:`cpattn.moves.moves.Moves` means by it."""

from __future__ import annotations

import torch
from torch import Tensor

from cpattn.moves.stored_rows import StoredRows
from cpattn.stored import largest

LEAST_SCALE = 2.0**-126
"""The smallest scale that a row gets: the smallest normal fp32 number, so that rows of zeros have one as well."""


def quantize(out: StoredRows, k: Tensor, v: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """See :meth:`cpattn.moves.moves.Moves.quantize`."""
    _quantize(out.k, k, k_scale, out.k_scale)
    if out.v is not None and v is not None:
        _quantize(out.v, v, v_scale, out.v_scale)


def _quantize(out: Tensor, x: Tensor, scale: Tensor | None, new_scale: Tensor | None) -> None:
    most, most_given = largest(out.dtype), min(largest(x.dtype), largest(torch.float32))
    x = x.float()
    if new_scale is not None:
        size = x.abs().nan_to_num_(nan=0.0, posinf=torch.inf).amax(dim=2).clamp_(max=most_given)
        # By a tensor: on a GPU torch multiplies by the reciprocal of a number, which rounds otherwise.
        new_scale.copy_((size / torch.full_like(size, most)).clamp_(min=LEAST_SCALE))
        scale = new_scale
    if scale is not None:
        # With a scale of 0 the rest overflows, and saturates.
        x = torch.where(x == 0, x, x / scale[..., None])
    out.copy_(x.clamp(-most, most).to(out.dtype))


def dequantize(k: Tensor, v: Tensor | None, stored: StoredRows) -> None:
    """See :meth:`cpattn.moves.moves.Moves.dequantize`."""
    _dequantize(k, stored.k, stored.k_scale)
    if v is not None and stored.v is not None:
        _dequantize(v, stored.v, stored.v_scale)


def _dequantize(out: Tensor, x: Tensor, scale: Tensor | None) -> None:
    out.copy_(meaning(x, scale, out.dtype))


def meaning(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What stored numbers ``[..., Hkv, D]`` with scales ``[..., Hkv]``, or ``[Hkv]``, mean in a dtype."""
    if x.dtype == dtype:
        return x
    if x.dtype != torch.float64:
        x = x.float()
    if scale is not None:
        x = x * scale[..., None]
    if dtype == torch.float16:
        most = largest(dtype)
        x = x.clamp(-most, most)
    return x.to(dtype)
