"""One call over a group: what it will send is known before it begins, and is sent whatever happens.

A rank that stopped in the middle of a call would leave its peers waiting, or let its next call meet the rest of this
one. So a call says which transfers it will make, in order. If anything raises, those that are left are carried out all
the same, with NaN for what this rank could not make. Only then the exception leaves. All ranks stay in step,
whichever transfer each of them had come to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch

from cpattn.current import is_capturing
from cpattn.errors import CPError, in_a_line
from cpattn.noted import Start, Steps, Wait, of_thread, within_step
from cpattn.ranges import profiler_runs, ranged
from cpattn.transports.settling import Settling
from cpattn.transports.transfer import Transfer, Work
from cpattn.transports.transport import Transport

T = TypeVar("T")

# How long the transfers of an interrupted call may take before the group is given up, in seconds.
INTERRUPTED_WAITS = 5.0


class InFlight:
    """One call's transfers. No other call may use the group before it ends.

    >>> import cpattn, torch
    >>> alone, x, out = cpattn.LoopbackGroup(1).transport(0), torch.ones(2), torch.empty(2)
    >>> with InFlight(alone, x.device) as in_flight:
    ...     in_flight.expect(lambda: [alone.prepare_all_gather(out, x)])
    ...     in_flight.start().wait()
    >>> out
    tensor([1., 1.])

    Attributes:
        transport: over which it goes.
        device: of what it sends.
        captures: whether a CUDA graph captures it.
        is_profiled: whether a profiler runs, so that what is done is to be named in its trace.

    Raises GroupError where the group was given up, or another call is under way on it.
    """

    __slots__ = (
        "_begin",
        "_expected",
        "_has_begun",
        "_has_failed",
        "_is_ready",
        "_is_refused",
        "_is_starting",
        "_works",
        "captures",
        "device",
        "is_profiled",
        "transport",
    )

    def __init__(self, transport: Transport, device: torch.device) -> None:
        self.transport = transport
        self.device = device
        self.captures = device.type == "cuda" and is_capturing(device)
        self.is_profiled = profiler_runs()
        self._begin = _begin_in_ranges(transport) if self.is_profiled else transport.start
        self._expected: list[Transfer] = []
        self._works: list[_ExpectedWork] = []
        # Until the call has said what it will send, only its ranks' arguments tell, which an interrupt may hide.
        self._has_begun = False
        # An interrupt between the start of a transfer and its record leaves unknown whether it was sent.
        self._is_starting = False
        self._has_failed = False
        self._is_refused = False
        self._is_ready = False

    def expect(self, make: Callable[[], Sequence[Transfer]], *, counts: bool = True) -> None:
        """Says which transfers come next, in order; from now on they are carried out whatever happens.

        Args:
            make: makes them, with the memory that they send from and to.
            counts: whether they begin a call, which ranks compare with ``check=True``.
        """
        if not self._is_ready:
            self._on_all_alike(self.transport.ready, self.device, self.captures)
            self._is_ready = True
        self.transport.state.calls[self.transport.part] += counts
        try:
            self._expected = self._placed(make)
        except BaseException as failure:
            # What a graph captures sends nothing, and is not replayed: the others wait for nobody.
            if self._is_refused or self.captures:
                raise
            # Without memory for its messages a rank can take no part: what earlier calls left there is freed for them.
            try:
                self.transport.release()
                self._expected = self._placed(make)
                self._has_begun = self._has_begun or counts
            except BaseException:
                what = (
                    "make the memory of its messages"
                    if isinstance(failure, (MemoryError, torch.OutOfMemoryError))
                    else "prepare its messages"
                )
                self._give_up(f"a rank could not {what} ({in_a_line(failure)})")
            raise
        self._has_begun = self._has_begun or counts

    def _placed(self, make: Callable[[], Sequence[Transfer]]) -> list[Transfer]:
        """All that the call sends, with what comes next: each message in its place."""
        transfers = [*self._expected, *make()]
        if self._on_all_alike(self.transport.place, transfers):
            return transfers
        # It makes prepared calls forget theirs.
        self.transport.release()
        return [*self._expected, *make()]

    def _on_all_alike(self, step: Callable[..., T], *arguments: Any) -> T:
        """What all ranks do together before they send. What they refuse they refuse alike; who fails alone leaves the others waiting."""
        try:
            return step(*arguments)
        except BaseException as failure:
            self._is_refused = True
            if not isinstance(failure, CPError):
                self._give_up(f"a rank failed where all of them prepare to send ({in_a_line(failure)})")
            raise

    def start(self) -> Work:
        """Starts the next transfer. Raises GroupError where it cannot be sent, which gives the group up."""
        number = len(self._works)
        if number == len(self._expected):
            raise AssertionError("a strategy has started more transfers than it announced")
        transfer = self._expected[number]
        if of_thread.steps is not None and transfer.posted is None:
            return self._noted(of_thread.steps, transfer)
        return self._start(transfer)

    def _noted(self, steps: Steps, transfer: Transfer) -> Work:
        """Starts a transfer that somebody wants to start again."""
        steps.note(Start())
        number = len(self._works)
        with within_step():
            work = self._start(transfer)

        def wait() -> None:
            steps.note(Wait(number))
            with within_step():
                work.wait()

        return Work(wait)

    def _start(self, transfer: Transfer) -> _ExpectedWork:
        self._is_starting = True
        try:
            work = _ExpectedWork(self._begin(transfer), self, transfer)
        except Exception as failure:
            self.fail(failure, transfer)
        self._works.append(work)
        self._is_starting = False
        return work

    @property
    def posts(self) -> list[bool]:
        """Of each transfer that is expected whether the library's own kernels send it."""
        return [transfer.posted is not None for transfer in self._expected]

    def repeat(self, launch: Callable[[], T], bytes_sent: int, *, sends: bool) -> T:
        """Makes a call that launches again all that an earlier one has launched, what sends its messages included.

        Args:
            bytes_sent: by the earlier one.
            sends: whether there are messages.

        Raises what a launch raises. Where there are messages, that gives the group up: nobody knows how many of them were sent.
        """
        self.transport.repeat(bytes_sent)
        self._is_starting = sends
        self._has_begun = True
        try:
            result = launch()
        except Exception as failure:
            if sends:
                self._has_failed = True
                self._give_up(f"a call over it failed ({in_a_line(failure)})")
            raise
        self._is_starting = False
        return result

    def fail(self, failure: Exception, transfer: Transfer) -> None:
        """Gives the group up for a transfer that failed. Raises the GroupError that says so. What could not be launched of a message in
        memory that ranks share, while a graph captures, is raised as it is: nothing was sent, and nothing between ranks has failed."""
        if self.captures and transfer.posted is not None:
            raise failure
        self._has_failed = True
        self._give_up(f"a transfer over it failed ({in_a_line(failure)})")
        raise self.transport.state.error() from failure

    def __enter__(self) -> InFlight:
        state = self.transport.state
        state.enter()
        self.transport.arena.call_captures = self.captures
        try:
            # What a graph captures cannot wait for what was launched outside of it; torch synchronizes before it captures.
            if self.device.type == "cuda" and not self.captures:
                state.follow_last_call(self.device)
        except BaseException:
            self.transport.arena.call_captures = None
            state.leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        state = self.transport.state
        try:
            forgotten = self._unfinished() if error is None else None
            raised = forgotten if error is None else error
            if raised is not None:
                self._settle_after(raised)
            if forgotten is not None:
                raise forgotten
            if error is None and state.failure is not None:
                # Another thread has made a call meanwhile, which another rank's may have met.
                raise state.error()
            if error is None:
                self._end("a call was made")
        finally:
            self.transport.arena.call_captures = None
            state.leave()
            # They refer to this: without the cycle all is freed at once.
            self._works.clear()

    def _unfinished(self) -> AssertionError | None:
        """What a strategy has forgotten of its transfers."""
        if len(self._works) < len(self._expected):
            return AssertionError("a strategy has not started all the transfers that it announced")
        for work in self._works:
            if not work.is_done:
                return AssertionError("a strategy has not waited for all the transfers that it started")
        return None

    def _settle_after(self, error: BaseException) -> None:
        """Carries out what is left of the call's transfers, and waits for all, or gives the group up."""
        what = in_a_line(error)
        if self.captures:
            # Nothing was sent: a capture that fails is never replayed.
            self.transport.forget()
            return
        if self._is_starting:
            self._give_up(f"a call was interrupted as it began a transfer ({what})")
            return
        if self._has_failed:
            return  # what cannot be sent is not tried again
        is_interrupt = not isinstance(error, Exception)
        if is_interrupt and not self._has_begun and self.transport.size > 1:
            self._give_up(f"a call was interrupted before it began to send ({what}), while other ranks may wait for it")
            return
        left = self._expected[len(self._works) :]
        if not left and all(work.is_done for work in self._works):
            self._end(f"a call raised ({what})")
            return
        settling = Settling(self.transport, self._works, left, self.device)
        try:
            settling.wait(INTERRUPTED_WAITS if is_interrupt else None)
        except BaseException:
            # Ctrl-C while it waited, for the first time or again.
            is_interrupt = True
            _wait_once_more(settling)
            raise
        finally:
            if not settling.is_finished:
                settling.abandon()
                happened = "was interrupted" if is_interrupt else "raised"
                why = f"not within {INTERRUPTED_WAITS:g} s" if settling.failure is None else in_a_line(settling.failure)
                self._give_up(f"a call {happened} ({what}), and its transfers could not be finished ({why})")

    def _end(self, what: str) -> None:
        """Lets the transport end the call, or gives the group up, saying what had happened."""
        try:
            self.transport.settle()
        except BaseException as failure:
            self._give_up(f"{what}, and could not be ended ({in_a_line(failure)})")
            raise

    def _give_up(self, what_happened: str) -> None:
        self._is_starting = False
        self.transport.state.give_up(what_happened)


class _ExpectedWork(Work):
    """A transfer of a call. To wait for it again does nothing; where it cannot be finished the group is given up."""

    __slots__ = ("_in_flight", "_transfer", "_work", "is_done")

    def __init__(self, work: Work, in_flight: InFlight, transfer: Transfer) -> None:
        self._work = work
        self._in_flight = in_flight
        self._transfer = transfer
        self.is_done = False

    def wait(self) -> None:
        if self.is_done:
            return
        try:
            self._work.wait()
        except Exception as failure:
            self._in_flight.fail(failure, self._transfer)
        self.is_done = True


def _begin_in_ranges(transport: Transport) -> Callable[[Transfer], Work]:
    """How the transport starts a transfer, for a profiler: its start and the wait for its end are ranges."""

    def begin(transfer: Transfer) -> Work:
        return Work(ranged("wait", transport.start(transfer).wait))

    return ranged("send", begin)


def _wait_once_more(settling: Settling) -> None:
    try:
        settling.wait(INTERRUPTED_WAITS)
    except BaseException:
        pass  # interrupted again: enough
