"""Random batches against the oracle, with and without faults in their midst, until the time is over.

python tests/fuzz.py --minutes 5

Every batch follows from the seed and its number, so that ``--seed S --only N`` (``--gloo``) runs a failing one again. Over loopback all
is drawn anew for each batch; over gloo a group of processes runs hundreds of calls one after another, as a server does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import fault_programs
import numpy as np
import torch
from cases import EXCHANGES, HEAD_EXCHANGES, STRIPED_EXCHANGES, AttentionCase
from failed_calls import Faults, attend_with_faults, check_partly_failed
from fault_injection import Injected
from own_partitions import OwnPartition

import cpattn
from cpattn.call.arguments import StrategyChoice
from cpattn.testing import ProcessRanks, run_loopback

# Batches that a group of processes runs before another is drawn from loopback.
GLOO_EVERY, GLOO_BATCHES, GLOO_RANKS = 40, 8, 3
# A fault is at a line of the call; calls have some hundreds.
LINES = 500


@dataclass
class Drawn:
    """One batch and what is done with it."""

    number: int
    case: AttentionCase
    cp_size: int
    options: dict[str, Any]
    strategy: StrategyChoice
    backend: str
    faults: Faults | None

    @property
    def plan(self) -> cpattn.Plan:
        return self.case.plan(self.cp_size, **self.options)


@dataclass
class Tally:
    """What has been run."""

    batches: Counter[str] = field(default_factory=Counter)
    ranks_that_raised: int = 0
    worst: float = 0.0
    worst_batch: int = 0

    def add(self, drawn: Drawn, transport: str, error: float, raised: int) -> None:
        self.batches[f"{transport}, {'with faults' if drawn.faults else 'without'}"] += 1
        self.ranks_that_raised += raised
        if error > self.worst:
            self.worst, self.worst_batch = error, drawn.number

    def __str__(self) -> str:
        counts = "; ".join(f"{what}: {count:,}" for what, count in sorted(self.batches.items()))
        return (
            f"{sum(self.batches.values()):,} batches ({counts}), {self.ranks_that_raised:,} ranks raised; worst error over its bound: "
            f"{self.worst:.3f} (batch {self.worst_batch})"
        )


def draw(seed: int, number: int, cp_size: int | None = None) -> Drawn:
    """A batch, alike for the same numbers."""
    rng = np.random.default_rng([seed, number])

    def length(zero: float, most: int) -> int:
        return 0 if rng.random() < zero else int(rng.choice([1, 2, int(rng.integers(1, 12)), int(rng.integers(1, most))]))

    batch = [(length(0.4, 90), length(0.15, 90)) for _ in range(rng.integers(0, 7))]
    # The last four are for windows that some request is longer than.
    windowed = [("all_gather", "striped"), ("pass_q", "windows striped"), ("all_gather", "ranked"), ("pass_q", "ranked")]
    exchanges = [*EXCHANGES, *HEAD_EXCHANGES, ("two_level", "packed"), ("two_level", "paged"), *STRIPED_EXCHANGES, *windowed]
    strategy: StrategyChoice
    strategy, cache = exchanges[rng.integers(len(exchanges))]
    kv_heads = int(rng.choice([1, 2, 4]))
    backend = str(rng.choice(["reference", "cpu"]))
    is_sharded, longest = cache in ("sharded", "ranked", "striped", "windows striped"), max((sum(request) for request in batch), default=0)
    window = int(rng.integers(1, 100)) if rng.random() < 0.3 and not is_sharded else None
    if (strategy, cache) in windowed:
        cache = cache.removeprefix("windows ")
        if longest < 2:
            strategy = "pass_q"
        else:
            backend, window = "reference", int(rng.integers(1, longest))
    is_reference = backend == "reference"
    v_in_k = bool(rng.random() < 0.1)
    case = AttentionCase(
        batch,
        heads=8 if strategy == "ulysses" else 4,
        kv_heads=kv_heads,
        v_head_dim=int(rng.choice([8, 16])) if v_in_k or rng.random() < 0.3 else None,
        dtype=torch.float32 if rng.random() < 0.8 else torch.bfloat16,
        scale=float(rng.choice([0.05, 1.0])) if rng.random() < 0.2 else None,
        window=window if is_reference else None,
        softcap=3.0 if is_reference and rng.random() < 0.2 else None,
        sinks=bool(rng.random() < 0.3),
        seed=number,
        overlap=int(rng.choice([n for n in (1, 2, 4) if kv_heads % n == 0])) if strategy == "all_gather" and not is_sharded else None,
        cache=cache,
        page_size=int(rng.choice([1, 3, 16])),
        interleave=int(rng.choice([1, 2, 3, 16])),
        v_in_k=v_in_k,
    )
    # Drawn in any case, as all that follows depends on how much was drawn before.
    drawn_size = int(rng.choice([1, 2, 3, 4, 5, 7]))
    cp_size = drawn_size if cp_size is None else cp_size
    within = int(rng.choice([n for n in range(1, cp_size + 1) if cp_size % n == 0]))
    if strategy == "ulysses" and rng.random() < 0.7:
        case.within, strategy = within, cpattn.hybrid(within, str(rng.choice(["ring", "all_gather"])))
    elif strategy == "two_level":
        strategy = cpattn.two_level(within)
    options = {
        "partition": ["zigzag", "contiguous", "whole", "uncut", OwnPartition(number)][rng.integers(5)],
        "pad_to": int(rng.choice([1, 1, 4, 16])),
    }
    faults = None
    if rng.random() < 0.5:
        failing = rng.permutation(cp_size)[: rng.choice([1, 1, cp_size])]
        kind = [Injected, Injected, MemoryError, KeyboardInterrupt][rng.integers(4)]
        faults = Faults({int(rank): int(rng.integers(LINES)) for rank in failing}, kind)
    return Drawn(number, case, cp_size, options, strategy, backend, faults)


def run_on_loopback(drawn: Drawn, tally: Tally) -> None:
    """The batch with its faults, if it has some, and then without."""
    plan = drawn.plan

    def program(group: cpattn.Communicator) -> Any:
        failed = None
        if drawn.faults:
            failed = attend_with_faults(drawn.case, plan, group, group.rank, drawn.strategy, drawn.backend, drawn.faults)
        return failed, drawn.case.on_rank(plan, group.rank, group, drawn.strategy, drawn.backend)

    check(drawn, plan, run_loopback(program, drawn.cp_size, timeout=30), "loopback", tally)


def run_on_gloo(batches: list[Drawn], ranks: ProcessRanks, tally: Tally) -> None:
    results = ranks.run(fault_programs.run_drawn, batches)
    for n, drawn in enumerate(batches):
        check(drawn, drawn.plan, [result[n] for result in results], "gloo", tally)


def check(drawn: Drawn, plan: cpattn.Plan, results: list[Any], transport: str, tally: Tally) -> None:
    raised = 0
    if drawn.faults:
        failed = [first for first, _ in results]
        check_partly_failed(drawn.case, plan, drawn.strategy, failed)
        raised = sum(first is None for first in failed)
    tally.add(drawn, transport, drawn.case.check([second for _, second in results], plan, drawn.strategy, drawn.backend), raised)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", type=int, help="one batch of that seed")
    parser.add_argument("--gloo", action="store_true", help="with --only: as it was drawn for the processes over gloo")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tally, end, number = Tally(), time.monotonic() + 60 * given.minutes, 0
    print(f"seed {given.seed}", flush=True)
    if given.only is not None:
        if given.gloo:
            with ProcessRanks(GLOO_RANKS, timeout=60) as ranks:
                run_on_gloo([draw(given.seed, given.only, GLOO_RANKS)], ranks, tally)
        else:
            run_on_loopback(draw(given.seed, given.only), tally)
        print(tally)
        return 0
    said = time.monotonic()
    drawn: list[Drawn] = []
    with ProcessRanks(GLOO_RANKS, timeout=60) as ranks:
        try:
            while time.monotonic() < end:
                number += 1
                drawn = [draw(given.seed, number)]
                run_on_loopback(drawn[0], tally)
                if number % GLOO_EVERY == 0:
                    drawn = [draw(given.seed, number + n, ranks.size) for n in range(1, GLOO_BATCHES + 1)]
                    number += GLOO_BATCHES
                    run_on_gloo(drawn, ranks, tally)
                if time.monotonic() - said > 30:
                    said = time.monotonic()
                    print(tally, flush=True)
        except BaseException:
            print(f"{tally}\nfailed in batch {', '.join(str(one.number) for one in drawn)} of seed {given.seed}:", flush=True)
            for one in drawn:
                print(f"  {one.case}, cp_size={one.cp_size}, {one.options}, {one.strategy}, {one.backend}, {one.faults}")
            raise
    print(f"all right: {tally}; seed {given.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
