"""A table of what the other ranks see where one is killed, stopped or raises, and after how long.

python tests/faults.py

Each fault meets the first of three calls: before it, within its attention, or after it, on rank 1, for each strategy, over
gloo, and where there are two GPUs over NCCL (with both settings of torch that say what a timeout does) and through the memory of
peers. ``raises before`` stands for a rank that leaves a call out and goes on, once without and once with ``check=True`` and labels;
``comes back`` for one that is stopped until the others have given it up.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from itertools import product
from typing import Any

import torch
from programs import fault_programs
from programs.fault_programs import Seen

import cpattn
from cpattn.testing import ProcessRanks
from cpattn.transports.groups import Kind

VICTIM = 1
# NCCL's watchdog takes a minute and more to end a process after a timeout.
PATIENCE = 150
SETTING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
PEERS: Kind = "peer_memory"
RIGHT, PARTLY = "the right result", ("NaN, all of it", "NaN where it needs that rank, the rest right")
HEADER = f"| over | strategy | the rank | when | the others' first call | second call | third call | it itself |\n|{'---|' * 8}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=int, default=5, help="of the groups, in seconds")
    parser.add_argument("--strategies", nargs="*", default=list(cpattn.STRATEGIES))
    on_gpus = ["nccl 2", "nccl 3", PEERS] if torch.cuda.device_count() > 1 else []
    parser.add_argument("--transports", nargs="*", default=["gloo", *on_gpus])
    parser.add_argument("--faults", nargs="*", default=["raises", "stopped", "comes back", "killed"])
    parser.add_argument("--when", nargs="*", default=["before", "during", "after"])
    given = parser.parse_args()
    print(f"torch {torch.__version__}, timeout of the groups {given.timeout} s; nccl N: {SETTING}=N\n\n{HEADER}", flush=True)
    wrong = 0
    for transport in given.transports:
        with Groups(transport, given.timeout) as groups:
            for strategy, fault, when in product(given.strategies, given.faults, given.when):
                if fault == "comes back" and transport != PEERS:
                    continue
                # Without a check a call that one rank leaves out cannot be told from its next one.
                for check in (False, True) if (fault, when) == ("raises", "before") else (False,):
                    line, is_wrong = run(groups, strategy, fault, when, check)
                    wrong += is_wrong
                    print(line, flush=True)
    print(f"\n{wrong} lines hold what must not be" if wrong else "\nnothing hung, and nothing was wrong that could be seen")
    return int(bool(wrong))


class Groups:
    """Processes in a group, made anew where the last run has left them without one that works."""

    def __init__(self, transport: str, timeout: int) -> None:
        self.transport = transport
        self.timeout = timeout
        name, _, self._setting = transport.partition(" ")
        self.kind = "gloo" if name == "gloo" else "nccl"
        of_group: Kind = "auto" if name == "gloo" else PEERS if name == PEERS else "collectives"
        self._program = partial(fault_programs.go_on, kind=of_group, limit=float(timeout))
        self._ranks: ProcessRanks | None = None

    def run(self, strategy: str, fault: str, when: str, check: bool) -> list[tuple[bool, Any]]:
        if self._setting:
            os.environ[SETTING] = self._setting
        if self._ranks is None:
            # Where a GPU waits no longer than its own limit, the hosts, which compile first, wait for longer.
            timeout, patience = (30, 30) if self.transport == PEERS else (self.timeout, PATIENCE)
            self._ranks = ProcessRanks(2 if self.kind == "nccl" else 3, timeout=timeout, transport=self.kind, patience=patience)
        device = "cuda" if self.kind == "nccl" else "cpu"
        outcomes = self._ranks.outcomes(self._program, strategy, VICTIM, fault, when, device, check)
        if fault != "raises":
            self.__exit__()
        return outcomes

    def __enter__(self) -> Groups:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ranks is not None:
            self._ranks.close()
        self._ranks = None


def run(groups: Groups, strategy: str, fault: str, when: str, check: bool) -> tuple[str, bool]:
    """One line of the table, and whether it shows what must not be."""
    begin = time.monotonic()
    outcomes = groups.run(strategy, fault, when, check)
    seconds = time.monotonic() - begin
    others = [outcome for rank, outcome in enumerate(outcomes) if rank != VICTIM]
    cells = [told([outcome[1][n] if outcome[0] and len(outcome[1]) > n else None for outcome in others], others, seconds) for n in range(3)]
    itself = told([outcomes[VICTIM][1][0]], [], 0) if outcomes[VICTIM][0] else ended(outcomes[VICTIM][1])
    is_wrong = not is_as_it_must_be(groups.transport, fault, when, check, outcomes)
    label = f"{fault}{', all calls checked' if check else ''}"
    return f"| {groups.transport} | {strategy} | {label} | {when} | {' | '.join(cells)} | {itself} |", is_wrong


def is_as_it_must_be(transport: str, fault: str, when: str, check: bool, outcomes: list[tuple[bool, Any]]) -> bool:
    """Whether every rank saw what it should."""
    others = [outcome for rank, outcome in enumerate(outcomes) if rank != VICTIM]
    if fault == "raises":
        if not all(done for done, _ in outcomes):
            return False
        whats = [[call.what for call in calls] for _, calls in others]
        if when == "before":
            # Unchecked, a call that one rank leaves out cannot be told from its next one.
            return not check or all("the ranks disagree on the label" in what for seen in whats for what in seen)
        goes_on = [seen[1:] for seen in whats] + [[call.what for call in outcomes[VICTIM][1][1:]]]
        return all(seen[0] in (RIGHT, *PARTLY) for seen in whats) and all(seen == [RIGHT] * 2 for seen in goes_on)
    for done, calls in others:
        if not done:
            # With this setting torch ends the process.
            if transport == "nccl 3" and "exit code" in str(calls):
                continue
            return False
        failed = [call.what for call in calls if call.what != RIGHT]
        # There the call that nobody came to in time ends in NaN.
        if transport == PEERS and failed and failed[0] in PARTLY:
            failed = failed[1:]
        # With this one the call that timed out goes on with whatever was in memory.
        if transport == "nccl 2" and failed and not failed[0].startswith("GroupError"):
            failed = failed[1:]
        if len(set(failed)) > 1 or not all(what.startswith("GroupError: this group cannot be used any more") for what in failed):
            return False
    return True


def told(calls: list[Seen | None], outcomes: list[tuple[bool, object]], seconds: float) -> str:
    """What was seen of one call by several ranks, and when at the latest."""
    said = sorted({short(call.what) for call in calls if call is not None})
    if not said:
        return ended(str(outcomes[0][1])) + f", {seconds:.1f} s after the start" if outcomes and not outcomes[0][0] else "-"
    latest = max(call.seconds for call in calls if call is not None)
    return " / ".join(said) + f" ({latest:.1f} s)"


def short(what: str) -> str:
    name, _, rest = what.partition(": ")
    for known in ("a transfer over it failed", "did not post or read", "the ranks disagree on the label", "an error of this rank's own"):
        if known in rest:
            return f"{name}: {known}"
    return what.replace("|", "/")[:100]


def ended(text: str) -> str:
    """What became of a process that gave no answer."""
    if " with exit" in text:
        return "the process ended" + text[text.index(" with exit") :]
    return "was killed at the end" if "killed" in text else text[-100:]


if __name__ == "__main__":
    sys.exit(main())
