"""Timing many variants of a call over one batch on all ranks at once: those that fail get a line that says so, and the others go on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cpattn.testing import ProcessRanks
from peers import session
from peers.report import Line
from peers.variants import Variant
from peers.work import Heads

# In place of a variant's name: not one of them alone. How a note begins whose variant is not timed.
ALL, WRONG = "all", "wrong"
LEFT_OUT = "left out: the time for this batch was up"
# Seconds that a rank may wait for another: a kernel may have to be compiled there.
TIMEOUT = 40
# Layers of a graph and of an eager run, as many as a model has, and how long such a run is to be at most. Ranks begin a run up to
# 150 us apart, and the first eager call after a wait takes the host three times as long as the next: of a few layers that was the most.
MOST_LAYERS, RUN_SECONDS = 32, 0.02
# Seconds from which a call is made once before it is timed.
LONG_CALL = 1.0


class RanksLost(Exception):
    """A rank died or hangs, or the ranks are out of step: they have to be started anew."""

    def __init__(self, culprit: str, reason: str) -> None:
        super().__init__(reason)
        self.culprit, self.reason = culprit, reason


class Task(NamedTuple):
    """A batch, and the calls that are timed over it.

    Attributes:
        variants: by name, those first that matter most.
        seconds: that the rounds may take, beyond the least number of them. :meth:`Bench.measure_all` shares out what there is.
        expected: seconds that a call of a variant takes about, where that is known.
        first_seconds: that the first calls of all variants may take; those that would take longer are left out.
    """

    name: str
    batch: list[tuple[int, int]]
    heads: Heads
    variants: dict[str, Variant]
    seconds: float = 0.0
    expected: Callable[[Variant], float] = lambda variant: 0.0
    first_seconds: float = float("inf")


@dataclass
class Bench:
    """One run of a benchmark.

    Attributes:
        rounds, least_rounds: at most, and in any case.
        deadline: by ``time.monotonic``; what has not been begun by then is left out.
        longest_graph: seconds of a call above which it is not captured: a graph would save nothing.
        eagerly: whether eager calls are timed where there are graphs; frees: see :func:`peers.session.begin`.
        lost: variants that took the ranks down, and why; they are not tried again.
        no_graph: peers that cannot be captured, and why; it is not tried again.
    """

    device_type: str
    num_ranks: int
    rounds: int
    deadline: float
    least_rounds: int = 3
    longest_graph: float = float("inf")
    eagerly: bool = True
    frees: bool = True
    lines: list[Line] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    no_graph: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranks = self._start()

    def wait(self) -> None:
        """Until the ranks are there, for a caller who then shares out what is left of the time."""
        self.ranks.outcomes(session.ping)

    def _start(self) -> ProcessRanks:
        transport = "nccl" if self.device_type == "cuda" else "gloo"
        return ProcessRanks(self.num_ranks, timeout=TIMEOUT, patience=TIMEOUT + 5, transport=transport)

    def close(self) -> None:
        """Ends the ranks; their graphs first, which hold on to NCCL."""
        self.ranks.outcomes(session.finish)
        self.ranks.close()

    def measure_all(self, names: Sequence[str], make: Callable[[str], Task], write: Callable[[list[str]], object]) -> None:
        """One task after another, each made when it is its turn, with its share of the time that is left. After each ``write`` is told
        the names of the others, which are left out if the time is up."""
        for number, name in enumerate(names):
            left = self.deadline - time.monotonic()
            if left <= 0:
                break
            before = len(self.lines)
            # Half of what is left for a batch: the rest is for compiling, comparing and capturing.
            self.measure(make(name)._replace(seconds=left / (len(names) - number) / 2))
            for line in self.lines[before:]:
                print(line, flush=True)
            write(list(names[number + 1 :]))

    def measure(self, task: Task) -> None:
        """Adds the batch's lines. A variant that takes the ranks down is left out from then on, and all others are timed again."""
        try:
            self.lines += self._lines(task)
        except RanksLost as lost:
            print(f"{task.name}: {lost.culprit} took the ranks down: {lost.reason}", flush=True)
            self.ranks.close()
            self.ranks = self._start()
            self.lost[lost.culprit] = lost.reason
            if lost.culprit == ALL or time.monotonic() > self.deadline:
                self.lines.append(Line(task.name, lost.culprit, "fixed", note=lost.reason))
            else:
                self.measure(task._replace(first_seconds=min(task.first_seconds, self.deadline - time.monotonic())))

    def _lines(self, task: Task) -> list[Line]:
        bound = max(self._all(ALL, session.begin, task.batch, task.heads, self.device_type, task.variants, self.frees))
        lines = {name: Line(task.name, name, made.kind, made.beside, note=self.lost.get(name, "")) for name, made in task.variants.items()}
        seconds: dict[str, float] = {}
        end = time.monotonic() + task.first_seconds
        for name, line in lines.items():
            expected = task.expected(task.variants[name])
            if not line.note and time.monotonic() + expected > end:
                line.note = LEFT_OUT
            if not line.note and (took := self._prepare(line, bound, expected >= LONG_CALL)) is not None:
                seconds[name] = took
        # The same for all, so that all save alike from one call to the next.
        layers = max(1, min(MOST_LAYERS, int(RUN_SECONDS / min(seconds.values(), default=1.0))))
        if self.device_type == "cuda":
            for name, took in seconds.items():
                if took <= self.longest_graph:
                    self._capture(lines[name], layers, bound)
        timed = [name for name in seconds if not lines[name].note.startswith(WRONG)]
        for name in timed:
            lines[name].layers = layers
        end = time.monotonic() + task.seconds
        for round_ in range(self.rounds):
            if round_ >= self.least_rounds and time.monotonic() > end:
                break
            for name in random.Random(round_).sample(timed, len(timed)):
                lines[name].add(self._all(name, session.measure, name, layers, self.eagerly))
        return list(lines.values())

    def _prepare(self, line: Line, bound: float, is_long: bool) -> float | None:
        """The seconds that a call takes, or None where there is nothing to time."""
        outcome = self._try(line.variant, session.prepare, line.variant, is_long)
        if isinstance(outcome, str):
            line.note = outcome
            return None
        line.memory, line.way = max(each.memory for each in outcome), outcome[0].way
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
