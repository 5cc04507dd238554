"""What the demo computes: a batch, the sizes of its attention, and the tensors, the same on every rank."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import cpattn
from cpattn.cli.batch_file import read_batch
from cpattn.cli.demo.place import Place
from cpattn.cli.options import DTYPES, Heads, shape_from
from cpattn.cli.traffic import Shape
from cpattn.errors import CPError, shown

_DEFAULT_FILE = Path(__file__).parents[3] / "examples" / "batches" / "mixed.json"
# What runs where there is no checkout beside the package, and so no batch file.
_BUILT_IN_BATCH = "0+600, 512+130, 0+7, 997+1, 64+0, 0+1"
# Large enough for a GPU to have something to do, and small enough for float64.
_GPU_BATCH = "0+16k, 8k+4k, 4k+1 x 4, 0+7"
# Query heads and the size of a head, by the kind of device: a small model's, and a common one's.
_SIZES = {"cpu": (8, 64), "cuda": (32, 128)}
# Of all tensors, and of all heads' query-key pairs: some GiB, and on a CPU some minutes.
_MOST_NUMBERS, _MOST_SCORES = {"cpu": 2**28, "cuda": 2**30}, 2**36


@dataclass(frozen=True)
class Setting:
    """What every rank needs to know to make the same tensors, on the kind of device that it computes on."""

    plan: cpattn.Plan
    shape: Shape
    seed: int
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.shape.dtype]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, cpattn.PackedKV]:
        """q, k and v of the whole batch, and the cached prefix, on the current device of that kind."""
        # Of the CPU, whatever the device: GPUs of two kinds draw other numbers.
        generator = torch.Generator().manual_seed(self.seed)

        def normal(rows: int, heads: int, head_dim: int) -> Tensor:
            return torch.randn(rows, heads, head_dim, generator=generator).to(self.device, self.dtype)

        heads, kv_heads, head_dim, v_head_dim = self.shape[:4]
        tokens, cached = self.plan.num_tokens, self.plan.num_prefix_tokens
        q, k, v = normal(tokens, heads, head_dim), normal(tokens, kv_heads, head_dim), normal(tokens, kv_heads, v_head_dim)
        return q, k, v, cpattn.PackedKV(normal(cached, kv_heads, head_dim), normal(cached, kv_heads, v_head_dim))


def defaults_in_words() -> str:
    """The batches that are computed where none is given; of a wheel there is no checkout to name a file of."""
    on_cpu = "examples/batches/mixed.json" if _DEFAULT_FILE.exists() else _BUILT_IN_BATCH
    return f"default: {on_cpu}; on GPUs: {_GPU_BATCH}"


def setting_for(options: argparse.Namespace, place: Place) -> Setting:
    """What the options ask for. Raises CPError."""
    given = options.batch
    if given is None:
        on_cpu = str(_DEFAULT_FILE) if _DEFAULT_FILE.exists() else _BUILT_IN_BATCH
        given = on_cpu if place.device == "cpu" else _GPU_BATCH
    if not 0 <= options.seed + 2**63 < 2**64:
        raise CPError(f"--seed {shown(options.seed)}: it must fit into 64 bits")
    heads, head_dim = _SIZES[place.device]
    options.heads = options.heads or Heads(heads)
    options.head_dim = head_dim if options.head_dim is None else options.head_dim
    plan, shape = cpattn.plan(read_batch(given), place.cp_size), shape_from(options)
    numbers = (plan.num_tokens + plan.num_prefix_tokens) * (shape.heads + shape.kv_heads) * (shape.head_dim + shape.v_head_dim)
    if numbers > _MOST_NUMBERS[place.device] or sum(plan.rank_pairs) * shape.heads > _MOST_SCORES:
        raise CPError(
            "this batch with these heads is too large for the demo, which computes it in float64 on one device; give it fewer tokens or "
            "heads (`cpattn plan` takes any)"
        )
    return Setting(plan, shape, options.seed, place.device)
