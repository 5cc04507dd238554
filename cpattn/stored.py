"""Keys that are stored in other numbers than queries have: in which dtypes, with which scales, and how they travel."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Stored numbers of one byte, which mean something only together with a scale."""

HALF = (torch.bfloat16, torch.float16)
"""What pages may be stored in without a scale, whatever floating dtype the queries have."""

ScaleKind: TypeAlias = Literal["head", "token"]
"""What a scale belongs to: a KV head, or all of them, for good; or one token and head, which brings its own."""

SCALE_BYTES = 4
"""Of a scale, which is fp32."""


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether numbers of that dtype take a scale.

    >>> is_fp8(torch.float8_e5m2), is_fp8(torch.bfloat16)
    (True, False)
    """
    return dtype in FP8


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """What results of queries of a dtype are in: theirs, or bf16.

    >>> result_dtype(torch.float16), result_dtype(torch.float8_e4m3fn)
    (torch.float16, torch.bfloat16)
    """
    return torch.bfloat16 if is_fp8(dtype) else dtype


def largest(dtype: torch.dtype) -> float:
    """The largest finite number of a dtype: what overflows becomes that.

    >>> largest(torch.float8_e4m3fn)
    448.0
    """
    return float(torch.finfo(dtype).max)


def fp8_bytes(head_dim: int, v_head_dim: int) -> int:
    """What fp8 K and V take up in a message, for each token and head: a multiple of what a scale does, which may follow."""
    return -(-(head_dim + v_head_dim) // SCALE_BYTES) * SCALE_BYTES


def row_bytes(head_dim: int, v_head_dim: int, dtype: torch.dtype, scales: ScaleKind | None) -> int:
    """What one token's K and V take up in a message, for each head.

    >>> row_bytes(128, 128, torch.float8_e4m3fn, "token") / row_bytes(128, 128, torch.bfloat16, None)
    0.515625

    Args:
        v_head_dim: 0 where V is a part of K.
    """
    if not is_fp8(dtype):
        return (head_dim + v_head_dim) * dtype.itemsize
    num_scales = 0 if scales != "token" else 2 if v_head_dim else 1
    return fp8_bytes(head_dim, v_head_dim) + SCALE_BYTES * num_scales
