"""What the choice of FlashAttention 4's packing is tuned by: the query heads of a group in one tile, and not.

Tile shapes of the Triton kernel are chosen by tune_tiles.py.

PYTHONPATH=. python benchmarks/tune_flash_attn4.py
"""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
from attention_cases import BATCHES, HEAD_DIM, AttentionBatch, all_gather_spans, tensors
from gpu_timing import gpu_machine, gpu_seconds

from cpattn.attention import flash_attn4
from cpattn.attention.backend import AttentionOptions
from cpattn.keys import Keys


def main() -> None:
    print(gpu_machine())
    batches = dict(BATCHES)
    for length in (64, 128, 256, 512, 1024, 2048):
        batches[f"chunks of {length} over 8k"] = AttentionBatch([(8192 - 4 * length, 8 * length)] * max(1, 8192 // length), 4)
    if len(sys.argv) > 1:
        batches = {name: batch for name, batch in batches.items() if any(word in name for word in sys.argv[1:])}
    for name, batch in batches.items():
        meta = batch.metadata()
        _, spans = all_gather_spans(meta)
        q, k, v = tensors(batch, meta)
        options = AttentionOptions(scale=HEAD_DIM**-0.5)
        launch = partial(flash_attn4.launch, q, Keys(k, v), spans, options)
        times = gpu_seconds({"packed": partial(launch, True), "unpacked": partial(launch, False)}, rounds=7)
        print(f"\n{name}: {batch.flops() / 1e12:.3f} TFLOP")
        for variant, seconds in times.items():
            median = np.median(seconds)
            print(f"  {variant:10s} {median * 1e3:9.4f} ms {batch.flops() / median / 1e12:7.1f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
