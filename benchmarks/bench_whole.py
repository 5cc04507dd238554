"""Working out which requests stay whole: ``partition="whole"`` beside zigzag, on a CPU.

python benchmarks/bench_whole.py
"""

from __future__ import annotations

from functools import partial

import numpy as np
from timing import interleaved, percentiles, write_report

import cpattn
from cpattn.metadata.partition import PARTITIONS

SEEDS = 8
FEW = ("decodes", "ragged, 300 to 1,500", "log-normal over prefixes")
MANY = (
    "512 each",
    "decodes",
    "ragged, 300 to 1,500",
    "ragged over prefixes of about 4k",
    "log-normal, about 1k",
    "log-normal over prefixes, 4 of 32k and more, half decodes",
)
# How many requests, and of what kind.
BATCHES = [(number, kind) for number in (1, 8, 16) for kind in FEW] + [(256, kind) for kind in MANY]


def batches(requests: int, kind: str) -> list[list[tuple[int, int]]]:
    """Some batches of so many requests, as lists of (prefix_len, extend_len)."""
    return [_batch(requests, kind, np.random.default_rng(seed)) for seed in range(SEEDS)]


def _batch(requests: int, kind: str, rng: np.random.Generator) -> list[tuple[int, int]]:
    prefix, extend = np.zeros(requests, dtype=int), np.full(requests, 512)
    if kind.startswith("ragged"):
        extend = rng.integers(300, 1500, requests)
    if kind.startswith("log-normal"):
        extend = np.minimum(rng.lognormal(np.log(1000), 1.0, requests), 131072).astype(int) + 1
    if "32k" in kind:
        extend[:4] = rng.integers(32768, 131073, 4)
        extend[requests // 2 :] = 1
    if "prefixes" in kind or kind == "decodes":
        prefix = rng.lognormal(np.log(4000), 1.0, requests).astype(int)
    if kind == "decodes":
        extend[:] = 1
    return list(zip(prefix.tolist(), extend.tolist(), strict=True))


def main() -> None:
    rows = []
    for requests, kind in BATCHES:
        for cp_size in (2, 8, 64):
            medians: dict[str, list[float]] = {"zigzag": [], "whole": []}
            cuts, pairs = [], []
            for batch in batches(requests, kind):
                lengths = np.array(batch, dtype=np.int64)
                variants = {name: partial(PARTITIONS[name], lengths, cp_size, "balanced", None) for name in medians}
                for name, taken in interleaved(variants, seconds=0.3).items():
                    medians[name].append(float(np.median(taken)))
                plan = cpattn.plan(batch, cp_size, partition="whole")
                cuts.append(int((np.bincount(plan.chunk_table.request) > 1).sum()))
                pairs.append(plan.pair_imbalance)
            in_ms = [percentiles(np.array(of_batches), 1e-3) for of_batches in medians.values()]
            rows.append([str(requests), kind, str(cp_size), *in_ms, f"{np.median(cuts):g}", f"{np.median(pairs):.4f}"])
    write_report(
        "whole_cpu",
        "Working out a layout that leaves requests whole",
        ["requests", "kind", "cp_size", "zigzag, ms", "whole, ms", "cut by whole", "pairs, max / mean"],
        rows,
        f"From the batch as an array to the chunks of all ranks. Of each of {SEEDS} batches the median run counts; the table has "
        "the median of those, with their 20th to 80th percentile. The last two columns are medians as well: requests cut, those "
        "larger than a rank's share counted; and the pairs of the busiest rank, over the mean.",
    )


if __name__ == "__main__":
    main()
