"""What a call would cost on a kind of machine, as ``cpattn plan --machine`` prints it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cpattn.byte_sizes import in_words
from cpattn.cli.console import print_table, print_title, say
from cpattn.cli.traffic import Shape, problem_of
from cpattn.costs.estimate import Estimate, Estimates, estimate
from cpattn.machine import MACHINES, TRANSPORTS, Machine
from cpattn.metadata.plan import Plan


def estimates_of(plan: Plan, shape: Shape, machine: str) -> Estimates:
    """The fastest first. Raises UnsupportedError where no way is known."""
    return estimate(plan, problem_of(plan, shape), machine)


def print_estimates(found: Estimates, shape: Shape, cp_size: int) -> None:
    """A table with a line for each way, of a group of that many ranks."""
    print_title(f"what one attention call would cost on {found.machine}, in us, the fastest first")
    print(f"{shape}\n{sources(MACHINES[found.machine], cp_size)}\n")
    header = ["strategy", "transport", "overlap", "backend", "graph", "eager", "compute", "exposed", "sent"]
    print_table(header, [_line(one) for one in found], left=(0, 1, 3))
    print()
    for way, reason in found.passed_over.items():
        say(f"passed over: {way}: {reason}")
    say("graph: in a CUDA graph. eager: one call after another, with the host's time.")
    say("compute: attention alone. exposed: what of the transfers is not hidden.")


def sources(machine: Machine, cp_size: int) -> str:
    """What of the constants was measured, and what is stated by data sheets.

    >>> sources(MACHINES["h100-nvlink"], 8)
    'GPUs: measured; links: measured between 2 ranks, taken as the same between 8'
    """
    gpus = f"GPUs: {'measured' if machine.measured else 'from data sheets'}"
    links = [link for link in (machine.link(transport, cp_size) for transport in TRANSPORTS) if link is not None]
    ranks = min(link.measured_ranks for link in links)
    if cp_size == 1:
        return gpus
    if ranks == 0:
        return f"{gpus}; links: from data sheets"
    return f"{gpus}; links: measured between {ranks} ranks" + (f", taken as the same between {cp_size}" if cp_size != ranks else "")


def as_json(found: Estimates) -> list[dict[str, Any]]:
    """Times are in seconds."""
    return [asdict(one) | {"graph": one.graph, "eager": one.eager} for one in found]


def _line(one: Estimate) -> list[str]:
    times = [_us(seconds) for seconds in (one.graph, one.eager, one.compute, one.exposed)]
    return [one.strategy, one.transport, str(one.overlap), one.backend, *times, in_words(one.bytes_sent)]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.{1 if seconds < 1e-3 else 0}f}"
