"""Working out which requests stay whole: ``partition="whole"`` beside zigzag, on a CPU.

python benchmarks/bench_whole.py
"""

from __future__ import annotations

from functools import partial

import numpy as np
from timing import interleaved, percentiles, write_report

import cpattn
from cpattn.metadata.partition import PARTITIONS

REQUESTS = 256
SEEDS = 8
KINDS = (
    "512 each",
    "decodes",
    "ragged, 300 to 1,500",
    "ragged over prefixes of about 4k",
    "log-normal, about 1k",
    "log-normal over prefixes, 4 of 32k and more, half decodes",
)


def batches(kind: str) -> list[list[tuple[int, int]]]:
    """Some batches of 256 requests each, as lists of (prefix_len, extend_len)."""
    return [_batch(kind, np.random.default_rng(seed)) for seed in range(SEEDS)]


def _batch(kind: str, rng: np.random.Generator) -> list[tuple[int, int]]:
    prefix, extend = np.zeros(REQUESTS, dtype=int), np.full(REQUESTS, 512)
    if kind.startswith("ragged"):
        extend = rng.integers(300, 1500, REQUESTS)
    if kind.startswith("log-normal"):
        extend = np.minimum(rng.lognormal(np.log(1000), 1.0, REQUESTS), 131072).astype(int) + 1
    if "32k" in kind:
        extend[:4] = rng.integers(32768, 131073, 4)
        extend[REQUESTS // 2 :] = 1
    if "prefixes" in kind or kind == "decodes":
        prefix = rng.lognormal(np.log(4000), 1.0, REQUESTS).astype(int)
    if kind == "decodes":
        extend[:] = 1
    return list(zip(prefix.tolist(), extend.tolist(), strict=True))


def main() -> None:
    rows = []
    for kind in KINDS:
        for cp_size in (2, 8, 64):
            fastest: dict[str, list[float]] = {"zigzag": [], "whole": []}
            medians: list[float] = []
            cuts, pairs = [], []
            for batch in batches(kind):
                lengths = np.array(batch, dtype=np.int64)
                variants = {name: partial(PARTITIONS[name], lengths, cp_size, "balanced", None) for name in fastest}
                times = interleaved(variants, seconds=0.3)
                for name, taken in times.items():
                    fastest[name].append(float(taken.min()))
                medians.append(float(np.median(times["whole"])))
                plan = cpattn.plan(batch, cp_size, partition="whole")
                cuts.append(int((np.bincount(plan.chunk_table.request) > 1).sum()))
                pairs.append(plan.pair_imbalance)
            in_ms = [percentiles(np.array(of_batches), 1e-3) for of_batches in (*fastest.values(), medians)]
            rows.append([kind, str(cp_size), *in_ms, f"{np.median(cuts):g}", f"{np.median(pairs):.4f}"])
    write_report(
        "whole_cpu",
        "Working out a layout that leaves requests whole",
        ["256 requests", "cp_size", "zigzag, ms", "whole, ms", "whole in the median, ms", "cut by whole", "pairs, max / mean"],
        rows,
        f"From the batch as an array to the chunks of all ranks. Times are medians of {SEEDS} batches, with their 20th to 80th "
        "percentile. Of each batch it is the fastest run, as the machine was shared; the third time is of each batch the "
        "median run. The last two columns are medians as well: requests cut, those larger than a rank's share counted; and the pairs "
        "of the busiest rank, over the mean.",
    )


if __name__ == "__main__":
    main()
