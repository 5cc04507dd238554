"""What ``auto`` takes of the ways in which a call can be made: the one that is estimated to take the least.

All follows from plan, problem, machine and the transport that the ranks have agreed on, so that every rank decides alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cpattn.attention.auto import able_backends
from cpattn.attention.backend import Backend
from cpattn.attention.custom import AttentionCallable
from cpattn.attention.registry import BACKENDS
from cpattn.costs.corrections import corrected
from cpattn.costs.estimate import why_unknown
from cpattn.costs.known_machine import knows_backends
from cpattn.costs.launches import FloatArray, Launches
from cpattn.costs.steps import Choice, Tally, tally_of
from cpattn.errors import UnsupportedError
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.pass_q import PASS_Q, PASS_Q_RING
from cpattn.exchange.ring import RING
from cpattn.exchange.schedule import Hop, Schedule, alignments
from cpattn.exchange.strategy import Strategy
from cpattn.machine import H100, KernelCosts, Machine
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem

# What goes hop by hop, and how the same is gathered at once.
_GATHERS = {RING.name: ALL_GATHER.name, PASS_Q_RING.name: PASS_Q.name}


class Way(NamedTuple):
    """In which a call can be made."""

    strategy: Strategy
    schedule: Schedule
    backend: Backend


class Compared(NamedTuple):
    """A way, and the seconds that it is estimated to take; or, where ``at_least`` already was more than another takes, no less than
    that."""

    way: Way
    seconds: float
    at_least: bool


@dataclass(frozen=True, eq=False)
class Decision:
    """What is taken.

    Attributes:
        compared: with what, the fastest first; empty where there was one way alone, or none that the model knows.
        machine: by whose constants; transport: over which; as_graph: whether as a CUDA graph, or eagerly.
    """

    way: Way
    compared: tuple[Compared, ...]
    machine: Machine
    transport: str
    as_graph: bool


@dataclass(frozen=True)
class Setting:
    """For what is decided."""

    plan: Layout
    problem: Problem
    machine: Machine
    transport: str

    def decide(self, groups: Sequence[Sequence[Strategy]], backend: str | Backend | AttentionCallable) -> Decision:
        """Of the first of these groups of strategies that has a way. Raises UnknownNameError or UnsupportedError where none has."""
        refusal: UnsupportedError | None = None
        for strategies in groups:
            ways: list[Way] = []
            for strategy in strategies:
                schedule = strategy.schedule(self.problem, self.plan)
                try:
                    able = able_backends(backend, self.problem, alignments(schedule))
                except UnsupportedError as error:
                    refusal = error
                else:
                    ways += [Way(strategy, schedule, one) for one in able]
            if ways:
                return self._fastest(ways)
        assert refusal is not None  # there is at least one strategy
        raise refusal

    def _fastest(self, ways: list[Way]) -> Decision:
        compared: list[Compared] = []
        if len(ways) > 1:
            kernels = self._kernels(ways)
            known = [way for way in ways if way.backend.name in kernels and why_unknown(way.strategy, self.problem) is None]
            ways = known or ways
            compared = self._compared(known, kernels) if len(known) > 1 else []
        return Decision(compared[0].way if compared else ways[0], tuple(compared), self.machine, self.transport, self.problem.fixed)

    def _kernels(self, ways: list[Way]) -> dict[str, KernelCosts]:
        """The constants of each backend. Where there are none for what can serve the call, those of one stand for the first, by which
        strategies are compared."""
        machine = self.machine
        names = [way.backend.name for way in ways]
        kernels = {kernel.backend: kernel for kernel in machine.kernels if knows_backends(machine, self.problem.device)}
        found = {name: kernels[name] for name in names if name in kernels}
        return found or {names[0]: machine.kernels[0]}

    def _compared(self, ways: list[Way], kernels: dict[str, KernelCosts]) -> list[Compared]:
        attention = Launches(self.plan, self.problem, self.machine, tuple(kernels.values()))
        found: list[Compared] = []
        tallies: dict[tuple[str, str], Tally] = {}
        beside: dict[str, Tally] = {}
        for way in ways:
            name, backend = way.strategy.name, way.backend.name
            gathered = tallies.get((_GATHERS[name], backend)) if name in _GATHERS and not self.plan.sharded else None
            if gathered is not None:
                if name not in beside:
                    beside[name] = self._beside_hops(way)
                seconds = self._at_least(way, kernels[backend], gathered, beside[name])
                if seconds >= min(one.seconds for one in found):
                    found.append(Compared(way, seconds, at_least=True))
                    continue
            tally = tallies[name, backend] = self._tally(way, kernels[backend], attention)
            found.append(Compared(way, self._seconds(way, tally.seconds, tally.host), at_least=False))
        # Of equal ones the first; to a ns, so that nothing hangs on a last bit.
        return sorted(found, key=lambda one: (round(one.seconds * 1e9), one.at_least))

    def _beside_hops(self, way: Way) -> Tally:
        """What goes hop by hop takes at least, with any backend, beside its launches: for copies, for merges within a kernel, and for what
        nothing hides."""
        return self._tally(way._replace(backend=BACKENDS["triton"]), _NO_TIME, _Long(self.plan))

    def _at_least(self, way: Way, kernel: KernelCosts, gathered: Tally, beside: Tally) -> float:
        """Seconds of what goes hop by hop, given the same gathered at once: its tiles are as many, and no fuller, but it has a launch for
        each rank."""
        hops = len(way.schedule)
        compute = gathered.compute + (self.plan.cp_size - 1) * kernel.overhead
        return self._seconds(way, compute + beside.moves + beside.exposed, beside.host + hops * kernel.host)

    def _tally(self, way: Way, kernel: KernelCosts, attention: Launches) -> Tally:
        link = self.machine.link(self.transport, self.plan.cp_size)
        assert link is not None  # who names a transport has looked
        choice = Choice(self.plan, self.problem, self.machine, way.schedule, self.transport, link, way.backend, kernel, attention)
        return tally_of(way.strategy, choice)

    def _seconds(self, way: Way, graph: float, host: float) -> float:
        return corrected(way.strategy.name, graph, self.machine.host_call + host, as_graph=self.problem.fixed)


# A kernel that the host launches for nothing.
_NO_TIME = replace(H100.kernels[0], host=0.0)


class _Long(Launches):
    """Launches that hide all that can be hidden beside them."""

    def __init__(self, plan: Layout) -> None:
        self._second: FloatArray = np.ones(plan.cp_size)

    def seconds(self, hop: Hop, kernel: KernelCosts, groups: int = 1, over_pages: bool = False) -> FloatArray:
        """A second each."""
        return self._second
