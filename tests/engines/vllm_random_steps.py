"""Random steps of vLLM's scheduler, and what is asked of a layer with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

STEPS = 300
HEAD_DIM = 16


class Step(NamedTuple):
    """A step of vLLM's scheduler.

    Attributes:
        batch: (cached, new) tokens of each request.
        size, interleave, block_size: of decode context parallelism.
        table: int32 ``[requests + padding, blocks]``.
        num_tokens, num_reqs: with padding.
        heads, kv_heads: of each rank.
        layer: what a layer asks for.
        cache: vLLM's word for what the cache is in.
    """

    batch: list[tuple[int, int]]
    size: int
    interleave: int
    block_size: int
    table: Tensor
    num_tokens: int
    num_reqs: int
    heads: int
    kv_heads: int
    layer: dict[str, Any]
    cache: str

    @property
    def totals(self) -> list[int]:
        return [cached + new for cached, new in self.batch]

    @property
    def new_rows(self) -> Tensor:
        """Of all tokens, request after request, which are new."""
        ends = np.cumsum(self.totals)
        return torch.cat([torch.arange(end - new, end) for end, (_, new) in zip(ends, self.batch, strict=True)])


def steps() -> Iterator[Step]:
    """The same ones each time: prompts, chunks of them, decodes, and one request of one token among long ones."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        size = int(rng.choice([1, 2, 3, 4]))
        interleave = int(rng.choice([1, 1, 2, 4]))
        block_size = interleave * int(rng.choice([1, 2, 4]))
        batch = [(int(rng.integers(0, 1 + rng.choice([0, 30, 90]))), int(rng.choice([1, 1, int(rng.integers(1, 40))]))) for _ in range(5)]
        batch = batch[: rng.integers(1, 6)]
        if rng.random() < 0.2:
            batch[0] = (0, 1)
        # vLLM has decodes first.
        batch.sort(key=lambda request: request[1] > 1)
        blocks = max(-(-(p + n) // (block_size * size)) for p, n in batch) + int(rng.integers(0, 3))
        padding = int(rng.choice([0, 0, 1, 3]))
        # Block 0 is nobody's.
        table = 1 + rng.permutation(len(batch) * blocks).reshape(len(batch), blocks)
        table = np.concatenate([table, np.zeros((padding, blocks), dtype=np.int64)]).astype(np.int32)
        layer: dict[str, Any] = {}
        if rng.random() < 0.3:
            layer["per_layer_sliding_window"] = int(rng.integers(1, 40))
        if rng.random() < 0.2:
            layer["logits_soft_cap"] = 5.0
        kv_heads = int(rng.choice([1, 2]))
        heads = kv_heads * int(rng.choice([1, 3]))
        if rng.random() < 0.2:
            layer["sinks"] = torch.from_numpy(rng.standard_normal(size * heads).astype(np.float32))
        num_tokens = sum(n for _, n in batch) + int(rng.choice([0, 0, 1, 7]))
        num_reqs, cache = len(batch) + padding, "fp8" if size == 1 and rng.random() < 0.3 else "auto"
        yield Step(batch, size, interleave, block_size, torch.from_numpy(table), num_tokens, num_reqs, heads, kv_heads, layer, cache)
