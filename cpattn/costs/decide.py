"""What ``auto`` takes of the ways in which a call can be made: the one that is estimated to take the least.

All follows from plan, problem, machine and the transport that the ranks have agreed on, so that every rank decides alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cpattn.attention.auto import able_backends
from cpattn.attention.backend import Backend
from cpattn.attention.custom import AttentionCallable
from cpattn.costs.compare import Compared, compared
from cpattn.costs.contenders import contenders
from cpattn.costs.estimate import why_unknown
from cpattn.costs.known_machine import knows_backends
from cpattn.costs.ways import Call, Making, Way
from cpattn.errors import UnsupportedError
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.schedule import alignments
from cpattn.exchange.strategy import Strategy
from cpattn.exchange.ulysses import ULYSSES
from cpattn.machine import KernelCosts, Machine
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem
from cpattn.spans import Alignment


@dataclass(frozen=True, eq=False)
class Decision:
    """What is taken.

    Attributes:
        way: it.
        call: by which constants, and over which transport.
        ways: with which others it was compared; empty where there was one way alone, or none that the model knows.
    """

    way: Way
    call: Call
    ways: Sequence[Way]

    @cached_property
    def compared(self) -> tuple[Compared, ...]:
        """With what it was compared, the fastest first. Worked out when asked for: most of it is not needed to decide."""
        return compared(self.call, self.ways)


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
        able: dict[frozenset[Alignment], list[Backend]] = {}
        for strategies in groups:
            ways: list[Way] = []
            makes: dict[str, Making] = {}
            for strategy in strategies:
                make = makes[strategy.name] = Making(strategy, self.problem, self.plan)
                # Its one launch is over whole requests, as of an all-gather; the rest of its schedule takes longer to work out.
                launches = makes.get(ALL_GATHER.name, Making(ALL_GATHER, self.problem, self.plan)) if strategy is ULYSSES else make
                needed = alignments(launches())
                try:
                    if needed not in able:
                        able[needed] = able_backends(backend, self.problem, needed)
                except UnsupportedError as error:
                    refusal = error
                else:
                    ways += [Way(strategy, make, one) for one in able[needed]]
            if ways:
                return self._fastest(ways)
        assert refusal is not None  # there is at least one strategy
        raise refusal

    def _fastest(self, ways: list[Way]) -> Decision:
        call = Call(self.plan, self.problem, self.machine, self.transport, self._kernels(ways) if len(ways) > 1 else {})
        known = [way for way in ways if way.backend.name in call.kernels and why_unknown(way.strategy, self.problem) is None]
        if len(known) < 2:
            return Decision((known or ways)[0], call, ())
        left = contenders(call, known)
        way = left[0] if len(left) == 1 else compared(call, left)[0].way
        # A decision is remembered as long as its batch, and what was worked out of launches is not asked for again: of 1,024 prompts
        # over 8 ranks it takes up 1.5 MB.
        return Decision(way, replace(call), known)

    def _kernels(self, ways: list[Way]) -> dict[str, KernelCosts]:
        """The constants of each backend. Where there are none for what can serve the call, those of one stand for the first, by which
        strategies are compared."""
        found: dict[str, KernelCosts] = {}
        if knows_backends(self.machine, self.problem.device):
            names = {way.backend.name for way in ways}
            found = {kernel.backend: kernel for kernel in self.machine.kernels if kernel.backend in names}
        return found or {ways[0].backend.name: self.machine.kernels[0]}
