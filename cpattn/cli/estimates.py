"""What a call would cost on a kind of machine, as ``cpattn plan --machine`` prints it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cpattn.byte_sizes import in_words
from cpattn.cli.console import print_table, print_title, say
from cpattn.cli.traffic import Shape, problem_of
from cpattn.costs.estimate import Estimate, Estimates, estimate
from cpattn.costs.machine import MACHINES
from cpattn.metadata.plan import Plan


def estimates_of(plan: Plan, shape: Shape, machine: str) -> Estimates:
    """The fastest first. Raises UnsupportedError where no way is known."""
    return estimate(plan, problem_of(plan, shape), machine)


def print_estimates(found: Estimates, shape: Shape) -> None:
    """A table with a line for each way."""
    kind = "measured" if MACHINES[found.machine].measured else "from data sheets"
    print_title(f"what one attention call would cost on {found.machine} ({kind}), in us, the fastest first")
    print(f"{shape}\n")
    header = ["strategy", "transport", "overlap", "backend", "graph", "eager", "compute", "exposed", "sent"]
    print_table(header, [_line(one) for one in found], left=(0, 1, 3))
    print()
    for way, reason in found.passed_over.items():
        say(f"passed over: {way}: {reason}")
    say("graph: in a CUDA graph. eager: one call after another, with the host's time.")
    say("compute: attention alone. exposed: what of the transfers is not hidden.")


def as_json(found: Estimates) -> list[dict[str, Any]]:
    """Times are in seconds."""
    return [asdict(one) | {"graph": one.graph, "eager": one.eager} for one in found]


def _line(one: Estimate) -> list[str]:
    times = [_us(seconds) for seconds in (one.graph, one.eager, one.compute, one.exposed)]
    return [one.strategy, one.transport, str(one.overlap), one.backend, *times, in_words(one.bytes_sent)]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.{1 if seconds < 1e-3 else 0}f}"
