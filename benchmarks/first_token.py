"""The picture of bench_nano_vllm.py, which needs no engine."""

from __future__ import annotations

import csv
from pathlib import Path

from gpu_report import draw_lines

# Of the table: the line of mixed requests, and what ends the names of columns of times to the first token.
MIX = "mix"
FIRST = ", ms to the first token"


def draw(path: Path) -> None:
    """A picture beside a table: what a token of a prompt takes until the first token of the answer, by the prompt's length."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["prompt"] == MIX:
            continue
        length = int(row["prompt"].removesuffix("k")) * (1024 if row["prompt"].endswith("k") else 1)
        for column, cell in row.items():
            if column.endswith(FIRST) and cell:
                curves.setdefault(column.removesuffix(FIRST), {})[length] = 1e3 * float(cell.replace(",", "")) / length
    axes = ("prompt, tokens", "time to the first token, us a token of the prompt")
    draw_lines(path.with_suffix(".png"), "nano-vllm, a Qwen3 in the shape of Qwen3-0.6B", axes, curves)
