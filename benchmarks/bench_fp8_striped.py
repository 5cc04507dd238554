"""Pages in fp8 beside pages in bf16, striped over two GPUs and whole on one: decode, and a chunk of a long prefill.

PYTHONPATH=. python benchmarks/bench_fp8_striped.py [--ranks 2] [--results FOLDER]

It compiles some 40 kernels first, 13 of them for attention, and says of each form how long its first call took: two to three minutes in
all on two GPUs of a host. --forms takes some alone, and writes no results then. --check tries everything on CPUs over small batches, in
seconds.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

import cpattn
from cpattn.testing import ProcessRanks

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 64
# Calls in a graph, as many as a model has layers: ranks begin a graph up to 150 us apart.
LAYERS = 32
CASES = {"decode 256 x (8k + 1)": [(8192, 1)] * 256, "prefill 30k + 2k": [(30720, 2048)]}
CHECKED_CASES = {"decode": [(70, 1), (33, 1)], "prefill": [(60, 40)]}
PLAIN = "fp8 of heads, plain kernel"
FORMS = ["bf16", "fp8 of heads", PLAIN, "fp8 of tokens"]


class Goal(NamedTuple):
    """What a time is to be at most, in parts of another's: ``(case, form, GPUs)``."""

    time: tuple[str, str, int]
    of: tuple[str, str, int]
    most: float


def goals(ranks: int) -> list[Goal]:
    """Half the bytes on each of two GPUs, and half of them again in fp8, beside what messages and merging take."""
    decode, prefill = CASES
    return [
        Goal((decode, "fp8 of heads", ranks), (decode, "bf16", ranks), 0.60),
        Goal((decode, "fp8 of tokens", ranks), (decode, "bf16", ranks), 0.60),
        Goal((decode, "bf16", ranks), (decode, "bf16", 1), 0.53),
        Goal((prefill, "bf16", ranks), (prefill, "bf16", 1), 0.55),
        Goal((prefill, "fp8 of heads", ranks), (prefill, "fp8 of heads", 1), 0.55),
    ]


def caches(pages: int, lines: int, device: str) -> dict[str, cpattn.PagedKV]:
    """A request's pages in each form, of random numbers."""
    table = torch.randperm(lines * pages).to(device, torch.int32).view(lines, pages)
    shape = lines * pages, PAGE_SIZE, KV_HEADS, HEAD_DIM
    k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    k8, v8 = (x.to(torch.float8_e4m3fn) for x in (k, v))
    of_heads, of_tokens = ([torch.ones(size, device=device) for _ in range(2)] for size in ((KV_HEADS,), shape[:3]))
    in_fp8 = [cpattn.PagedKV(k8, v8, table, k_scale=k_scale, v_scale=v_scale) for k_scale, v_scale in (of_heads, of_tokens)]
    return dict(zip(FORMS, (cpattn.PagedKV(k, v, table), in_fp8[0], in_fp8[0], in_fp8[1]), strict=True))


