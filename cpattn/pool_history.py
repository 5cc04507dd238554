"""The steps that a KVPool has planned and can still take back."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from cpattn.errors import CPError
from cpattn.metadata.plan import Plan
from cpattn.pool_pages import CachedRequest


class Before(NamedTuple):
    """A request of a step as it was before it: how many tokens it had, and how often it had been forked and truncated."""

    name: Hashable
    request: CachedRequest
    length: int
    forks: int
    truncations: int

    def what_came_since(self, requests: Mapping[Hashable, CachedRequest]) -> str | None:
        """What has happened to the request since, of all that no step can be undone after."""
        # A request that was released may have been admitted again under its name.
        if requests.get(self.name) is not self.request:
            return "released"
        if self.request.forks != self.forks:
            return "forked"
        return "truncated" if self.request.truncations != self.truncations else None


class _Step(NamedTuple):
    number: int
    plan: weakref.ref[Plan]
    before: tuple[Before, ...]


class History:
    """Records of planned steps, the last one on the right.

    To undo a step takes its plan, so a record is of use only as long as the plan is alive; nor can a step before it be
    undone then. Such records are forgotten when the next step is planned: how many there are is up to who keeps plans.
    """

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque()
        self._dead: list[int] = []  # numbers of steps whose plans are gone
        self._planned = 0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, plan: Plan, before: Sequence[Before]) -> None:
        while self._dead:
            number = self._dead.pop()
            while self._steps and self._steps[0].number <= number:
                self._steps.popleft()
        # A plan may die in the middle of anything, so its number is only noted then. The callback knows the list alone:
        # with ``self`` in it, the pool would be kept alive.
        number, dead = self._planned, self._dead
        self._planned += 1
        self._steps.append(_Step(number, weakref.ref(plan, lambda _: dead.append(number)), tuple(before)))

    def last(self, plan: Any, requests: Mapping[Hashable, CachedRequest]) -> tuple[Before, ...]:
        """The requests of the last step as they were before it. Raises CPError if ``plan`` is not the plan of that step, or a
        request of it has been released, forked or truncated since."""
        if not isinstance(plan, Plan):
            raise CPError(f"undo got a {type(plan).__name__}; pass the Plan that the last call of pool.plan returned")
        # By identity: another step may have an equal plan.
        later = next((count for count, step in enumerate(reversed(self._steps)) if step.plan() is plan), None)
        if later is None:
            raise CPError(
                "this plan is not of a step that the pool can take back: the step is undone already, or before one whose plan is gone, or "
                "the plan is another's or a copy; pass the very Plan that the last call of pool.plan returned"
            )
        if later:
            raise CPError(f"this plan is not of the last step: {later} came after it and still stand; undo the last step first")
        for before in self._steps[-1].before:
            since = before.what_came_since(requests)
            if since:
                raise CPError(
                    f"request {before.name!r} was {since} since this step was planned, and a step can be undone only before that; release "
                    "the step's requests instead, and admit them again"
                )
        return self._steps[-1].before

    def drop_last(self) -> None:
        self._steps.pop()
