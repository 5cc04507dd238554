"""What ``auto`` takes for batches as a serving engine makes them, beside every fixed choice of partition and strategy, and one GPU.

PYTHONPATH=. python benchmarks/bench_serving_batches.py [--ranks 2] [--seconds 170] [--results FOLDER]
PYTHONPATH=. python benchmarks/bench_serving_batches.py --one-rank-of 4 [--seconds 170]
PYTHONPATH=. python benchmarks/bench_serving_batches.py --first 120

Batches are taken in order, and it ends by the time that is given, having said how many were measured. --first goes on with that batch,
and adds to what earlier runs have written. --one-rank-of needs one GPU: it times what the rank with the most work would do, and any
other that may take longer, without messages, and adds what the model says of those. --check tries both on a CPU over small batches, in
seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from peers.bench import MOST_LAYERS, Bench, Task
from peers.ours import machine_here
from peers.report import Line, markdown
from peers.work import Heads
from traffic.batches import Batch, serving_batches
from traffic.choices import CHOICES, ONE_GPU, Choice, Timed, messages_us, of_all_ranks, of_one_rank, strategy_of
from traffic.results import HEADER, Row, read, row_of, summary

import cpattn

RESULTS = Path(__file__).parent / "results"
HEADS, CHECKED_HEADS = Heads(32, 8, 128), Heads(8, 4, 16)
MANY, CHECKED, CHECKED_SCALE = 200, 3, 256
# Written so often: the tables are of all batches.
EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--one-rank-of", type=int, metavar="RANKS", help="one rank's work of so many, on one GPU")
    parser.add_argument("--first", type=int, default=0, help="the batch that it begins with")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--seconds", type=float, default=170, help="of the whole run, about")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="on a CPU, over small batches")
    options = parser.parse_args()
    if options.check:
        check(options.ranks)
        return
    size = options.one_rank_of or options.ranks
    name = f"serving_batches_one_rank_of_{size}" if options.one_rank_of else f"serving_batches_{size}_gpus"
    path, end = options.results / name, time.monotonic() + options.seconds
    kept = [row for row in read(path) if row.number < options.first]
    bench = Bench("cuda", 1 if options.one_rank_of else size, options.rounds, end, eagerly=False, frees=False)
    run = Run(bench, size, HEADS, machine_here(), bool(options.one_rank_of))
    batches = dict(enumerate(serving_batches(MANY)[options.first :], start=options.first))
    try:
        bench.wait()
        run.measure(batches, lambda rows: write(path, size, [*kept, *rows], run.is_one_rank))
    finally:
        bench.close()
    print(summary([*kept, *run.rows]), flush=True)


class Run:
    """One run over batches.

    Attributes:
        size: ranks of the group; is_one_rank: whether one of them is timed alone.
        rows: of the batches so far.
    """

    def __init__(self, bench: Bench, size: int, heads: Heads, machine: cpattn.Machine, is_one_rank: bool) -> None:
        self.bench, self.size, self.heads, self.machine, self.is_one_rank = bench, size, heads, machine, is_one_rank
        self.rows: list[Row] = []

    def measure(self, batches: dict[int, Batch], write: Callable[[list[Row]], object]) -> None:
        """One after another, as long as there is time; ``write`` is given what is known every now and then, and at the end."""
        names = list(map(str, batches))
        timed: dict[str, Timed] = {}

        def task(name: str) -> Task:
            timed[name] = self._timed(batches[int(name)])
            return Task(name, batches[int(name)], self.heads, timed[name].variants)

        def take(left: list[str]) -> None:
            name = names[len(names) - len(left) - 1]
            lines, batch = [line for line in self.bench.lines if line.batch == name], batches[int(name)]
            self.rows.append(row_of(int(name), batch, self.size, lines, timed[name].of, partial(self._messages, batch)))
            if len(self.rows) % EVERY == 0:
                write(self.rows)

        self.bench.measure_all(names, task, take)
        write(self.rows)

    def _timed(self, batch: Batch) -> Timed:
        return of_one_rank(batch, self.size, self.heads, self.machine) if self.is_one_rank else of_all_ranks()

    def _messages(self, batch: Batch, choice: Choice, line: Line) -> float:
        """Of one rank that was timed alone, what it waits for messages, in us."""
        if not self.is_one_rank:
            return 0.0
        plan = choice.plan(batch, self.size)
        strategy = strategy_of(choice, plan, batch, self.heads, self.machine)
        return messages_us(strategy, line.way.rpartition(", ")[2], plan, batch, self.heads, self.machine)


def check(ranks: int) -> None:
    """Everything but the GPU, over gloo; exits with what is wrong where a result is, or where a choice was not timed."""
    batches, wrong = dict(enumerate(serving_batches(CHECKED, scale=CHECKED_SCALE))), []
    for size, is_one_rank in ((ranks, False), (4, True)):
        bench = Bench("cpu", 1 if is_one_rank else ranks, 1, time.monotonic() + 60, least_rounds=1, eagerly=False, frees=False)
        run = Run(bench, size, CHECKED_HEADS, machine_here(), is_one_rank)
        try:
            run.measure(batches, lambda rows: None)
        finally:
            bench.close()
        print(markdown(HEADER, [row.cells for row in run.rows]), summary(run.rows), sep="\n\n")
        compared = [line for line in bench.lines if line.error is not None or (is_one_rank and line.variant != ONE_GPU)]
        wrong += [f"{line.batch}, {line.variant}: {line.note}" for line in bench.lines if line.note or line not in compared]
        wrong += [f"{row.number}: {len(row.times)} times" for row in run.rows if len(row.times) < len(CHOICES) + 1]
    if wrong:
        sys.exit("\n".join(wrong))


def write(path: Path, size: int, rows: list[Row], is_one_rank: bool) -> None:
    """``path.md`` and ``path.csv``."""
    from gpu_report import write_gpu_report

    how = (
        f"One rank's work of {size}, on one GPU, without messages: of the rank with the most query-key pairs, and of the one that reads "
        "the most keys, or is estimated to take longest, where they have over 2% more; the slowest counts. To its time is added what the "
        "model says of messages that attention does not hide, between ranks that read each other's memory or by collectives, whichever is "
        "less."
        if is_one_rank
        else f"{size} GPUs, the slowest rank counts; each result was compared with cpattn's over collectives before it was timed."
    )
    notes = (
        f"{len(rows)} of {MANY} batches, taken in order. bf16, {HEADS.query} query and {HEADS.kv} key/value heads, D = {HEADS.dim}; "
        "prefixes "
        f"lie in order on every rank. One layer's attention as a CUDA graph of up to {MOST_LAYERS} layers, in us; variants interleaved in "
        "random order; medians. Choices that come to the same call are taken together. Lengths are drawn as in a public trace "
        f"(benchmarks/traffic/batches.py says which, and how). {how} With token_cost=0 evenness in tokens gives way where that is faster, "
        f"as nothing but attention is timed. One GPU: the whole batch by what auto takes there.\n\n{summary(rows)}\n\n## Everything"
    )
    title = f"Batches of a serving engine, one rank of {size}" if is_one_rank else f"Batches of a serving engine, {size} GPUs"
    write_gpu_report(path.name, title, HEADER, [row.cells for row in rows], notes, path.parent, prints=False)


if __name__ == "__main__":
    main()