def calls_of(batch: list[tuple[int, int]], device: str, forms: Sequence[str] = FORMS) -> dict[tuple[str, int], Callable[[], Any]]:
    """Each call of this rank, with what "auto" takes: in every form over the cache that is striped over all ranks, and that one GPU
    has whole."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    groups = {size: cpattn.transport(), 1: None}
    longest = max(prefix + extend for prefix, extend in batch)
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    for ranks, group in groups.items():
        plan = cpattn.plan(batch, ranks, owner=cpattn.Striped(1) if ranks > 1 else None)
        pages = -(-(longest // ranks + 1) // PAGE_SIZE)
        for form, cache in caches(pages, len(batch), device).items():
            if form not in forms:
                continue
            # What is prepared is kept with the metadata.
            meta = plan.metadata(rank if ranks > 1 else 0, device=device)
            shapes = ((meta.rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
            q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
            calls[form, ranks] = partial(_call, form, partial(cpattn.cp_attention, q, k, v, meta, kv_cache=cache, group=group))
    return calls


def _call(form: str, call: Callable[[], Any]) -> Any:
    """A call; one by the plain kernel is prepared as if that for Hopper could not read stored keys."""
    name = "cpattn.kernels.ragged_attention._may_specialize"
    with patch(name, lambda q, keys: False) if form == PLAIN and torch.cuda.is_available() else nullcontext():
        return call()


def rank_times(batch: list[tuple[int, int]], rounds: int, forms: Sequence[str]) -> dict[tuple[str, int], list[float]]:
    """In us of a call in a graph on this rank; ranks in step, calls in random order."""
    replays = {}
    for (form, gpus), call in calls_of(batch, "cuda", forms).items():
        began = time.monotonic()
        replays[form, gpus] = _graph(call)
        if dist.get_rank() == 0:
            print(f"{form}, GPUs {gpus}: the first call, compiling included, took {time.monotonic() - began:.1f} s", flush=True)
    times: dict[tuple[str, int], list[float]] = {name: [] for name in replays}
    for round_ in range(rounds):
        # The same order on every rank.
        for name in random.Random(round_).sample(list(replays), len(replays)):
            times[name].append(_device_us(replays[name]) / LAYERS)
    return times


def _graph(call: Callable[[], Any]) -> Callable[[], None]:
    call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAYERS):
            call()
    return graph.replay


def _device_us(run: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    dist.barrier()
    # At the clock of a card that has rested, all of them alike.
    time.sleep(0.01)
    dist.all_reduce(torch.zeros(1, device="cuda"))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def tried(batch: list[tuple[int, int]]) -> list[str]:
    """Each call of this rank on a CPU, and the shape of its result."""
    lines = []
    for (form, ranks), call in calls_of(batch, "cpu").items():
        out = call()
        assert not out.isnan().any(), (form, ranks)
        lines.append(f"{form}, ranks {ranks}: {tuple(out.shape)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--check", action="store_true", help="on CPUs, over small batches")
    options = parser.parse_args()
    if options.check:
        with ProcessRanks(options.ranks, timeout=60) as ranks:
            for name, batch in CHECKED_CASES.items():
                print(name, *ranks.run(tried, batch)[0], sep="\n  ")
        return
    measure(options.ranks, options.rounds, options.results, options.forms)


def measure(num_ranks: int, rounds: int, results: Path, forms: Sequence[str]) -> None:
    """Prints what is known after each case, and writes all of it."""
    from gpu_report import write_gpu_report

    rows, medians = [], {}
    with ProcessRanks(num_ranks, timeout=120, transport="nccl") as ranks:
        for case, batch in CASES.items():
            by_rank = ranks.run(rank_times, batch, rounds, forms)
            for form, gpus in by_rank[0]:
                # A call is over when its slowest rank is.
                slowest = np.max([times[form, gpus] for times in by_rank], axis=0)
                medians[case, form, gpus] = float(np.median(slowest))
                rows.append([case, form, str(gpus), *(f"{us:,.1f}" for us in np.percentile(slowest, [50, 20, 80]))])
                print(rows[-1], flush=True)
    lines = [
        f"{', '.join(map(str, goal.time))}, takes {medians[goal.time] / medians[goal.of]:.3f} of {', '.join(map(str, goal.of))}; it is to "
        f"take at most {goal.most:.2f}."
        for goal in goals(num_ranks)
        if goal.time in medians and goal.of in medians
    ]
    print("\n".join(lines), flush=True)
    if list(forms) != FORMS:
        return
    notes = (
        f"bf16 queries, {HEADS} query and {KV_HEADS} key/value heads, D = {HEAD_DIM}, pages of {PAGE_SIZE}, one rank a GPU, every token on "
        f"the rank of its position. One layer's `cp_attention` with what auto takes, in CUDA graphs of {LAYERS}; the slowest rank counts; "
        'calls interleaved in random order. One GPU: the whole batch on each rank\'s device. "plain kernel": as if that for Hopper could '
        "not read stored keys."
    )
    header = ["batch", "pages", "GPUs", "us, p50", "p20", "p80"]
    write_gpu_report(
        f"fp8_striped_{num_ranks}_gpus", "Pages in fp8, striped over GPUs", header, rows, "\n\n".join([notes, *lines]), results
    )


if __name__ == "__main__":
    main()
