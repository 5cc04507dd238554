"""Backends beside each other through cp_attention, on one GPU: dense, ragged, over pages, decoding, merging, with sinks; the host's
time as well.

It is what decides their order in ``"auto"``. Backends whose packages do not fit one machine are timed on two, both times beside
``triton``.

PYTHONPATH=. python benchmarks/bench_backends.py [--backends triton flash_attn3] [--name backends_gpu_fa3] [--results FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_cases import HEAD_DIM, HEADS, KV_HEADS
from bench_layer import host_seconds
from bench_serving import GPU, one_rank_of
from gpu_report import RESULTS, write_gpu_report
from gpu_timing import gpu_seconds
from torch import Tensor

import cpattn
from cpattn.attention import flash_attn3
from cpattn.attention.backend import AttentionOptions
from cpattn.attention.fa3_build import find_build
from cpattn.exchange.step_spans import causal_spans
from cpattn.keys import Keys
from cpattn.testing import SoloCommunicator

BACKENDS = ["flash_attn4", "flash_attn3", "triton"]
HEADER = ["batch", "backend", "graph p20, us", "graph p50, us", "graph p80, us", "to triton", "eager p50, us", "host a call, us"]


@dataclass(frozen=True)
class Case:
    """A batch over pages of so many tokens, or packed: of one rank that has everything, or one rank's part of it."""

    batch: list[tuple[int, int]]
    page_size: int | None = None
    cp_size: int = 1
    strategy: str = "all_gather"
    sinks: bool = False
    window: int | None = None


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
    "1 x 8k, ring of 4": Case([(0, 8192)], cp_size=4, strategy="ring"),
    "1 x 32k, ring of 4": Case([(0, 32768)], cp_size=4, strategy="ring"),
    "1 x 128k, ring of 8": Case([(0, 131072)], cp_size=8, strategy="ring"),
    "8 x (8k + 2k), ring of 4": Case([(8192, 2048)] * 8, cp_size=4, strategy="ring"),
    "64 x 512, ring of 4": Case([(0, 512)] * 64, cp_size=4, strategy="ring"),
    "8 x (8k + 1k), pages of 64, pass_q of 4": Case([(8192, 1024)] * 8, 64, 4, "pass_q"),
    "256 x (8k + 1), pages of 64, pass_q of 4": Case([(8192, 1)] * 256, 64, 4, "pass_q"),
    "32 x (8k + 1), pages of 64, pass_q of 4": Case([(8192, 1)] * 32, 64, 4, "pass_q"),
    "4 x (32k + 1), pages of 64, pass_q of 4": Case([(32768, 1)] * 4, 64, 4, "pass_q"),
    "1 x (128k + 1), pages of 64, pass_q of 4": Case([(131072, 1)], 64, 4, "pass_q"),
    "1 x 1k, sinks": Case([(0, 1024)], sinks=True),
    "1 x 32k, sinks": Case([(0, 32768)], sinks=True),
    "1 x 32k, sinks and a window of 1k": Case([(0, 32768)], sinks=True, window=1024),
    "64 x 512, sinks": Case([(0, 512)] * 64, sinks=True),
    "8 x (8k + 1k), pages of 64, sinks": Case([(8192, 1024)] * 8, 64, sinks=True),
    "256 x (8k + 1), pages of 64, sinks": Case([(8192, 1)] * 256, 64, sinks=True),
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
        f"bf16, {HEADS} query and {KV_HEADS} key/value heads, D = {HEAD_DIM}, cp_size 1, or one rank in the middle of a ring or of pass_q, "
        "whose cache is sharded, with transfers as local copies; over pages the new keys are written as well, and "
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
    if case.strategy == "pass_q":
        assert case.page_size == GPU.page_size

        def step(name: str) -> Callable[[], Any]:
            return one_rank_of(case.batch, replace(GPU, backend=name), case.cp_size, "pass_q", sharded=True).run

        return able(step, backends), {}
    plan = cpattn.plan(case.batch, case.cp_size)
    meta = plan.metadata(case.cp_size // 2, "cuda")
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
    options: dict[str, Any] = {
        "kv_cache": cache, "group": SoloCommunicator(meta.cp_rank, case.cp_size), "strategy": case.strategy, "window": case.window,
        "sinks": torch.randn(HEADS, device="cuda") if case.sinks else None,
    }  # fmt: skip

    def prepare(name: str) -> Callable[[], Any]:
        run = partial(cpattn.cp_attention, q, k, v, meta, backend=name, **options)
        run()
        return run

    calls = able(prepare, backends)
    if case.cp_size > 1 or case.sinks:
        return calls, {}
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


def able(prepare: Callable[[str], Callable[[], Any]], backends: list[str]) -> dict[str, Callable[[], Any]]:
    """The calls of the backends that can serve them."""
    calls = {}
    for name in backends:
        try:
            run = prepare(name)
        except cpattn.UnsupportedError as refusal:
            print(name, refusal)
            continue
        calls[name] = run
    return calls


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


if __name__ == "__main__":
    main()
