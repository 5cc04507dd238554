"""What the cost model says of each choice: strategy, partition, transport, backend. Computed by cpattn.estimate, not measured.

PYTHONPATH=. python benchmarks/choosing_model.py [--results FOLDER]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch

import cpattn

RESULTS = Path(__file__).parent / "results"
# Of as many GPUs as transfers were measured between.
MACHINE, RANKS = "h100-nvlink", 4
LENGTHS = [2**n for n in range(10, 18)]
NEW_TOKENS, ALL_TOKENS = 2048, 65536
HEADER = ["choice", "tokens", "of", "us"]
Times = dict[str, float]


def estimates(plan: cpattn.Plan, cache: bool = False) -> list[cpattn.Estimate]:
    """Of all ways of a call: 32 query and 8 KV heads of 128 in bf16; a cache has pages of 64 tokens."""
    heads, pages = (32, 8, 128, 128), {"cache": "paged", "page_size": 64} if cache else {}
    problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, *heads, **pages)  # type: ignore[arg-type]
    return [one for one in cpattn.estimate(plan, problem, MACHINE) if one.overlap == 1]


def fastest(found: list[cpattn.Estimate], attribute: str) -> Times:
    """By what the attribute is, the least time in us as a CUDA graph, whatever the other choices are."""
    times: Times = {}
    for one in found:
        name = str(getattr(one, attribute))
        times[name] = min(times.get(name, float("inf")), one.graph * 1e6)
    return times


def of_prompt(attribute: str, strategies: set[str]) -> Callable[[int], Times]:
    def times(length: int) -> Times:
        found = estimates(cpattn.plan([(0, length)], RANKS))
        return fastest([one for one in found if one.strategy in strategies], attribute)

    return times


def over_shards(prefix: int) -> Times:
    plan = cpattn.plan([(prefix, NEW_TOKENS)], RANKS, prefix_shards=[[prefix // RANKS] * RANKS])
    return fastest(estimates(plan, cache=True), "strategy")


def by_partition(length: int) -> Times:
    batch = [(0, length)] * (ALL_TOKENS // length)
    plans = {name: cpattn.plan(batch, RANKS, partition=name) for name in ("zigzag", "whole")}
    return {name: min(one.graph * 1e6 for one in estimates(plan)) for name, plan in plans.items()}


# By its title, what the candidates of a choice take, by a number of tokens. Those of the last two are with an all-gather.
CHOICES = {
    "strategy, by length of a prompt": of_prompt("strategy", {"all_gather", "ring", "ulysses"}),
    f"strategy, sharded cache, {NEW_TOKENS:,} new, by cached tokens": over_shards,
    f"partition of {ALL_TOKENS // 1024}k tokens, by length of the requests": by_partition,
    "transport, by length of a prompt": of_prompt("transport", {"all_gather"}),
    "backend, by length of a prompt": of_prompt("backend", {"all_gather"}),
}


def rows() -> list[list[str]]:
    of_all = [(choice, tokens, times(tokens)) for choice, times in CHOICES.items() for tokens in LENGTHS if fits(choice, tokens)]
    return [[choice, str(tokens), name, f"{us:.1f}"] for choice, tokens, times in of_all for name, us in times.items()]


def fits(choice: str, tokens: int) -> bool:
    return not choice.startswith("partition") or tokens <= ALL_TOKENS


def write(results: Path) -> None:
    with (results / "choosing_model.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows()])


def draw(results: Path) -> None:
    """A panel a choice. Needs matplotlib."""
    import matplotlib.pyplot as plt
    from gpu_report import COLOURS

    found: dict[str, dict[str, dict[int, float]]] = {}
    with (results / "choosing_model.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["choice"], {}).setdefault(row["of"], {})[int(row["tokens"])] = float(row["us"])
    figure, places = plt.subplots(3, 2, figsize=(10, 9.5), layout="constrained")
    for axes, (choice, curves) in zip(places.flat, found.items(), strict=False):
        least = {
            tokens: min(times[tokens] for times in curves.values() if tokens in times) for times in curves.values() for tokens in times
        }
        for i, (name, times) in enumerate(curves.items()):
            over = [us / least[tokens] for tokens, us in times.items()]
            axes.plot(list(times), over, marker="os^Dvx"[i % 6], color=COLOURS[i % len(COLOURS)], label=name)
        ticks = sorted(least)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tokens // 1024}k" for tokens in ticks])
        axes.set_ylim(0.9, 3)
        axes.set_ylabel("times the fastest")
        axes.set_title(choice, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    places.flat[-1].set_visible(False)
    figure.suptitle(f"What the cost model says over {RANKS} H100 of a host, as CUDA graphs (computed)")
    figure.savefig(results / "choosing_model.png", dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    write(options.results)
    draw(options.results)


if __name__ == "__main__":
    main()
