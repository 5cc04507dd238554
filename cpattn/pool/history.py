"""The steps that a KVPool has planned and can still take back."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from cpattn.device_tables import IntArray
from cpattn.errors import CPError
from cpattn.metadata.plan import Plan
from cpattn.pool.books import CachedRequest, Inherited


class Before(NamedTuple):
    """A request of a step, and how many tokens it had before."""

    name: Hashable
    request: CachedRequest
    length: int


class Written(NamedTuple):
    """A page that a step writes to from token ``start`` of the page on, and how often it had been taken by then."""

    holder: int
    page: int
    start: int
    takes: int


class PlannedStep(NamedTuple):
    """What undoing a step takes."""

    number: int
    plan: weakref.ref[Plan]
    before: tuple[Before, ...]
    written: tuple[Written, ...]

    def check_no_heir(self, requests: Mapping[Hashable, CachedRequest]) -> None:
        """Raises CPError if a request that was forked from tokens of the step still has some."""
        for name, request in requests.items():
            if any(inherited.number == self.number for inherited in request.inherited):
                raise CPError(
                    f"request {name!r} was forked from tokens of this step, and would keep them; release it first, or truncate it to the "
                    "tokens from before the step"
                )


def pages_written(
    requests: Sequence[CachedRequest], held: IntArray, new: IntArray, page_size: int, takes: Sequence[Mapping[int, int]]
) -> list[Written]:
    """Where a step writes whose requests have their pages by now.

    Args:
        held, new: ``[requests, holders]`` the tokens before the step, and those that it adds.
        takes: of each holder's pages.
    """
    written = []
    for number, holder in zip(*(axis.tolist() for axis in new.nonzero()), strict=True):
        first, start = divmod(int(held[number, holder]), page_size)
        for page in requests[number].pages[holder][first:]:
            written.append(Written(holder, page, start, takes[holder][page]))
            start = 0
    return written


class History:
    """Records of planned steps, the last one on the right.

    To undo a step takes its plan, so a record is of use only as long as the plan is alive; nor can a step before it be
    undone then. Such records are forgotten when the next step is planned: how many there are is up to who keeps plans.
    """

    def __init__(self) -> None:
        self._steps: deque[PlannedStep] = deque()
        self._dead: list[int] = []  # numbers of steps whose plans are gone
        self._planned = 0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, plan: Plan, before: Sequence[Before], written: Sequence[Written]) -> None:
        while self._dead:
            number = self._dead.pop()
            while self._steps and self._steps[0].number <= number:
                self._steps.popleft()
        # A plan may die in the middle of anything, so its number is only noted then. The callback knows the list alone:
        # with ``self`` in it, the pool would be kept alive.
        number, dead = self._planned, self._dead
        self._planned += 1
        self._steps.append(PlannedStep(number, weakref.ref(plan, lambda _: dead.append(number)), tuple(before), tuple(written)))

    def tokens_of_steps(self, request: CachedRequest, length: int) -> list[Inherited]:
        """Where, in the request's first tokens, those of each step begin that can still be undone."""
        own = [Inherited(step.number, before.length) for step in self._steps for before in step.before if before.request is request]
        return [inherited for inherited in [*request.inherited, *own] if inherited.first < length]

    def last(self, plan: Any) -> PlannedStep:
        """The last step. Raises CPError if ``plan`` is not the plan of it."""
        if not isinstance(plan, Plan):
            raise CPError(f"undo got a {type(plan).__name__}; pass the Plan that the last call of pool.plan returned")
        # By identity: another step may have an equal plan.
        later = next((count for count, step in enumerate(reversed(self._steps)) if step.plan() is plan), None)
        if later is None:
            raise CPError(
                "this plan is not of a step that the pool can take back: the step is undone already, or a later step's plan is gone, or "
                "this is a copy or another pool's plan; pass the same Plan object that the last call of pool.plan returned"
            )
        if later:
            raise CPError(f"this plan is not of the last step: {later} came after it and still stand; undo the last step first")
        return self._steps[-1]

    def drop_last(self) -> None:
        self._steps.pop()
