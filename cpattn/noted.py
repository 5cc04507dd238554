"""What a call does on its device, step by step, noted by a thread that wants to do it again."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor

T = TypeVar("T")


class Launch(NamedTuple):
    """Something was launched.

    Attributes:
        launch: what launches it again, given tensors like these; it keeps alive what does not change.
        tensors: that it was given; results: that it has made and returned.
    """

    launch: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    results: tuple[Tensor, ...] = ()


class Start(NamedTuple):
    """The call's next transfer was started, by which others than the library's kernels send."""


class Wait(NamedTuple):
    """A transfer was waited for.

    Attributes:
        number: among those that the call has started.
    """

    number: int


class Steps(list["Launch | Start | Wait"]):
    """In order.

    Attributes:
        is_within: whether such a step is under way, which may do anything with its tensors.
        room: for how many bytes more of what is made, all of which is kept alive meanwhile. Below 0 nothing is noted any more.
    """

    is_within = False
    room: float = math.inf

    def note(self, step: Launch | Start | Wait) -> None:
        """Adds a step that is no part of another."""
        if not self.is_within and self.has_room_for(*made_by(step)):
            self.append(step)

    def has_room_for(self, *made: Tensor) -> bool:
        """Counts them. Where it has none, it lets go of all."""
        for x in made:
            self.room -= x.nbytes
        if self.room < 0:
            self.clear()
        return self.room >= 0


def made_by(step: Launch | Start | Wait) -> tuple[Tensor, ...]:
    """What a step has made and returned."""
    return step.results if isinstance(step, Launch) else ()


def tuple_of(results: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """What a step returns: nothing, one tensor, or several."""
    if results is None:
        return ()
    return (results,) if isinstance(results, Tensor) else results


class _OfThread(threading.local):
    steps: Steps | None = None


of_thread = _OfThread()


@contextmanager
def noting() -> Iterator[Steps]:
    """Collects what this thread does meanwhile."""
    before, of_thread.steps = of_thread.steps, Steps()
    try:
        yield of_thread.steps
    finally:
        of_thread.steps = before


@contextmanager
def within_step() -> Iterator[None]:
    """Within it a step is under way."""
    steps = of_thread.steps
    if steps is None:
        yield
        return
    before, steps.is_within = steps.is_within, True
    try:
        yield
    finally:
        steps.is_within = before


def launch(what: Callable[..., T], *tensors: Tensor) -> T:
    """One step, which may be several launches, and operations of torch: ``what(*tensors)``, which returns nothing, or tensors that it has
    made, one or in a tuple."""
    steps = of_thread.steps
    if steps is None:
        return what(*tensors)
    with within_step():
        results: Any = what(*tensors)
    steps.note(Launch(what, tensors, tuple_of(results)))
    return cast("T", results)
