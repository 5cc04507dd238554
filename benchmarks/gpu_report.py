"""GPU benchmark results as a Markdown table, a CSV and a picture under ``results/``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from gpu_timing import gpu_machine

RESULTS = Path(__file__).parent / "results"


def write_gpu_report(name: str, title: str, header: list[str], rows: list[list[str]], notes: str, results: Path = RESULTS) -> None:
    """Prints the table and writes ``name.md`` and ``name.csv``, with the device, the versions and the command."""
    results.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", f"`python {' '.join(sys.argv)}`", "", gpu_machine(), "", notes, ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows), ""]
    text = "\n".join(lines)
    print(text, flush=True)
    (results / f"{name}.md").write_text(text)
    with (results / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def draw_bars(path: Path, title: str, unit: str, groups: dict[str, dict[str, float]], digits: int = 0) -> None:
    """Bars, a group for each key, a colour for each inner key; needs matplotlib, and is left out without it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    labels = list(dict.fromkeys(label for bars in groups.values() for label in bars))
    figure, axes = plt.subplots(figsize=(2.2 + 1.9 * len(groups), 5))
    width = 0.84 / len(labels)
    # Okabe and Ito's colours, which colour-blind readers can tell apart; hatching tells them apart in print.
    colours = ["#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#999999", "#F0E442"]
    for i, label in enumerate(labels):
        heights = [bars.get(label, 0.0) for bars in groups.values()]
        positions = [group + (i - (len(labels) - 1) / 2) * width for group in range(len(groups))]
        drawn = axes.bar(
            positions, heights, width, label=label, color=colours[i % len(colours)], hatch="//" if i % 2 else None, edgecolor="white"
        )
        axes.bar_label(drawn, [f"{height:.{digits}f}" if height else "" for height in heights], fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.savefig(path, dpi=130, bbox_inches="tight")
