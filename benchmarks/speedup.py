"""How many times as fast as one GPU a call is over several, ours and each peer's, from the results of bench_peers.py.

PYTHONPATH=. python benchmarks/speedup.py [--results FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peers import report

RESULTS = Path(__file__).parent / "results"
GPUS = (2, 4)
# One request of each length; shorter ones are faster on one GPU.
BATCHES = {"1 x 8k": "8k tokens", "1 x 32k": "32k tokens", "1 x 128k": "128k tokens"}
OURS = "cpattn auto"


def speedups(results: Path, batch: str) -> dict[str, dict[int, float]]:
    """By variant and number of GPUs, as CUDA graphs, against the fastest on one GPU in the same run. Peers without a graph are left out."""
    found: dict[str, dict[int, float]] = {}
    for gpus in GPUS:
        lines = report.read(results / f"peers_{gpus}_gpus")
        alone = report.best(lines, batch, "one GPU", "graph")
        for line in lines:
            time = line.median("graph")
            if alone is not None and line.batch == batch and line.kind in ("auto", "peer") and time is not None:
                found.setdefault(line.variant, {1: 1.0})[gpus] = alone[1] / time
    return found


def draw(results: Path) -> None:
    """A panel a length. Needs matplotlib."""
    import matplotlib.pyplot as plt
    from gpu_report import COLOURS

    figure, places = plt.subplots(1, len(BATCHES), sharey=True, figsize=(10, 4.6), layout="constrained")
    numbers = (1, *GPUS)
    for axes, (batch, title) in zip(places, BATCHES.items(), strict=True):
        axes.plot(numbers, numbers, color="#999999", ls="--", lw=1, label="as many times as there are GPUs")
        for i, (variant, points) in enumerate(speedups(results, batch).items()):
            width = 2.4 if variant == OURS else 1.2
            axes.plot(list(points), list(points.values()), marker="os^Dvx"[i % 6], color=COLOURS[i % len(COLOURS)], lw=width, label=variant)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.set_yticks(numbers)
        axes.set_xlabel("GPUs")
        axes.set_title(f"one request of {title}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    places[0].set_ylabel("times as fast as one GPU")
    handles, names = places[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    figure.suptitle("A layer's attention over two H200 and four H100, as a CUDA graph")
    figure.savefig(results / "speedup.png", dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    draw(parser.parse_args().results)


if __name__ == "__main__":
    main()
