"""cp_attention over NCCL between real GPUs: strategies, and all-gathers in 1, 2 and 4 groups of KV heads; beside no transfer.

PYTHONPATH=. python benchmarks/bench_nccl.py [--ranks 2] [--results FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from attention_cases import HEAD_DIM, HEADS, KV_HEADS
from gpu_report import RESULTS, write_gpu_report

import cpattn
from cpattn.testing import ProcessRanks, SoloCommunicator

BATCHES = {
    "1 x 128k": [(0, 131072)],
    "1 x 32k": [(0, 32768)],
    "8 x (8k + 2k)": [(8192, 2048)] * 8,
    "1 x (8k + 1k)": [(8192, 1024)],
}


def rank_seconds(batch: list[tuple[int, int]], rounds: int) -> dict[str, np.ndarray]:
    """The time of each variant on this rank, all ranks in step; interleaved."""
    rank, cp_size = dist.get_rank(), dist.get_world_size()
    meta = cpattn.build_metadata(batch, cp_size, rank, device="cuda")
    torch.manual_seed(rank)
    q, k, v = (torch.randn(meta.rows, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for heads in (HEADS, KV_HEADS, KV_HEADS))
    cached = (torch.randn(meta.plan.num_prefix_tokens, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    attend = partial(cpattn.cp_attention, q, k, v, meta, kv_cache=cpattn.PackedKV(*cached))
    variants: dict[str, Callable[[], Any]] = {
        "all_gather, transfers as local copies": partial(attend, group=SoloCommunicator(rank, cp_size), overlap=1)
    }
    for overlap in (1, 2, 4):
        variants[f"all_gather, overlap {overlap}"] = partial(attend, strategy="all_gather", overlap=overlap)
    for backend in ("flash_attn4", "triton"):
        if cpattn.BACKENDS[backend].unavailable() is None:
            variants[f"ring, {backend}"] = partial(attend, strategy="ring", backend=backend)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 2):
        for name, run in variants.items():
            dist.barrier()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 2:
                times[name].append(start.elapsed_time(end))
    return {name: np.array(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    with ProcessRanks(options.ranks, timeout=120, transport="nccl") as ranks:
        for name, batch in BATCHES.items():
            results = ranks.run(rank_seconds, batch, options.rounds)
            for variant in results[0]:
                # A call is over when its slowest rank is.
                slowest = np.max([result[variant] for result in results], axis=0)
                rows.append([name, variant, *(f"{value:.3f}" for value in np.percentile(slowest, [20, 50, 80]))])
                print(rows[-1], flush=True)
    write_gpu_report(
        f"nccl_{options.ranks}_gpus",
        f"cp_attention over NCCL, {options.ranks} GPUs",
        ["batch", "variant", "p20, ms", "p50, ms", "p80, ms"],
        rows,
        f"bf16, {HEADS} query and {KV_HEADS} key/value heads, D = {HEAD_DIM}, one rank a GPU; eager calls, the slowest rank counts.",
        options.results,
    )


if __name__ == "__main__":
    main()
