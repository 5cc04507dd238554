"""The setting that MagiAttention publishes figures for, and ours beside them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from peers.report import Line

from scaling.results import Results, best_mode, fastest

# TFLOP/s a GPU on 8 x H100, forward, 64k tokens in all, 64 query and 8 key/value heads, D = 128: causal, varlen causal. Read from its
# charts: docs/source/blog/cp_benchmark.md, "Distributed Level", of https://github.com/SandAI-org/MagiAttention at commit 2c6413571c2c.
PUBLISHED = {
    "MagiAttention, its own exchange": (645, 459),
    "MagiAttention's Ulysses": (602, 278),
    "MagiAttention's all-gather": (601, 289),
    "MagiAttention's ring": (421, 89),
}
HEADER = ["what", "GPUs", *(f"{mask}, {what}" for mask in ("causal", "varlen causal") for what in ("TFLOP/s a GPU", "of the launch alone"))]


def beside_published(results: Results, masks: list[list[str]], ranks: int) -> list[list[str]]:
    """Our rates over the batches of each mask beside the published ones.

    Of several batches it is all their work over all their time; one that was not timed leaves the cell empty.
    """
    ours: dict[str, Callable[[Line], bool]] = {
        "fastest launch alone": lambda line: line.kind == "launch",
        **{f"cpattn auto, {partition}": _autos(results, partition) for partition in ("zigzag", "whole")},
        "cpattn, the fastest way": lambda line: line.kind in ("auto", "fixed"),
    }
    rates = {what: [_rate(results, batches, ranks, takes) for batches in masks] for what, takes in ours.items()}
    rows = []
    for what, found in rates.items():
        cells = []
        for rate, alone in zip(found, rates["fastest launch alone"], strict=True):
            cells += [f"{rate:,.0f}" if rate else "", f"{rate / alone:.3f}" if rate and alone else ""]
        rows.append([what, str(ranks), *cells])
    return rows + [[f"{what} (cited)", "8", str(causal), "", str(varlen), ""] for what, (causal, varlen) in PUBLISHED.items()]


def rates_drawn(rows: list[list[str]]) -> dict[str, dict[str, float]]:
    """The bars of each mask."""
    found: dict[str, dict[str, float]] = {"causal": {}, "varlen causal": {}}
    for what, ranks, causal, _, varlen, _ in rows:
        for mask, cell in (("causal", causal), ("varlen causal", varlen)):
            if cell:
                found[mask][f"{what}, {ranks} GPUs"] = float(cell.replace(",", ""))
    return found


def draw_published(path: Path) -> None:
    """Bars of the table in ``path.csv``."""
    from gpu_report import draw_bars

    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    draw_bars(path.with_suffix(".png"), "64k tokens, 64/8 heads, D = 128, forward", {"TFLOP/s a GPU": rates_drawn(rows)})


def _autos(results: Results, partition: str) -> Callable[[Line], bool]:
    return lambda line: line.kind == "auto" and results.way(line).partition == partition


def _rate(results: Results, batches: list[str], ranks: int, takes: Callable[[Line], bool]) -> float | None:
    flops = time = 0.0
    for batch in batches:
        lines = [line for line in results.of(batch, ranks=ranks) if takes(line)]
        found = fastest(lines, "graph") or fastest(lines, "eager")
        if found is None:
            return None
        flops += results.cases[batch].flops
        time += np.median(found.times[best_mode(found)])
    return flops / (time * 1e6 * ranks) if time else None
