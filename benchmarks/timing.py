"""Timing for the CPU benchmarks: variants interleaved, each reported by its percentiles, with all that the figures depend on."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(variants: Mapping[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, np.ndarray]:
    """Runs the variants in turn for about that many seconds in all; returns the times of each, in seconds."""
    for run in variants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def percentiles(times: np.ndarray, unit: float = 1e-6) -> str:
    """Median, with the 20th and 80th percentile behind it."""
    p20, p50, p80 = np.percentile(times, [20, 50, 80]) / unit
    return f"{p50:,.4g} ({p20:,.4g} to {p80:,.4g})"


def write_report(name: str, title: str, header: list[str], rows: list[list[str]], notes: str, results: Path = RESULTS) -> None:
    """Prints a Markdown report and writes it to ``name.md`` in that folder, with the machine, the versions and the command."""
    lines = [f"# {title}", "", f"`{' '.join(['python', *sys.argv])}`", "", machine(), "", notes, ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows), ""]
    text = "\n".join(lines)
    print(text)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.md").write_text(text)


def machine() -> str:
    """The processor and the versions, in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), model)
    return (
        f"{model}, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}. "
        "Times are medians, with the 20th to 80th percentile; variants ran interleaved."
    )
