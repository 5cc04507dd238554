"""Backends beside each other through cp_attention, on one GPU: dense, ragged, over pages, decoding; the host's time as well.

It is what decides their order in ``"auto"``. Backends whose packages do not fit one machine are timed on two, both times beside
``triton``.

PYTHONPATH=. python benchmarks/bench_backends.py [--backends triton flash_attn3] [--name backends_gpu_fa3] [--results FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_cases import HEAD_DIM, HEADS, KV_HEADS
from bench_layer import host_seconds
from gpu_report import RESULTS, write_gpu_report
from gpu_timing import gpu_seconds
from torch import Tensor

import cpattn
from cpattn.attention import flash_attn3
from cpattn.attention.backend import AttentionOptions
from cpattn.attention.fa3_build import find_build
from cpattn.exchange.step_spans import causal_spans
from cpattn.keys import Keys

BACKENDS = ["flash_attn4", "flash_attn3", "triton"]
HEADER = ["batch", "backend", "graph p20, us", "graph p50, us", "graph p80, us", "to triton", "eager p50, us", "host a call, us"]


@dataclass(frozen=True)
class Case:
    """A batch of one rank that has everything; over pages of so many tokens, or packed."""

    batch: list[tuple[int, int]]
    page_size: int | None = None


def _lengths(count: int, low: int, high: int) -> list[int]:
    """Spread evenly on a logarithmic scale, in an order of no meaning."""
    lengths = np.geomspace(low, high, count).astype(int)
    return [int(length) for length in np.random.default_rng(0).permutation(lengths)]


CASES = {
    "1 x 1k": Case([(0, 1024)]),
    "1 x 32k": Case([(0, 32768)]),
    "8 x (8k + 2k)": Case([(8192, 2048)] * 8),
    "64 x 512": Case([(0, 512)] * 64),
    "1 x (30k + 2k), pages of 64": Case([(30720, 2048)], 64),
    "8 x (8k + 1k), pages of 128": Case([(8192, 1024)] * 8, 128),
    "256 x (8k + 1), pages of 64": Case([(8192, 1)] * 256, 64),
    "32 x (8k + 1), pages of 64": Case([(8192, 1)] * 32, 64),
    "4 x (32k + 1), pages of 64": Case([(32768, 1)] * 4, 64),
    "1 x (128k + 1), pages of 64": Case([(131072, 1)], 64),
    "64 x (0.2k to 32k + 1), pages of 64": Case([(length, 1) for length in _lengths(64, 200, 32768)], 64),
    "256 x (8k + 1), pages of 16": Case([(8192, 1)] * 256, 16),
    "128 x (8k + 1), 30k + 1,920, pages of 64": Case([(8192, 1)] * 128 + [(30720, 1920)], 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--cases", nargs="+", default=[""], help="words of which a batch's name has any")
    parser.add_argument("--name", default="backends_gpu")
    options = parser.parse_args()
    names = [name for name in options.backends if cpattn.BACKENDS[name].unavailable() is None]
    table: list[list[str]] = []
    for name, case in CASES.items():
        if any(word in name for word in options.cases):
            table += measure(name, case, names, options.rounds)
            torch.cuda.empty_cache()
    write_gpu_report(
        options.name,
        "Backends through cp_attention",
        HEADER,
        table,
        f"bf16, {HEADS} query and {KV_HEADS} key/value heads, D = {HEAD_DIM}, cp_size 1; over pages the new keys are written as well, and "
        "a backend that does not read pages of that size copies them first. Graphs and eager calls are medians of runs interleaved "
        "in random order, the L2 cache flushed before each, after a rest. Eager: a single call to a device that waits for it. Host: the "
        "median of means over calls one after another that are not waited for. Launches alone, of flash_attn3: rows split into at most so "
        "many parts, or (`kernel's choice`) as its own rule has it, and heads packed or not.",
        options.results,
    )


def measure(name: str, case: Case, backends: list[str], rounds: int) -> list[list[str]]:
    calls, launches = variants_of(case, backends)
    graphs = gpu_seconds(calls | launches, rounds)
    eager = gpu_seconds(calls, rounds, graph=False)
    host = host_seconds(calls, calls=20 if sum(extend for _, extend in case.batch) <= 2048 else 3)
    # The median of quotients of one round each, as a card's clock changes.
    beside = {variant: float(np.median(graphs[variant] / graphs["triton"])) if "triton" in graphs else 1.0 for variant in graphs}
    lines = []
    for variant, seconds in graphs.items():
        cells = [f"{value * 1e6:,.1f}" for value in np.percentile(seconds, [20, 50, 80])]
        times = [f"{np.median(eager[variant]) * 1e6:,.0f}", f"{host[variant] * 1e6:,.0f}"] if variant in calls else ["", ""]
        lines.append([name, variant, *cells, f"{beside[variant]:.3f}", *times])
        print(lines[-1], flush=True)
    return lines


def variants_of(case: Case, backends: list[str]) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Calls of cp_attention by backend, and launches of flash_attn3 alone in different ways."""
    plan = cpattn.plan(case.batch, 1)
    meta = plan.metadata(0, "cuda")
    torch.manual_seed(0)
    q, k, v = (normal(meta.rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache: cpattn.PackedKV | cpattn.PagedKV
    if case.page_size is None:
        cache = cpattn.PackedKV(*(normal(plan.num_prefix_tokens, KV_HEADS, HEAD_DIM) for _ in range(2)))
    else:
        counts = -(-plan.total_lens // case.page_size)
        table = np.zeros((len(case.batch), int(counts.max())), dtype=np.int32)
        table[np.arange(table.shape[1]) < counts[:, None]] = np.random.default_rng(0).permutation(int(counts.sum()))
        shape = (int(counts.sum()), case.page_size, KV_HEADS, HEAD_DIM)
        cache = cpattn.PagedKV(normal(*shape), normal(*shape), torch.from_numpy(table).cuda())
    calls: dict[str, Callable[[], Any]] = {}
    for name in backends:
        run = partial(cpattn.cp_attention, q, k, v, meta, kv_cache=cache, strategy="all_gather", backend=name)
        try:
            run()
        except cpattn.UnsupportedError as refusal:
            print(name, refusal)
            continue
        calls[name] = run
    launches: dict[str, Callable[[], Any]] = {}
    if "flash_attn3" in calls and isinstance(cache, cpattn.PagedKV) and find_build().has("PAGEDKV"):
        spans = causal_spans(meta, paged=True)
        ours = flash_attn3.num_splits(spans, HEADS, KV_HEADS, HEAD_DIM, None, flash_attn3.multiprocessors(q.device))
        assert cache.v_pages is not None
        launch = partial(
            flash_attn3.launch, q, Keys(cache.k_pages, cache.v_pages, cache.page_table), spans, AttentionOptions(HEAD_DIM**-0.5)
        )
        for label, splits in {"1 part": 1, f"{ours} parts (cpattn's choice)": ours, "kernel's choice": 0}.items():
            launches[f"flash_attn3 launch, {label}"] = partial(launch, splits, None)
    elif "flash_attn3" in calls and isinstance(cache, cpattn.PackedKV) and not plan.num_prefix_tokens:
        spans = causal_spans(meta, paged=False)
        launch = partial(flash_attn3.launch, q, Keys(k, v), spans, AttentionOptions(HEAD_DIM**-0.5), 1)
        for packed in (True, False):
            launches[f"flash_attn3 launch, heads {'packed' if packed else 'not packed'}"] = partial(launch, packed)
    return calls, launches


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


if __name__ == "__main__":
    main()
