"""cp_attention beside its peers on real GPUs, in one run: its automatic and its fixed choices, ring-flash-attn, torch's
context_parallel, Ulysses as USP has it and SGLang's form; a rank's launch alone; and the whole batch on one GPU.

PYTHONPATH=.:FOLDER python benchmarks/bench_peers.py [--ranks 2] [--results FOLDER] [--seconds 210]

FOLDER is where ring-flash-attn was unpacked, if it is not installed; a peer that is not there, or fails, gets a line that says so.
--check tries everything on a CPU over small batches, in seconds. --draw draws results that are there. Neither needs a GPU.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from peers import report, session
from peers.report import Line
from peers.variants import STRATEGIES, all_variants
from peers.work import Heads

from cpattn.testing import ProcessRanks

# In place of a variant's name: not one of them alone. How a note begins whose variant is not timed.
ALL, WRONG = "all", "wrong"
RESULTS = Path(__file__).parent / "results"
HEADS, CHECKED_HEADS = Heads(32, 8, 128), Heads(8, 4, 16)
# Seconds that a rank may wait for another: a kernel may have to be compiled there.
TIMEOUT = 40
# Rounds that a batch gets in any case, layers of a graph and of an eager run, and how long such a run is to be at most.
LEAST_ROUNDS, MOST_LAYERS, RUN_SECONDS = 3, 4, 0.02


def _ragged(with_prefix: bool) -> list[tuple[int, int]]:
    rng = random.Random(1)
    batch = []
    for _ in range(64):
        prefix = int(rng.lognormvariate(8, 0.8)) if with_prefix else 0
        batch.append((prefix, max(8, int(rng.lognormvariate(6.5, 0.8)) // 8 * 8)))
    return batch


BATCHES = {
    "1 x 1k": [(0, 1024)],
    "1 x 2k": [(0, 2048)],
    "1 x 8k": [(0, 8192)],
    "8 x 8k": [(0, 8192)] * 8,
    "8 x (8k + 2k)": [(8192, 2048)] * 8,
    "1 x 32k": [(0, 32768)],
    "64 ragged ~0.9k": _ragged(with_prefix=False),
    "64 ragged + ~4k prefix": _ragged(with_prefix=True),
    "1 x (8k + 1k)": [(8192, 1024)],
    "1 x (120k + 2k)": [(122880, 2048)],
    "1 x 128k": [(0, 131072)],
    "1 x 4k": [(0, 4096)],
    "1 x 16k": [(0, 16384)],
    "1 x 64k": [(0, 65536)],
    "1 x 256k": [(0, 262144)],
}
# There for the speed-up by length alone.
SPEEDUP_ONLY = {"1 x 4k", "1 x 16k", "1 x 64k", "1 x 256k"}
CHECKED_BATCHES = {
    "1 x 128": [(0, 128)],
    "3 x (16 + 32)": [(16, 32)] * 3,
    "ragged": [(0, 40), (0, 8), (0, 64)],
    "uneven, a prefix": [(3, 17), (0, 9)],
}


class RanksLost(Exception):
    """A rank died or hangs, or the ranks are out of step: they have to be started anew."""

    def __init__(self, culprit: str, reason: str) -> None:
        super().__init__(reason)
        self.culprit, self.reason = culprit, reason


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes:
        deadline: by ``time.monotonic``; what has not been begun by then is left out.
        lost: variants that took the ranks down, and why; they are not tried again.
        no_graph: peers that cannot be captured, and why; it is not tried again.
    """

    device_type: str
    num_ranks: int
    heads: Heads
    rounds: int
    strategies: tuple[str, ...]
    deadline: float
    lines: list[Line] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    no_graph: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranks = self._start()

    def _start(self) -> ProcessRanks:
        transport = "nccl" if self.device_type == "cuda" else "gloo"
        return ProcessRanks(self.num_ranks, timeout=TIMEOUT, patience=TIMEOUT + 5, transport=transport)

    def close(self) -> None:
        """Ends the ranks; their graphs first, which hold on to NCCL."""
        self.ranks.outcomes(session.finish)
        self.ranks.close()

    def time_batch(self, name: str, batch: list[tuple[int, int]], for_speedup: bool, seconds: float) -> None:
        """Adds the batch's lines, whose rounds take about so many seconds. A variant that takes the ranks down is left out from then
        on, and all others are timed again."""
        try:
            self.lines += self._lines(name, batch, for_speedup, seconds)
        except RanksLost as lost:
            print(f"{name}: {lost.culprit} took the ranks down: {lost.reason}", flush=True)
            self.ranks.close()
            self.ranks = self._start()
            self.lost[lost.culprit] = lost.reason
            if lost.culprit == ALL or time.monotonic() > self.deadline:
                self.lines.append(Line(name, lost.culprit, "fixed", note=lost.reason))
            else:
                self.time_batch(name, batch, for_speedup, seconds)

    def _lines(self, name: str, batch: list[tuple[int, int]], for_speedup: bool, round_seconds: float) -> list[Line]:
        bound = max(self._all(ALL, session.begin, batch, self.heads, self.device_type, self.strategies))
        lines = {
            variant: Line(name, variant, made.kind, made.beside, note=self.lost.get(variant, ""))
            for variant, made in all_variants(self.device_type, self.strategies).items()
            if made.is_of_speedup or not for_speedup
        }
        seconds = {variant: took for variant, line in lines.items() if not line.note and (took := self._prepare(line, bound)) is not None}
        # The same for all, so that all save alike from one call to the next.
        layers = max(1, min(MOST_LAYERS, int(RUN_SECONDS / min(seconds.values(), default=1.0))))
        if self.device_type == "cuda":
            for variant in seconds:
                self._capture(lines[variant], layers, bound)
        timed = [variant for variant in seconds if not lines[variant].note.startswith(WRONG)]
        end = time.monotonic() + round_seconds
        for round_ in range(self.rounds):
            if round_ >= LEAST_ROUNDS and time.monotonic() > end:
                break
            for variant in random.Random(round_).sample(timed, len(timed)):
                lines[variant].add(self._all(variant, session.measure, variant, layers))
        return list(lines.values())

    def _prepare(self, line: Line, bound: float) -> float | None:
        """The seconds that a call takes, or None where there is nothing to time."""
        outcome = self._try(line.variant, session.prepare, line.variant)
        if isinstance(outcome, str):
            line.note = outcome
            return None
        if outcome[0].squares is not None:
            self._compare(line, [each.squares for each in outcome], bound)
            if line.note:
                self._all(line.variant, session.drop, line.variant)
                return None
        return float(max(each.seconds for each in outcome))

    def _capture(self, line: Line, layers: int, bound: float) -> None:
        failure = self.no_graph.get(line.variant)
        if failure is None:
            outcome = self._try(line.variant, session.capture, line.variant, layers)
            if isinstance(outcome, str):
                failure = outcome
            elif outcome[0] is not None:
                self._compare(line, outcome, bound)
        if failure is not None:
            line.note = f"cannot be captured: {failure}"
            if line.kind == "peer":
                self.no_graph[line.variant] = failure

    def _compare(self, line: Line, squares: list[session.Squares], bound: float) -> None:
        error = float(np.sqrt(sum(each.difference for each in squares) / sum(each.reference for each in squares)))
        line.error = error if line.error is None else max(line.error, error)
        if not error <= bound:
            line.note = f"{WRONG}: its relative error is {error:.1e}, above {bound:.1e}"

    def _all(self, variant: str, program: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What every rank returns; a rank that raises is lost, with all others."""
        outcome = self._try(variant, program, *arguments)
        if isinstance(outcome, str):
            raise RanksLost(variant, outcome)
        return outcome

    def _try(self, variant: str, program: Callable[..., Any], *arguments: Any) -> list[Any] | str:
        """What every rank returns, or why none does. Where some have failed, the ranks are out of step."""
        outcomes = self.ranks.outcomes(program, *arguments)
        failures = [last_words(value) for done, value in outcomes if not done]
        if not failures:
            return [value for _, value in outcomes]
        if len(failures) < len(outcomes) or not all(done for done, _ in self.ranks.outcomes(session.ping)):
            raise RanksLost(variant, " / ".join(dict.fromkeys(failures)))
        return failures[0]


def last_words(failure: str) -> str:
    """The first line of what was raised at last, without its class where that says nothing, as a table can hold it."""
    lines = failure.rpartition("Traceback (most recent call last):\n")[2].splitlines()
    # Those of a traceback are indented.
    message = next((line for line in lines if line and not line.startswith(" ")), "no message")
    return message.removeprefix("peers.work.Unserved: ").replace("|", "/")[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="at most; long batches get fewer")
    parser.add_argument("--batches", nargs="+", default=list(BATCHES), choices=list(BATCHES), metavar="NAME")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--seconds", type=float, default=210, help="after which no further batch is begun")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="on a CPU, over small batches")
    parser.add_argument("--draw", action="store_true", help="only draw the results that are there")
    options = parser.parse_args()
    path = options.results / f"peers_{options.ranks}_gpus"
    strategies = tuple(options.strategies)
    if options.check:
        check(options.ranks, strategies)
    else:
        if not options.draw:
            measure(path, options.ranks, options.batches, options.rounds, strategies, options.seconds)
        variants = all_variants("cuda", strategies)
        report.draw(path, report.read(path), BATCHES, lambda name: variants[name].beside if name in variants else "")


def measure(path: Path, num_ranks: int, names: list[str], rounds: int, strategies: tuple[str, ...], seconds: float) -> None:
    """Times the batches one after another, and writes what is known after each."""
    from gpu_timing import gpu_machine

    bench = Bench("cuda", num_ranks, HEADS, rounds, strategies, time.monotonic() + seconds)
    left_out: list[str] = []
    try:
        for i, name in enumerate(names):
            left = bench.deadline - time.monotonic()
            if left <= 0:
                left_out.append(name)
                continue
            before = len(bench.lines)
            # Half of what is left for a batch: the rest is for compiling, comparing and capturing.
            bench.time_batch(name, BATCHES[name], name in SPEEDUP_ONLY, left / (len(names) - i) / 2)
            for line in bench.lines[before:]:
                print(line, flush=True)
            report.write(path, head(num_ranks, gpu_machine(), names[i + 1 :]), bench.lines, BATCHES)
        report.write(path, head(num_ranks, gpu_machine(), left_out), bench.lines, BATCHES)
    finally:
        bench.close()
    print(report.summaries(bench.lines, BATCHES), flush=True)


def head(num_ranks: int, machine: str, left_out: list[str]) -> str:
    """What the figures are of."""
    notes = (
        f"bf16, {HEADS.query} query and {HEADS.kv} key/value heads, D = {HEADS.dim}, one rank a GPU. One layer's attention, in CUDA graphs "
        f"and eager runs of up to {MOST_LAYERS} layers; the slowest rank counts; variants interleaved in random order; medians. "
        "A: the fastest launch of this rank alone, on keys that are in order already. No transfer: what others would send is a local "
        "copy. Exposed: the time over that of the same strategy and backend without transfers; of a peer, over the fastest without "
        "transfers. One GPU: the whole batch in one launch on each rank's device. Each result was compared with cpattn's over "
        "collectives before it was timed; the relative error is that of all ranks together, and of the graph as well where there is one."
    )
    skipped = f"\n\nLeft out, as the time was up: {', '.join(left_out)}." if left_out else ""
    command = " ".join(["python", *sys.argv])
    return f"# cp_attention beside its peers, {num_ranks} GPUs\n\n`{command}`\n\n{machine}; {ring_version()}\n\n{notes}{skipped}"


def ring_version() -> str:
    """Of ring-flash-attn; the other peers are torch's, or written here."""
    try:
        return f"ring-flash-attn {version('ring-flash-attn')}"
    except PackageNotFoundError:
        return "ring-flash-attn not installed"


def check(num_ranks: int, strategies: tuple[str, ...]) -> None:
    """Everything but the GPU, over gloo, with plain torch in place of FlashAttention-4; raises where a result is wrong."""
    bench = Bench("cpu", num_ranks, CHECKED_HEADS, 1, strategies, time.monotonic() + 60)
    try:
        for name, batch in CHECKED_BATCHES.items():
            bench.time_batch(name, batch, False, seconds=1.0)
    finally:
        bench.close()
    for line in bench.lines:
        print(line)
    wrong = [line for line in bench.lines if line.note.startswith(WRONG)]
    exact = {line.variant for line in bench.lines if line.kind == "peer" and line.error is not None} - {line.variant for line in wrong}
    if wrong or not exact >= {"SGLang's form", "Ulysses as USP"}:
        sys.exit(f"not exact: {', '.join(line.variant for line in wrong) or 'a peer that is written here was not compared'}")


if __name__ == "__main__":
    main()
