"""A call's attention for a profiler: each hop and each launch in it is a named range in the trace."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.profiler import record_function

from cpattn.exchange.attend import Attend, Attention
from cpattn.exchange.schedule import Schedule
from cpattn.keys import Keys
from cpattn.ranges import in_range, ranged
from cpattn.spans import Spans


class AttendInRanges(Attend):
    """What :class:`Attend` does, in ranges such as ``cpattn::ring hop 1/4`` and, inside, ``cpattn::attend triton``.

    Which hop is under way follows from the schedule: each hop says how many results it gives. A hop of several launches
    is as many ranges of one name.

    Args:
        how, q, sinks, scales: as of :class:`Attend`.
        strategy: its name.
        schedule: of the call.
    """

    __slots__ = ("_given", "_hop", "_schedule", "_strategy")

    def __init__(
        self, how: Attention, q: Tensor, sinks: Tensor | None, scales: tuple[Tensor, Tensor] | None, strategy: str, schedule: Schedule
    ) -> None:
        super().__init__(how, q, sinks, scales)
        launch = f"attend {how.backend.name}"
        self._launch = ranged(launch, self._launch)
        if self._accumulate is not None:
            self._accumulate = ranged(launch, self._accumulate)
        if self._attend_into is not None:
            self._attend_into = ranged(launch, self._attend_into)
        self._strategy, self._schedule = strategy, schedule
        # The hop under way, and the results that it has given.
        self._hop = self._given = 0

    def __call__(self, keys: Keys, spans: Spans) -> None:
        with self._hop_range():
            super().__call__(keys, spans)
        self._given += 1
        if self._hop < len(self._schedule) and self._given >= self._schedule[self._hop].results:
            self._next_hop()

    def heads(self, keys: Keys, spans: Spans, heads: slice) -> None:
        with self._hop_range():
            super().heads(keys, spans, heads)
        if heads.stop == self._q.shape[1]:
            self._next_hop()

    def others(self, q: Tensor, keys: Keys, launches: Sequence[Spans], heads: slice | None = None) -> tuple[Tensor, Tensor]:
        with self._hop_range():
            result = super().others(q, keys, launches, heads)
        self._next_hop()
        return result

    def of_heads(self, q: Tensor, heads: slice) -> Attend:
        sinks = None if self._sinks is None else self._sinks[heads]
        return AttendInRanges(self._how, q, sinks, self._scales_of(heads), self._strategy, self._schedule)

    def _hop_range(self) -> record_function:
        return in_range(f"{self._strategy} hop {self._hop}/{len(self._schedule)}")

    def _next_hop(self) -> None:
        self._hop, self._given = self._hop + 1, 0
