"""An all-to-all of some rows beside an all-gather of all of them, over NCCL: what an all-gather of keys chooses between.

torchrun --nproc-per-node 4 benchmarks/nccl_uneven.py

Of an all-gather in which a rank receives so many MiB, an all-to-all brings a part: the same between any two ranks ("even"), or half of it
from ranks above ("skewed"). Eight in a CUDA graph or one after another; the slowest rank counts; medians, in us.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CALLS, ROUNDS = 8, 15
PARTS = (1, 0.75, 0.5, 0.25)


def empty(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cuda")


def transfers(mib: float, rank: int, size: int) -> dict[str, Callable[[], Any]]:
    """Each variant of a call on this rank."""
    part = int(mib * 2**20) // (size - 1) // 16 * 16
    variants: dict[str, Callable[[], Any]] = {"gather": partial(dist.all_gather_into_tensor, empty(size * part), empty(part))}
    for share in (*PARTS, 0):
        sent = int(part * share) // 16 * 16
        for kind, below in (("even", 1), ("skewed", 2)):
            table = [[0 if to == source else sent // (1 if source < to else below) for to in range(size)] for source in range(size)]
            received = [row[rank] for row in table]
            out, x = empty(sum(received)), empty(sum(table[rank]))
            variants[f"{kind}, {share:.0%}"] = partial(dist.all_to_all_single, out, x, received, table[rank])
    return variants


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a graph of so many calls."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeated(run)
    return graph.replay


def repeated(run: Callable[[], Any]) -> None:
    for _ in range(CALLS):
        run()


def times(run: Callable[[], None]) -> list[float]:
    """Of one call, in us: on the device and on the host, of the slowest rank."""
    torch.cuda.synchronize()
    dist.barrier()
    time.sleep(0.002)
    dist.all_reduce(torch.zeros(1, device="cuda"))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    began = time.perf_counter()
    run()
    host = (time.perf_counter() - began) * 1e3
    end.record()
    torch.cuda.synchronize()
    both = torch.tensor([start.elapsed_time(end), host], device="cuda") * (1e3 / CALLS)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    slowest: list[float] = both.tolist()
    return slowest


def main() -> None:
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(rank)
    if rank == 0:
        print("| MiB | transfer | graph | eager | host |\n|---|---|---|---|---|")
    for mib in (0.25, 1, 4, 16, 64, 256):
        variants = transfers(mib, rank, size)
        replays = {name: captured(run) for name, run in variants.items()}
        measured: dict[str, list[list[float]]] = {name: [] for name in variants}
        for _ in range(ROUNDS):
            for name, run in variants.items():
                measured[name].append([times(replays[name])[0], *times(partial(repeated, run))])
        for name, rounds in measured.items():
            if rank == 0:
                print(
                    f"| {mib} | {name} | " + " | ".join(f"{median(column):.1f}" for column in zip(*rounds, strict=True)) + " |", flush=True
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
