"""Faults at random points of a call: at the n-th line of cpattn that a rank's thread runs while its transfers are in flight."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import cpattn
from cpattn.transports.in_flight import InFlight

PACKAGE = str(Path(cpattn.__file__).parent)
# What starts a transfer, waits for one, or makes memory with all ranks: where it raises the transfer itself has failed, which is
# another matter.
TRANSPORT = tuple(
    f"{PACKAGE}/transports/{name}.py"
    for name in (
        "in_flight",
        "group_state",
        "process_group",
        "loopback",
        "part",
        "transfer",
        "peer_memory",
        "peer_transfers",
        "shared_memory",
        "peer_processes",
        "peer_heap",
        "peer_loopback",
    )
)
BASE, MEMORY = f"{PACKAGE}/transports/transport.py", {"buffer", "reuse", "release", "allocate"}


class Injected(RuntimeError):
    """What is raised."""


class _Point:
    def __init__(self, line: int, fault: BaseException) -> None:
        self.lines_left = line
        self.fault = fault
        self.is_in_flight = False
        self.was_raised = False

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Called for each line that the thread runs."""
        name = frame.f_code.co_filename
        if name == TRANSPORT[0]:
            # It tells when the call has begun to send, and when it ends.
            call = frame.f_locals.get("self")
            if isinstance(call, InFlight):
                self.is_in_flight = frame.f_code.co_name != "__exit__" and (
                    getattr(call, "_has_begun", False) or frame.f_code.co_name in ("expect", "_placed")
                )
            return None
        if not name.startswith(PACKAGE) or name in TRANSPORT or (name == BASE and frame.f_code.co_name not in MEMORY):
            return None
        if _is_transfer(frame):
            return None
        # A with statement is visited once more as it ends, before __exit__ is called, where nothing but an interrupt can raise.
        is_end = "with InFlight(" in linecache.getline(name, frame.f_lineno)
        if event == "line" and self.is_in_flight and not self.was_raised and not is_end:
            self.lines_left -= 1
            if self.lines_left < 0:
                self.was_raised = True
                raise self.fault
        return self.trace


def _is_transfer(frame: FrameType | None) -> bool:
    """Whether it is a part of starting a transfer or of waiting for one."""
    while frame is not None:
        if frame.f_code.co_filename == TRANSPORT[0] and frame.f_code.co_name in ("start", "wait"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def fault_at(line: int, fault: BaseException) -> Iterator[_Point]:
    """Raises ``fault`` in this thread at the n-th such line; the point says afterwards whether there were so many."""
    point = _Point(line, fault)
    before = sys.gettrace()
    sys.settrace(point.trace)
    try:
        yield point
    finally:
        sys.settrace(before)
