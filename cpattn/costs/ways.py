"""The ways in which a call can be made, and what each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from cpattn.attention.backend import Backend
from cpattn.attention.registry import BACKENDS
from cpattn.costs.corrections import corrected
from cpattn.costs.launches import Given, Launches
from cpattn.costs.steps.of_strategies import tally_of
from cpattn.costs.steps.tally import Choice, Tally
from cpattn.exchange.schedule import Schedule, num_results
from cpattn.exchange.strategy import Strategy
from cpattn.machine import H100, KernelCosts, LinkCosts, Machine
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem


class Making:
    """A strategy's schedule, worked out once, when it is asked for."""

    def __init__(self, strategy: Strategy, problem: Problem, plan: Layout) -> None:
        self._of = strategy, problem, plan
        self._made: Schedule | None = None

    def __call__(self) -> Schedule:
        """That schedule."""
        if self._made is None:
            strategy, problem, plan = self._of
            self._made = strategy.schedule(problem, plan)
        return self._made


class Way(NamedTuple):
    """In which a call can be made.

    Attributes:
        make: works the strategy's schedule out, once for all backends: many a way is passed over without it.
    """

    strategy: Strategy
    make: Callable[[], Schedule]
    backend: Backend

    @property
    def schedule(self) -> Schedule:
        """Of the strategy."""
        return self.make()


@dataclass(frozen=True, eq=False)
class Call:
    """That is to be made, and by which constants ways to make it are compared.

    Attributes:
        kernels: the constants of each backend that is compared, by its name.
        beside: what has been worked out of :meth:`beside_hops`, by strategy.
    """

    plan: Layout
    problem: Problem
    machine: Machine
    transport: str
    kernels: dict[str, KernelCosts]
    beside: dict[str, Tally] = field(default_factory=dict)

    @property
    def link(self) -> LinkCosts:
        """Of the transport."""
        link = self.machine.link(self.transport, self.plan.cp_size)
        assert link is not None  # who names a transport has looked
        return link

    @cached_property
    def launches(self) -> Launches:
        """Its attention launches, by the kernels that are compared; what is worked out of them for bounds holds for estimates as well."""
        return Launches(self.plan, self.problem.attended, self.machine, tuple(self.kernels.values()))

    def tally(self, way: Way, kernel: KernelCosts, attention: Launches) -> Tally:
        """What a way adds up to, with launches that take so long."""
        schedule, backend = way.schedule, way.backend
        choice = Choice(
            self.plan, self.problem, self.machine, schedule, self.transport, self.link, backend, kernel, attention, num_results(schedule)
        )
        return tally_of(way.strategy, choice)

    def seconds(self, way: Way, graph: float, host: float) -> float:
        """By which ways are compared: of what one takes on the device, and on the host."""
        return corrected(way.strategy.name, graph, self.machine.host_call + host, as_graph=self.problem.fixed)

    def beside_hops(self, way: Way) -> Tally:
        """What goes hop by hop takes at least, with any backend, beside its launches: for copies, for merges within a kernel, and for what
        nothing hides. Worked out once."""
        name = way.strategy.name
        if name not in self.beside:
            self.beside[name] = self.tally(way._replace(backend=BACKENDS["triton"]), _NO_TIME, Given(1.0))
        return self.beside[name]


# A kernel that the host launches for nothing, and that leaves place for kernels that carry messages beside it.
_NO_TIME = replace(H100.kernels[0], host=0.0, stays=False)
