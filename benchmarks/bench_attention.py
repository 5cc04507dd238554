"""One rank's attention launch on a GPU: every backend that is there, front and back chunks in two launches and all in one.

Backends whose packages do not fit one machine are timed on two: ``--add`` puts the second's lines beside the first's, those of
``triton`` as "triton beside ...", by which the two can be compared.

PYTHONPATH=. python benchmarks/bench_attention.py [--results FOLDER] [--backends triton flash_attn3 --add]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_cases import BATCHES, HEAD_DIM, HEADS, KV_HEADS, all_gather_spans, tensors
from gpu_report import RESULTS, draw_bars, write_gpu_report
from gpu_timing import gpu_seconds, sustained_seconds
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.keys import Keys
from cpattn.spans import Spans

BACKENDS = ["flash_attn4", "flash_attn3", "flash_attn2", "torch_flash", "triton"]
# The backend that is timed on every machine.
COMMON = "triton"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--add", action="store_true", help="to the results that are there")
    parser.add_argument("--draw", action="store_true", help="only draw the results that are there, which needs no GPU")
    options = parser.parse_args()
    if not options.draw:
        measure(options.results, options.rounds, options.backends, options.add)
    draw(options.results)


def measure(results: Path, rounds: int, names: list[str], add: bool) -> None:
    backends = [cpattn.BACKENDS[name] for name in names if cpattn.BACKENDS[name].unavailable() is None]
    others = ", ".join(name for name in names if name != COMMON)
    labels = {name: f"{name} beside {others}" if add and name == COMMON else name for name in names}
    kept = [line for line in (lines_of(results) if add else []) if line[1].rpartition(", ")[0] not in labels.values()]
    table: list[list[str]] = []
    for name, batch in BATCHES.items():
        meta = batch.metadata()
        q, k, v = tensors(batch, meta)
        local_q, local_kv = (q.new_empty(meta.rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS))
        chosen = next(backend for backend, why in cpattn.explain(local_q, local_kv, local_kv, meta).items() if why.startswith("chosen"))
        variants: dict[str, Callable[[], Any]] = {}
        for backend in backends:
            for launches in (2, 1) if meta.max_seqlen_q > 1 else (1,):
                halves = ["both"] if launches == 1 else ["front", "back"]
                calls = [
                    (q[index] if launches == 2 else q, Keys(k, v), spans)
                    for index, spans in (all_gather_spans(meta, half) for half in halves)
                ]
                variants[f"{labels[backend.name]}, {'one launch' if launches == 1 else 'two launches'}"] = partial(run_all, backend, calls)
        times, sustained = gpu_seconds(variants, rounds), sustained_seconds(variants)
        tflops = {variant: batch.flops() / seconds / 1e12 for variant, seconds in times.items()}
        for variant, seconds in times.items():
            low, median, high = np.percentile(seconds * 1e3, [20, 50, 80])
            rate = f"{np.median(tflops[variant]):.0f}"
            mark = "auto" if variant == f"{labels.get(chosen, chosen)}, one launch" else ""
            held = f"{batch.flops() / sustained[variant] / 1e12:.0f}"
            table.append([name, variant, mark, f"{low:.4f}", f"{median:.4f}", f"{high:.4f}", rate, held, bandwidth(name, median)])
        print(name, {variant: round(float(np.median(values))) for variant, values in tflops.items()}, flush=True)
        torch.cuda.empty_cache()
    write_gpu_report(
        "attention_gpu",
        "One rank's attention launch",
        ["batch", "backend", "", "p20, ms", "p50, ms", "p80, ms", "TFLOP/s", "sustained TFLOP/s", "GB/s of K and V"],
        sorted(kept + table, key=lambda line: list(BATCHES).index(line[0])),
        f"bf16, {HEADS} query and {KV_HEADS} key/value heads, D = {HEAD_DIM}; the rank in the middle, after an all-gather, without the "
        "transfer. Only causal work counts; of decode, which is bound by memory, also the bytes of K and V that are read once, over the "
        "median time. Each variant is a CUDA graph; variants ran interleaved in random order, the L2 cache flushed "
        "before each, after a rest of twice what the last one took: a card at its power limit slows down whatever comes next. "
        "Sustained: each by itself, again and again for a quarter of a second without a rest. "
        "Two launches attend the front and the back chunks separately, from queries that lie ready in two tensors."
        + (f" Lines of {', '.join(labels.values())} are of this machine; the others were there before." if add else ""),
        results,
    )


def lines_of(results: Path) -> list[list[str]]:
    """The table's lines."""
    with (results / "attention_gpu.csv").open() as file:
        _, *lines = csv.reader(file)
    return lines


def bandwidth(name: str, milliseconds: float) -> str:
    """GB/s of K and V that a launch over a decode batch reads; "" for other batches, which are bound by their work."""
    batch = BATCHES[name]
    return f"{batch.bytes_read() / milliseconds / 1e6:.0f}" if batch.is_decode else ""


def draw(results: Path) -> None:
    """The picture of the table's rates: TFLOP/s, and for decode batches GB/s on an axis of their own."""
    lines = lines_of(results)
    panels: dict[str, dict[str, dict[str, float]]] = {"TFLOP/s of causal work": {}, "GB/s of keys and values read": {}}
    work, memory = panels.values()
    for batch, variant, _mark, _low, median, _high, rate, *_ in lines:
        if " beside " in variant:
            continue
        read = bandwidth(batch, float(median))
        (memory if read else work).setdefault(batch, {})[variant] = float(read or rate)
    draw_bars(results / "attention_gpu.png", "One rank's attention launch, bf16, 32/8 heads, D = 128", panels)


def run_all(backend: Backend, calls: list[tuple[Tensor, Keys, Spans]]) -> None:
    for q, keys, spans in calls:
        backend.attend(q, keys, spans, AttentionOptions(scale=HEAD_DIM**-0.5), q.dtype)


if __name__ == "__main__":
    main()
