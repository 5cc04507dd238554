"""Host time of calls, and the bits and the time of the same calls as CUDA graphs, through the public interface alone.

To compare two trees, run each in turn, several times, and compare the files:
PYTHONPATH=OTHER_TREE python benchmarks/bench_prepared.py other.json; PYTHONPATH=. python benchmarks/bench_prepared.py here.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cpattn
from cpattn.testing import SoloCommunicator

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 64
CALLS, MEANS = 25, 12


class Case(NamedTuple):
    """A rank's call: over pages, of which each rank of two may hold a half."""

    strategy: str
    batch: list[tuple[int, int]]
    cp_size: int
    paged: bool = False
    sharded: bool = False


CASES = {
    "all_gather 1x1k": Case("all_gather", [(0, 1024)], 2),
    "all_gather 1x16k": Case("all_gather", [(0, 16384)], 2),
    "all_gather 64 ragged": Case("all_gather", [(0, 17 + 37 * i % 1900) for i in range(64)], 2),
    "all_gather prefix": Case("all_gather", [(4096, 1024), (8000, 100)], 2),
    "all_gather pages": Case("all_gather", [(4096, 1024), (300, 900)], 2, paged=True),
    "ring 1x8k": Case("ring", [(0, 8192)], 4),
    "ring prefix": Case("ring", [(4096, 1024), (8000, 100)], 4),
    "pass_q decode": Case("pass_q", [(8192, 1)] * 64, 2, paged=True, sharded=True),
    "pass_q_ring": Case("pass_q_ring", [(2048, 256)] * 4, 2, paged=True, sharded=True),
    "one rank 1x1k": Case("all_gather", [(0, 1024)], 1),
    "one rank decode": Case("all_gather", [(2000 + i, 1) for i in range(64)], 1, paged=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    with torch.no_grad():
        found = {name: measure(call_of(case)) for name, case in CASES.items()}
    options.results.write_text(json.dumps(found, indent=1))


def call_of(case: Case) -> Callable[[], Any]:
    """The call, over random data that are the same in every process."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    shards = [[prefix // 2, prefix - prefix // 2] for prefix, _ in case.batch] if case.sharded else None
    plan = cpattn.plan(case.batch, case.cp_size, prefix_shards=shards)
    meta = plan.metadata(case.cp_size // 2, "cuda")
    q, k, v = (normal(meta.rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache: cpattn.PagedKV | cpattn.PackedKV | None = None
    if case.paged:
        pages_a_request = -(-max(map(sum, case.batch)) // PAGE_SIZE)
        shape = len(case.batch) * pages_a_request, PAGE_SIZE, KV_HEADS, HEAD_DIM
        table = torch.randperm(shape[0], generator=generator, device="cuda").int().view(len(case.batch), pages_a_request)
        cache = cpattn.PagedKV(normal(*shape), normal(*shape), table)
    elif plan.num_prefix_tokens:
        cache = cpattn.PackedKV(*(normal(plan.num_prefix_tokens, KV_HEADS, HEAD_DIM) for _ in range(2)))
    group = SoloCommunicator(meta.cp_rank, case.cp_size)
    options: dict[str, Any] = {"kv_cache": cache, "group": group, "strategy": case.strategy, "backend": "triton", "return_lse": True}
    return lambda: cpattn.cp_attention(q, k, v, meta, **options)


def measure(call: Callable[[], Any]) -> dict[str, Any]:
    """Host time in microseconds of calls that are not waited for; a digest of the result; time of the graph in microseconds."""
    out, lse = call()
    digest = hashlib.sha256(out.float().cpu().numpy().tobytes() + lse.cpu().numpy().tobytes()).hexdigest()
    for _ in range(CALLS):
        call()
    host = []
    for _ in range(MEANS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        host.append((time.perf_counter() - begin) / CALLS * 1e6)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(MEANS):
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin_event.record()
        for _ in range(10):
            graph.replay()
        end_event.record()
        torch.cuda.synchronize()
        times.append(begin_event.elapsed_time(end_event) * 100)
    return {"bits": digest, "host_us": statistics.median(host), "host_least_us": min(host), "graph_us": statistics.median(times)}


if __name__ == "__main__":
    main()
