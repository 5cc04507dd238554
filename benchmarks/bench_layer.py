"""A layer's attention through cp_attention, one rank's work on one GPU, transfers as local copies; beside the launch alone.

PYTHONPATH=. python benchmarks/bench_layer.py [--results FOLDER]
PYTHONPATH=. python benchmarks/bench_layer.py --draw  # only draws the results that are there, which needs no GPU
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_cases import HEAD_DIM, HEADS, KV_HEADS, AttentionBatch, all_gather_spans, tensors
from gpu_report import RESULTS, draw_bars, write_gpu_report
from gpu_timing import gpu_seconds
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.keys import Keys
from cpattn.spans import Spans
from cpattn.testing import SoloCommunicator
from cpattn.transports.transfer import Work

# In which the cache is whole on every rank; benchmarks/bench_serving.py has the others.
STRATEGIES = ("all_gather", "ring")
_DONE = Work(lambda: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--draw", action="store_true", help="only draw the results that are there, which needs no GPU")
    options = parser.parse_args()
    if not options.draw:
        measure_all(options.rounds, options.results)
    draw(options.results)


def measure_all(rounds: int, results: Path) -> None:
    table = []
    for tokens in (1024, 4096, 16384, 131072):
        for prefix in (0, 8192):
            for cp_size in (4, 8):
                table += measure(tokens, prefix, cp_size, rounds)
                torch.cuda.empty_cache()
    write_gpu_report(
        "layer_gpu",
        "One rank's layer through cp_attention",
        [
            "new tokens", "prefix", "cp", "strategy", "backend", "attention alone, us", "layer as a graph, us", "over it, us", "ratio",
            "layer eager, us", "host a call, us", "cpattn's own, us", "without the copies, us",
            "graph p20, us", "graph p80, us",
        ],
        table,
        f"bf16, {HEADS} query and {KV_HEADS} key/value heads, D = {HEAD_DIM}, one request, the rank in the middle. Transfers are local "
        "copies on the same stream, so nothing hides them. Attention alone: one launch over keys that lie ready, with the "
        "same backend. GPU times are medians of runs interleaved in random order, the L2 cache flushed before each, after a rest of "
        "twice what the last one took; eager ones are of single calls to a device that waits for them. Host times are medians of "
        "means over calls one after another that are not waited for; cpattn's own is that of calls in which the backend gives back "
        "what it is asked for without a launch, and of these \"without the copies\" leaves out those that stand for transfers.",
        results,
    )  # fmt: skip


def draw(results: Path) -> None:
    """The quotients of one group's size over a cached prefix."""
    groups: dict[str, dict[str, float]] = {}
    with (results / "layer_gpu.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["prefix"] != "0" and row["cp"] == "8":
                groups.setdefault(f"{row['new tokens']} new tokens", {})[f"{row['strategy']}, {row['backend']}"] = float(row["ratio"])
    title = "A layer as a graph over its attention launch alone (8,192 cached tokens, cp 8; 1 is free)"
    draw_bars(results / "layer_gpu.png", title, {"times the launch alone": groups}, digits=2)


def measure(tokens: int, prefix: int, cp_size: int, rounds: int) -> list[list[str]]:
    batch = AttentionBatch([(prefix, tokens)], cp_size)
    meta = batch.metadata()
    _, spans = all_gather_spans(meta)
    q, k, v = tensors(batch, meta)
    local_k, local_v = (torch.randn(meta.rows, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    cache = cpattn.PackedKV(*(torch.randn(prefix, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2)))
    communicator, silent = SoloCommunicator(meta.cp_rank, cp_size), SilentCommunicator(meta.cp_rank, cp_size)
    names = [name for name in ("flash_attn4", "flash_attn3", "triton") if cpattn.BACKENDS[name].unavailable() is None]
    attention_options = AttentionOptions(scale=HEAD_DIM**-0.5)
    alone = {name: partial(cpattn.BACKENDS[name].attend, q, Keys(k, v), spans, attention_options, q.dtype) for name in names}
    attend = partial(cpattn.cp_attention, q, local_k, local_v, meta, kv_cache=cache, overlap=1)
    keys = [(strategy, name) for strategy in STRATEGIES for name in names]
    layers: dict[str, Callable[[], Any]] = {}
    own: dict[str, Callable[[], Any]] = {}
    for strategy, name in keys:
        layers[f"{strategy} {name}"] = partial(attend, group=communicator, strategy=strategy, backend=name)
        cpattn.BACKENDS[f"no {name}"] = without_launches(cpattn.BACKENDS[name])
        own[f"{strategy} {name}"] = partial(attend, group=communicator, strategy=strategy, backend=f"no {name}")
        own[f"{strategy} {name}, silent"] = partial(attend, group=silent, strategy=strategy, backend=f"no {name}")
    variants = {f"alone {name}": run for name, run in alone.items()} | layers
    graphs, eager = gpu_seconds(variants, rounds), gpu_seconds(variants, rounds, graph=False)
    # Few where the device takes long, so that the host does not come to wait for it.
    host = host_seconds(layers, calls=20 if tokens <= 4096 else 2)
    host_own = host_seconds(own, calls=20)
    lines = []
    for strategy, name in keys:
        layer, launch = f"{strategy} {name}", f"alone {name}"
        graph_us, alone_us = (float(np.median(graphs[variant])) * 1e6 for variant in (layer, launch))
        lines.append(
            [
                f"{tokens:,}",
                f"{prefix:,}",
                str(cp_size),
                strategy,
                name,
                f"{alone_us:,.1f}",
                f"{graph_us:,.1f}",
                f"{graph_us - alone_us:,.1f}",
                f"{graph_us / alone_us:.3f}",
                f"{np.median(eager[layer]) * 1e6:,.1f}",
                f"{host[layer] * 1e6:.0f}",
                f"{host_own[layer] * 1e6:.0f}",
                f"{host_own[f'{layer}, silent'] * 1e6:.0f}",
                *(f"{value * 1e6:,.1f}" for value in np.percentile(graphs[layer], [20, 80])),
            ]
        )
        print(lines[-1], flush=True)
    return lines


class SilentCommunicator(SoloCommunicator):
    """Nothing is copied for what others would send."""

    def _all_gather(self, out: Tensor, x: Tensor) -> Work:
        return _DONE

    def _shift(self, out: Tensor, x: Tensor, by: int) -> Work:
        return _DONE


def without_launches(backend: Backend) -> Backend:
    """A backend of the same kind that gives back memory of the right form, the same every time."""
    results: dict[tuple[torch.Size, torch.dtype], tuple[Tensor, Tensor]] = {}

    def attend(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = q.shape, out_dtype
        if key not in results:
            lse = torch.zeros(q.shape[1], q.shape[0], device=q.device)
            results[key] = torch.zeros_like(q, dtype=out_dtype), lse.T
        return results[key]

    accumulate = None if backend.accumulate is None else lambda *arguments: None
    return replace(backend, attend=attend, accumulate=accumulate)


def host_seconds(variants: Mapping[str, Callable[[], Any]], calls: int) -> dict[str, float]:
    """The median time that the host spends in a call, in runs of ``calls``, as the layers of a model make them; each run
    after one that is not timed, as a host that has waited for the device is slow at first."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(9):
        for name, run in variants.items():
            torch.cuda.synchronize()
            for _ in range(calls):
                run()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return {name: float(np.median(values)) for name, values in times.items()}


if __name__ == "__main__":
    main()
