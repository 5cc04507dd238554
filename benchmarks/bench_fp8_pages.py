"""One rank's calls over pages in fp8 and in bf16: who reads the pages, and who is given a copy.

PYTHONPATH=. python benchmarks/bench_fp8_pages.py [--results FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_report import RESULTS, write_gpu_report
from gpu_timing import gpu_seconds

import cpattn

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 64
BATCHES = {
    "decode 256 x (8k + 1)": [(8192, 1)] * 256,
    "8 x (8k + 2k)": [(8192, 2048)] * 8,
    "1 x 32k": [(0, 32768)],
}
BACKENDS = ["triton", "flash_attn3", "flash_attn4", "torch_flash"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    table = []
    for name, batch in BATCHES.items():
        times = gpu_seconds(variants(batch), options.rounds)
        for variant, seconds in times.items():
            table.append([name, variant, *(f"{x * 1e3:.3f}" for x in np.percentile(seconds, [20, 50, 80]))])
        print(name, {variant: round(float(np.median(seconds)) * 1e3, 3) for variant, seconds in times.items()}, flush=True)
        torch.cuda.empty_cache()
    header = ["batch", "call", "ms, p20", "p50", "p80"]
    notes = (
        f"`attend` over pages of {PAGE_SIZE}, which hold everything, and `cp_attention`, which writes new keys first, as graphs; q is bf16."
    )
    write_gpu_report("fp8_pages_gpu", "Pages in fp8 on one GPU", header, table, notes, options.results)


def variants(batch: list[tuple[int, int]]) -> dict[str, Callable[[], Any]]:
    """Calls over the same numbers of pages in each form."""
    meta = cpattn.build_metadata(batch, 1, 0, device="cuda")
    counts = [-(-(prefix + extend) // PAGE_SIZE) for prefix, extend in batch]
    table = torch.arange(sum(counts), device="cuda", dtype=torch.int32).view(len(batch), -1)
    q, k, v = (torch.randn(meta.rows, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    shape = sum(counts), PAGE_SIZE, KV_HEADS, HEAD_DIM
    pages = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
    fp8 = pages.to(torch.float8_e4m3fn)
    of_heads, of_tokens = torch.ones(KV_HEADS, device="cuda"), torch.ones(2, *shape[:3], device="cuda")
    caches = {
        "bf16": cpattn.PagedKV(pages[0], pages[1], table),
        "fp8, scales of heads": cpattn.PagedKV(fp8[0], fp8[1], table, k_scale=of_heads, v_scale=of_heads.clone()),
        "fp8, scales of tokens": cpattn.PagedKV(fp8[0], fp8[1], table, k_scale=of_tokens[0], v_scale=of_tokens[1]),
    }
    found: dict[str, Callable[[], Any]] = {}
    for form, cache in caches.items():
        says = cpattn.explain(q, k, v, meta, kv_cache=cache)
        for backend in BACKENDS:
            if says[backend].startswith(("able", "chosen")):
                found[f"attend, {backend}, {form}"] = partial(cpattn.attend, q, cache, meta, backend=backend)
        found[f"cp_attention, auto, {form}"] = partial(cpattn.cp_attention, q, k, v, meta, kv_cache=cache)
        if form != "bf16":
            # What is prepared is kept with the metadata.
            again = cpattn.build_metadata(batch, 1, 0, device="cuda")
            found[f"attend, triton's plain kernel, {form}"] = partial(_by_the_plain_kernel, q, cache, again)
    return found


def _by_the_plain_kernel(q: torch.Tensor, cache: cpattn.PagedKV, meta: cpattn.CPMetadata) -> torch.Tensor:
    """As if that for Hopper could not read stored keys."""
    with patch("cpattn.kernels.ragged_attention._may_specialize", lambda q, keys: False):
        return cpattn.attend(q, cache, meta, backend="triton")


if __name__ == "__main__":
    main()
