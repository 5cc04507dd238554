"""Random batches against the oracle, with and without faults in their midst, until the time is over.

python tests/fuzz.py --minutes 5
python tests/fuzz.py --batches 10000

Every batch follows from the seed and its number, so that ``--seed S --only N`` (``--gloo``) runs a failing one again. Over loopback all
is drawn anew for each batch; over gloo a group of processes runs hundreds of calls one after another, as a server does. At the end it
says how many there were of each kind.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from math import inf

import torch
from programs.drawn_batches import KINDS, PARTITIONS, Drawn, Kind, draw, run_all

from cpattn.metadata.draw import text_table
from cpattn.testing import ProcessRanks, run_loopback

# Batches that a group of processes runs before another is drawn from loopback.
GLOO_EVERY, GLOO_BATCHES, GLOO_RANKS = 40, 8, 3


@dataclass
class Tally:
    """What has been run."""

    batches: Counter[str] = field(default_factory=Counter)
    kinds: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    buckets: int = 0
    ranks_that_raised: int = 0
    worst: float = 0.0
    worst_batch: int = 0

    @property
    def total(self) -> int:
        return sum(self.batches.values())

    def add(self, drawn: Drawn, transport: str, error: float, raised: int) -> None:
        self.batches[f"{transport}, {'with faults' if drawn.faults else 'without'}"] += 1
        self.kinds[drawn.kind, drawn.partition] += 1
        self.buckets += drawn.bucket
        self.ranks_that_raised += raised
        if error > self.worst:
            self.worst, self.worst_batch = error, drawn.number

    def __str__(self) -> str:
        counts = "; ".join(f"{what}: {count:,}" for what, count in sorted(self.batches.items()))
        return (
            f"{self.total:,} batches ({counts}), {self.buckets:,} in buckets, {self.ranks_that_raised:,} ranks raised; worst error over "
            f"its bound: {self.worst:.3f} (batch {self.worst_batch})"
        )

    def by_kind(self) -> str:
        """A table: how many of each kind, by partition. What was drawn without a window where it is for one stands apart."""
        kinds = dict.fromkeys([*KINDS, *(kind for kind, _ in self.kinds)])
        lines = [(str(kind), [self.kinds[kind, partition] for partition in PARTITIONS]) for kind in kinds]
        lines.append(("all", [sum(column) for column in zip(*(counts for _, counts in lines), strict=True)]))
        rows = [[name, *(f"{count:,}" for count in (*counts, sum(counts)))] for name, counts in lines]
        return text_table(["strategy, cache", *PARTITIONS, "all"], rows, left=(0,))


def run_on_loopback(drawn: Drawn, tally: Tally) -> None:
    """The batch with its faults, if it has some, and then without."""
    _ = drawn.plan, drawn.meant
    results = run_loopback(drawn.run, drawn.cp_size, timeout=30)
    tally.add(drawn, "loopback", drawn.check(results), raised(drawn, results))


def run_on_gloo(batches: list[Drawn], ranks: ProcessRanks, tally: Tally) -> None:
    by_rank = ranks.run(run_all, batches)
    for n, drawn in enumerate(batches):
        results = [results[n] for results in by_rank]
        tally.add(drawn, "gloo", drawn.check(results), raised(drawn, results))


def raised(drawn: Drawn, results: list[tuple[object, object]]) -> int:
    """How many ranks."""
    return sum(failed is None for failed, _ in results) if drawn.faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="5, if there is no number of batches")
    parser.add_argument("--batches", type=int, help="after which it ends, if the time is not over before")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", type=int, help="one batch of that seed")
    parser.add_argument("--gloo", action="store_true", help="with --only: as it was drawn for the processes over gloo")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tally = Tally()
    print(f"seed {given.seed}", flush=True)
    if given.only is not None:
        if given.gloo:
            with ProcessRanks(GLOO_RANKS, timeout=60) as ranks:
                run_on_gloo([draw(given.seed, given.only, GLOO_RANKS)], ranks, tally)
        else:
            run_on_loopback(draw(given.seed, given.only), tally)
        print(tally)
        return 0
    minutes = given.minutes if given.minutes is not None else inf if given.batches else 5.0
    run_many(given.seed, tally, given.batches or inf, time.monotonic() + 60 * minutes)
    print(tally.by_kind())
    print(f"all right: {tally}; seed {given.seed}")
    return 0


def run_many(seed: int, tally: Tally, most: float, end: float) -> None:
    """Until so many have run, or until then."""
    said, number = time.monotonic(), 0
    drawn: list[Drawn] = []
    with ProcessRanks(GLOO_RANKS, timeout=60) as ranks:
        try:
            while tally.total < most and time.monotonic() < end:
                number += 1
                drawn = [draw(seed, number)]
                run_on_loopback(drawn[0], tally)
                if number % GLOO_EVERY == 0:
                    drawn = [draw(seed, number + n, ranks.size) for n in range(1, GLOO_BATCHES + 1)]
                    number += GLOO_BATCHES
                    run_on_gloo(drawn, ranks, tally)
                if time.monotonic() - said > 30:
                    said = time.monotonic()
                    print(tally, flush=True)
        except BaseException:
            print(f"{tally}\nfailed in batch {', '.join(str(one.number) for one in drawn)} of seed {seed}:", flush=True)
            for one in drawn:
                print(
                    f"  {one.case}, cp_size={one.cp_size}, {one.options}, {one.strategy}, {one.backend}, {one.faults}, "
                    f"{'in' if one.bucket else 'without'} a bucket"
                )
            raise


if __name__ == "__main__":
    sys.exit(main())
