"""GPU benchmark results as a Markdown table, a CSV and a picture under ``results/``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from gpu_timing import gpu_machine

RESULTS = Path(__file__).parent / "results"
# Okabe and Ito's colours, which colour-blind readers can tell apart; hatching tells them apart in print.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#999999", "#F0E442")


def write_gpu_report(
    name: str, title: str, header: list[str], rows: list[list[str]], notes: str, results: Path = RESULTS, prints: bool = True
) -> None:
    """Prints the table and writes ``name.md`` and ``name.csv``, with the device, the versions and the command."""
    results.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", f"`python {' '.join(sys.argv)}`", "", gpu_machine(), "", notes, ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows), ""]
    text = "\n".join(lines)
    if prints:
        print(text, flush=True)
    (results / f"{name}.md").write_text(text)
    with (results / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def draw_bars(path: Path, title: str, panels: dict[str, dict[str, dict[str, float]]], digits: int = 0) -> None:
    """Bars: for each unit a panel with an axis of its own, in it a group for each key, and a colour for each inner key, the
    same in all panels. Needs matplotlib, and is left out without it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    panels = {unit: groups for unit, groups in panels.items() if groups}
    labels = list(dict.fromkeys(label for groups in panels.values() for bars in groups.values() for label in bars))
    sizes = [len(groups) for groups in panels.values()]
    size = (2.2 + 1.9 * sum(sizes), 5)
    figure, places = plt.subplots(1, len(panels), squeeze=False, figsize=size, width_ratios=sizes, layout="constrained")
    for axes, (unit, groups) in zip(places[0], panels.items(), strict=True):
        _draw_panel(axes, unit, groups, labels, digits)
    figure.suptitle(title)
    # Of all panels: one may have bars that another lacks.
    drawn: dict[str, Any] = {}
    for axes in places[0]:
        handles, names = axes.get_legend_handles_labels()
        drawn |= {name: handle for name, handle in zip(names, handles, strict=True) if name not in drawn}
    figure.legend([drawn[label] for label in labels], labels, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def draw_lines(path: Path, title: str, axes_titles: tuple[str, str], curves: dict[str, dict[int, float]]) -> None:
    """Lines: for each key one over numbers that double, such as lengths. Needs matplotlib, and is left out without it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (label, points) in enumerate(curves.items()):
        axes.plot(list(points), list(points.values()), marker="os^D"[number % 4], color=COLOURS[number % len(COLOURS)], label=label)
    lengths = sorted({length for points in curves.values() for length in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in lengths])
    axes.set_xlabel(axes_titles[0])
    axes.set_ylabel(axes_titles[1])
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _draw_panel(axes: Any, unit: str, groups: dict[str, dict[str, float]], labels: list[str], digits: int) -> None:
    here = [label for label in labels if any(label in bars for bars in groups.values())]
    width = 0.84 / len(labels)
    for i, label in enumerate(here):
        number = labels.index(label)
        heights = [bars.get(label, 0.0) for bars in groups.values()]
        positions = [group + (i - (len(here) - 1) / 2) * width for group in range(len(groups))]
        drawn = axes.bar(
            positions, heights, width, label=label, color=COLOURS[number % len(COLOURS)], hatch="//" if number % 2 else None,
            edgecolor="white",
        )  # fmt: skip
        axes.bar_label(drawn, [f"{height:,.{digits}f}" if height else "" for height in heights], fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(unit)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
