"""Rows of K and V as they are stored, with their scales."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StoredRows(NamedTuple):
    """K and V that are to be multiplied by their scales.

    Attributes:
        k: ``[n, Hkv, D]``; v ``[n, Hkv, Dv]``, or None where it is a part of K: fp8, bf16, or any floating dtype; the last axis
            contiguous, the others may be strided.
        k_scale, v_scale: fp32 ``[n, Hkv]``, or ``[Hkv]`` for all rows, any strides; None where there are none.
    """

    k: Tensor
    v: Tensor | None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
