"""cp_attention between real GPUs: through the memory of peers, over collectives, and with no transfer at all.

PYTHONPATH=. python benchmarks/bench_transports.py [--ranks 2] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from attention_cases import HEAD_DIM, HEADS, KV_HEADS
from gpu_report import RESULTS, write_gpu_report

import cpattn
from cpattn.call import prepared
from cpattn.exchange.strategy import Setup
from cpattn.testing import ProcessRanks, SoloCommunicator
from cpattn.transports.groups import Kind

KINDS: tuple[Kind, ...] = ("peer_memory", "collectives")
PAGE_SIZE = 64
# Calls in a graph, and of a run on the host.
LAYERS, CALLS = 4, 8


class Case(NamedTuple):
    """A batch, and how keys or queries travel."""

    batch: list[tuple[int, int]]
    strategy: str = "all_gather"
    sharded: bool = False


CASES = {
    "1 x 1k": Case([(0, 1024)]),
    "1 x 2k": Case([(0, 2048)]),
    "1 x 8k": Case([(0, 8192)]),
    "8 x (8k + 2k)": Case([(8192, 2048)] * 8),
    "8 x 8k": Case([(0, 8192)] * 8),
    "1 x 32k": Case([(0, 32768)]),
    "1 x 1k, ring": Case([(0, 1024)], "ring"),
    "1 x 8k, ring": Case([(0, 8192)], "ring"),
    "8 x (8k + 2k), ring": Case([(8192, 2048)] * 8, "ring"),
    "1 x 32k, ring": Case([(0, 32768)], "ring"),
    "256 x (8k + 1), pass_q": Case([(8192, 1)] * 256, "pass_q", sharded=True),
}


def calls_of(case: Case) -> dict[str, Callable[[], Any]]:
    """Each variant of this rank's call, over random data."""
    rank, cp_size = dist.get_rank(), dist.get_world_size()
    shards = [[prefix // cp_size + (r < prefix % cp_size) for r in range(cp_size)] for prefix, _ in case.batch]
    meta = cpattn.build_metadata(case.batch, cp_size, rank, device="cuda", prefix_shards=shards if case.sharded else None)
    torch.manual_seed(rank)
    normal = partial(torch.randn, dtype=torch.bfloat16, device="cuda")
    q, k, v = (normal(meta.rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache: cpattn.PackedKV | cpattn.PagedKV
    if case.sharded:
        pages = -(-(max(prefix for prefix, _ in case.batch) // cp_size + 2) // PAGE_SIZE)
        table = torch.randperm(len(case.batch) * pages, device="cuda").int().view(len(case.batch), pages)
        k_pages, v_pages = (normal(table.numel(), PAGE_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2))
        cache = cpattn.PagedKV(k_pages, v_pages, table)
    else:
        cache = cpattn.PackedKV(*(normal(meta.plan.num_prefix_tokens, KV_HEADS, HEAD_DIM) for _ in range(2)))
    attend = partial(cpattn.cp_attention, q, k, v, kv_cache=cache, strategy=case.strategy)
    backends = ["triton"] if case.strategy != "all_gather" or cpattn.BACKENDS["flash_attn4"].unavailable() else ["triton", "flash_attn4"]
    groups = {"no transfer": SoloCommunicator(rank, cp_size)} | {kind: cpattn.transport(kind=kind) for kind in KINDS}
    calls: dict[str, Callable[[], Any]] = {
        f"{backend}, {name}": partial(attend, meta, backend=backend, group=group) for backend in backends for name, group in groups.items()
    }
    if case.strategy == "all_gather":
        # What is prepared is kept with the metadata.
        again = cpattn.build_metadata(case.batch, cp_size, rank, device="cuda")
        calls["triton, peer_memory without waiting"] = partial(
            _keys_first, partial(attend, again, backend="triton", group=groups["peer_memory"])
        )
    return calls


def _keys_first(call: Callable[[], Any]) -> Any:
    """A call whose attention begins when all keys are there; of a backend that waits for none, it is prepared so."""
    with patch.object(prepared, "Setup", _of_a_backend_that_does_not_wait):
        return call()


def _of_a_backend_that_does_not_wait(*given: Any, **named: Any) -> Setup:
    return Setup(*given, **named)._replace(waits_for_keys=False)


def rank_times(case: Case, rounds: int) -> dict[str, dict[str, list[float]]]:
    """In us, of each variant on this rank: a call in a graph, an eager one, and what one takes the host; ranks in step, variants
    in random order."""
    variants = calls_of(case)
    replays = {name: replay_of(run) for name, run in variants.items()}
    times: dict[str, dict[str, list[float]]] = {name: {"graph": [], "eager": [], "host": []} for name in variants}
    for round_ in range(rounds):
        # The same order on every rank.
        for name in random.Random(round_).sample(list(variants), len(variants)):
            times[name]["graph"].append(device_us(replays[name], 1) / LAYERS)
            times[name]["eager"].append(device_us(variants[name], LAYERS) / LAYERS)
            times[name]["host"].append(host_us(variants[name]))
    return times


def replay_of(run: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a graph of so many layers."""
    run()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAYERS):
            run()
    return graph.replay


def in_step() -> None:
    """Ranks begin together, on the host and on the device."""
    torch.cuda.synchronize()
    dist.barrier()
    time.sleep(0.002)
    dist.all_reduce(torch.zeros(1, device="cuda"))


def device_us(run: Callable[[], Any], times: int) -> float:
    """From the first launch to the end of the last."""
    in_step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def host_us(run: Callable[[], Any]) -> float:
    """Of a call that is not waited for."""
    in_step()
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    with ProcessRanks(options.ranks, timeout=120, transport="nccl") as ranks:
        for name in options.cases:
            results = ranks.run(rank_times, CASES[name], options.rounds)
            for variant in results[0]:
                # A call is over when its slowest rank is.
                slowest = {kind: np.max([result[variant][kind] for result in results], axis=0) for kind in results[0][variant]}
                percentiles = [*np.percentile(slowest["graph"], [50, 20, 80]), *np.percentile(slowest["eager"], [50, 20, 80])]
                rows.append([name, *variant.split(", "), *(f"{us:,.1f}" for us in (*percentiles, np.median(slowest["host"])))])
                print(rows[-1], flush=True)
    write_gpu_report(
        f"transports_{options.ranks}_gpus",
        f"cp_attention between {options.ranks} GPUs, by what carries the bytes",
        ["batch", "backend", "transport", *(f"{kind}, {p}, us" for kind in ("graph", "eager") for p in ("p50", "p20", "p80")), "host, us"],
        rows,
        f"bf16, {HEADS} query and {KV_HEADS} key/value heads, D = {HEAD_DIM}, one rank a GPU. One layer's call, in CUDA graphs and runs of "
        f"{LAYERS}; the slowest rank counts; variants interleaved in random order. No transfer: what the others would send is a local "
        "copy. The host's time is that of calls that are not waited for. Without a strategy's name: all_gather.",
        options.results,
    )


if __name__ == "__main__":
    main()
