"""What the attention and the layer are measured with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import cpattn
from cpattn.cli.bench.device import device

CP_SIZE = 4


class Sizes(NamedTuple):
    """Of the tensors."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.heads} query and {self.kv_heads} key/value heads of {self.head_dim}, {dtype}"

    def tensors(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v."""
        torch.manual_seed(0)
        shapes = [(rows, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (torch.randn(shape, device=device()).to(self.dtype) for shape in shapes)
        return q, k, v


def sizes() -> Sizes:
    """Those of a common model on a GPU; of a quarter of it on a CPU."""
    return Sizes(32, 8, 128, torch.bfloat16) if device().type == "cuda" else Sizes(8, 2, 128, torch.float32)


def batches(tokens: int) -> dict[str, list[tuple[int, int]]]:
    """Batches of so many new tokens, by name: long, over a prefix, ragged."""
    short = [1 + (i * 53) % max(1, tokens // 16) for i in range(16)]
    return {
        f"1 x {tokens:,}": [(0, tokens)],
        f"1 x ({tokens:,} over {tokens:,})": [(tokens, tokens)],
        f"16 ragged, {sum(short):,}": [((i * 97) % tokens, length) for i, length in enumerate(short)],
    }


def flops(plan: cpattn.Plan, rank: int, used: Sizes) -> float:
    """Of a rank's causal work alone: two products of head_dim multiply-adds for each query-key pair and head."""
    return 4.0 * used.head_dim * used.heads * plan.rank_pairs[rank]


def speed(count: float, seconds: float) -> str:
    """
    >>> speed(3e12, 1.0), speed(5e9, 1.0)
    ('3.0 TFLOP/s', '5.0 GFLOP/s')
    """
    per_second = count / seconds
    return f"{per_second / 1e12:,.1f} TFLOP/s" if per_second >= 1e12 else f"{per_second / 1e9:,.1f} GFLOP/s"
