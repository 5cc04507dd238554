"""A small model whose attention is cpattn's, and what ranks do with it under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cpattn

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
# Changing sizes and numbers of requests, one of fewer tokens than ranks, and one that was there before.
BATCHES = [[(0, n), (0, n // 3 + 1), *[(0, 2)] * (n % 3)] for n in (5, 9, 17, 1, 30, 21, 17, 40, 33, 3, 26, 12)]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, meta: cpattn.CPMetadata, group: Any) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, HEAD_DIM)) * torch.cos(meta.position_ids)[:, None, None]
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        attended: Tensor = self.out(cpattn.cp_attention(q, k, v, meta, group=group).flatten(1))
        return x + attended


class Model(nn.Module):
    """All tokens in, all tokens out, on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, meta: cpattn.CPMetadata, group: Any = None) -> Tensor:
        rows = cpattn.shard(x.sin(), meta)
        for layer in self.layers:
            rows = layer(rows, meta, group)
        return cpattn.unshard(rows, meta, group=group).cos()


class CountingBackend:
    """Of torch.compile: runs what it is given, and counts it."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


def new_model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def run_batches(plain: Model, compiled: Any, group: Any, cp_size: int, cp_rank: int) -> list[tuple[Tensor, Tensor]]:
    """For each batch what the compiled model returns, and the plain one."""
    outputs, device = [], next(plain.parameters()).device
    for batch in BATCHES:
        meta = cpattn.build_metadata(batch, cp_size, cp_rank, device)
        x = torch.randn(meta.plan.num_tokens, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1)).to(device)
        with torch.no_grad():
            outputs.append((compiled(x, meta, group), plain(x, meta, group)))
    return outputs


def run_on_gpu() -> list[tuple[Tensor, Tensor]]:
    """On a rank of the default group, on its own GPU: the outputs, compiled by torch's own backend."""
    plain = new_model().to(f"cuda:{torch.cuda.current_device()}")
    outputs = run_batches(plain, torch.compile(plain, dynamic=True), None, dist.get_world_size(), dist.get_rank())
    return [(compiled.cpu(), expected.cpu()) for compiled, expected in outputs]
