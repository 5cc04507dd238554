"""What a benchmark is asked to measure, and with which tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import cpattn
from cpattn.cli.bench.device import Timing, device
from cpattn.cli.options import CP_SIZE, DTYPES
from cpattn.cli.speed import causal_flops
from cpattn.cli.traffic import Shape


class Asked(NamedTuple):
    """The options of a run.

    Attributes:
        tokens: that batches are made of; batch: the one to measure in their place, or None.
        written: that batch as it was given.
        cp_size: the number of ranks, or None where it was left out.
        shape: of q, k and v; None where there are none.
        seconds: about how long to measure.
    """

    tokens: int
    batch: list[tuple[int, int]] | None
    written: str
    cp_size: int | None
    shape: Shape | None
    seconds: float

    def plans(self) -> dict[str, cpattn.Plan]:
        """Of the batch that was given, or of some of so many new tokens: long, over a prefix, ragged; by name."""
        batches = made_batches(self.tokens) if self.batch is None else {self.written: self.batch}
        cp_size = CP_SIZE if self.cp_size is None else self.cp_size
        return {name: cpattn.plan(batch, cp_size) for name, batch in batches.items()}

    def tensors(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v."""
        assert self.shape is not None
        torch.manual_seed(0)
        heads, kv_heads, head_dim, v_head_dim, dtype, *_ = self.shape
        shapes = (rows, heads, head_dim), (rows, kv_heads, head_dim), (rows, kv_heads, v_head_dim)
        q, k, v = (torch.randn(shape, device=device()).to(DTYPES[dtype]) for shape in shapes)
        return q, k, v

    def flops(self, plan: cpattn.Plan, rank: int) -> float:
        """Of a rank's causal work alone: two products of a multiply and an add for each query-key pair, head and dimension."""
        assert self.shape is not None
        return causal_flops(self.shape, plan.rank_pairs[rank])


class Result(NamedTuple):
    """What a benchmark found.

    Attributes:
        header, lines: a table.
        records: the same as numbers, a dict a line.
        note: what to know of them.
    """

    header: list[str]
    lines: list[list[str]]
    records: list[dict[str, Any]]
    note: str


def record(name: str, plan: cpattn.Plan, timing: Timing, **more: Any) -> dict[str, Any]:
    """A line as numbers: times in seconds."""
    sizes = {"num_requests": len(plan.batch), "num_tokens": plan.num_tokens, "num_prefix_tokens": plan.num_prefix_tokens}
    return {"batch": name, **sizes, "cp_size": plan.cp_size, **more, "seconds": timing._asdict()}


def made_batches(tokens: int) -> dict[str, list[tuple[int, int]]]:
    """Batches of so many new tokens, by name."""
    short = [1 + (i * 53) % max(1, tokens // 16) for i in range(16)]
    return {
        f"1 x {tokens:,}": [(0, tokens)],
        f"1 x ({tokens:,} over {tokens:,})": [(tokens, tokens)],
        f"16 ragged, {sum(short):,}": [((i * 97) % tokens, length) for i, length in enumerate(short)],
    }
