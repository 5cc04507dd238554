"""Two processes of one thread each through cp_attention, beside one process of two threads through torch's own attention.

python benchmarks/bench_cpu.py [--tokens 16384]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.distributed as dist
from timing import percentiles, write_report
from torch import Tensor

import cpattn
from cpattn.testing import ProcessRanks, relative_rmse

RANKS, HEADS, HEAD_DIM = 2, 8, 128


def tensors(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(3)]


def rank_seconds(tokens: int, dtype: torch.dtype, strategy: str) -> tuple[float, Tensor]:
    """One timed call on every rank, all starting together; returns its time and this rank's output."""
    meta = cpattn.build_metadata([(0, tokens)], RANKS, dist.get_rank())
    q, k, v = (cpattn.shard(x, meta) for x in tensors(tokens, dtype))
    dist.barrier()
    start = time.perf_counter()
    out = cpattn.cp_attention(q, k, v, meta, strategy=strategy)
    return time.perf_counter() - start, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(RANKS)
    rows = []
    with ProcessRanks(RANKS, timeout=600, threads=1) as ranks:
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (x[None].transpose(1, 2) for x in tensors(options.tokens, dtype))
            times: dict[str, list[float]] = {"one process": [], "all_gather": [], "ring": []}
            errors = {}
            # The first round warms up.
            for round_ in range(options.rounds + 1):
                start = time.perf_counter()
                alone = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                seconds = {"one process": time.perf_counter() - start}
                for strategy in ("all_gather", "ring"):
                    results = ranks.run(rank_seconds, options.tokens, dtype, strategy)
                    seconds[strategy] = max(rank for rank, _ in results)
                    if round_ == 0:
                        out = torch.cat([out for _, out in results])
                        restore = cpattn.build_metadata([(0, options.tokens)], RANKS, 0).restore_index
                        errors[strategy] = relative_rmse(out[restore], alone[0].transpose(0, 1))
                if round_:
                    for name, value in seconds.items():
                        times[name].append(value)
            for name, values in times.items():
                ratio = np.median(values) / np.median(times["one process"])
                difference = f"{errors[name]:.1e}" if name in errors else ""
                rows.append([str(dtype).removeprefix("torch."), name, percentiles(np.array(values), 1e-3), f"{ratio:.3f}", difference])
    write_report(
        "attention_cpu",
        f"{options.tokens:,} causal tokens, {HEADS} heads, D = {HEAD_DIM}: {RANKS} processes of one thread against one of {RANKS} threads",
        ["dtype", "how", "ms", "ratio to one process", "relative RMSE to one process"],
        rows,
        f"One process: torch.nn.functional.scaled_dot_product_attention(is_causal=True) with {RANKS} threads. "
        "The others: cpattn.cp_attention, backend cpu, over gloo on one machine, transfers included; the slower rank counts.",
    )


if __name__ == "__main__":
    main()
