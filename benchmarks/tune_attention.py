"""What the kernels' own choices are tuned by: FlashAttention 4 with GQA packed and not, and tile shapes of the Triton kernel.

PYTHONPATH=. python benchmarks/tune_attention.py
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from attention_cases import BATCHES, HEAD_DIM, HEADS, KV_HEADS, AttentionBatch, all_gather_rows, tensors
from gpu_timing import gpu_machine, gpu_seconds

import cpattn
from cpattn.attention import flash_attn4
from cpattn.attention.backend import AttentionOptions
from cpattn.kernels.ragged_attention import ragged_attention
from cpattn.kernels.tile_shapes import TileShape

SHAPES = [
    TileShape(128, 128, 8, 2, True, True),
    TileShape(64, 128, 4, 2, True, True),
    TileShape(128, 128, 8, 2, True),
    TileShape(128, 128, 8, 2, False),
    TileShape(128, 64, 8, 3, True),
    TileShape(128, 64, 8, 2, True),
    TileShape(128, 64, 4, 2, True),
    TileShape(64, 64, 4, 2, True),
    TileShape(64, 64, 4, 3, True),
    TileShape(64, 128, 4, 2, True),
]


def try_out(name: str, run: Callable[[], Any]) -> bool:
    """Whether it runs at all; if not, says why."""
    try:
        run()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        return False
    return True


def main() -> None:
    print(gpu_machine())
    batches = dict(BATCHES)
    for length in (64, 128, 256, 512, 1024, 2048):
        batches[f"chunks of {length} over 8k"] = AttentionBatch([(8192 - 4 * length, 8 * length)] * max(1, 8192 // length), 4)
    if len(sys.argv) > 1:
        batches = {name: batch for name, batch in batches.items() if any(word in name for word in sys.argv[1:])}
    for name, batch in batches.items():
        meta = batch.metadata()
        _, rows = all_gather_rows(meta)
        q, k, v = tensors(batch, meta)
        options = AttentionOptions(scale=HEAD_DIM**-0.5)
        variants: dict[str, Callable[[], Any]] = {}
        if cpattn.BACKENDS["flash_attn4"].unavailable() is None:
            variants["fa4 packed"] = partial(flash_attn4.launch, q, k, v, rows, options, True)
            variants["fa4 unpacked"] = partial(flash_attn4.launch, q, k, v, rows, options, False)
        triton = partial(ragged_attention, q, k, v, rows, scale=options.scale)
        for shape, pack in itertools.product(SHAPES[:1] if name.startswith("chunks") else SHAPES, (1, HEADS // KV_HEADS)):
            variants[f"{tuple(shape)} pack {pack}"] = partial(triton, shapes=(shape,), packs=(pack,))
        variants["triton default"] = triton
        times = gpu_seconds({variant: run for variant, run in variants.items() if try_out(f"{name}: {variant}", run)}, rounds=7)
        print(f"\n{name}: {batch.flops() / 1e12:.3f} TFLOP")
        for variant, seconds in times.items():
            print(
                f"  {variant:50s} {np.median(seconds) * 1e3:9.4f} ms {batch.flops() / np.median(seconds) / 1e12:7.1f} TFLOP/s", flush=True
            )


if __name__ == "__main__":
    main()
