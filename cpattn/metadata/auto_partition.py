"""Partition ``auto``: the one of ``whole`` and ``zigzag`` whose slowest rank is estimated to take less for a layer's attention. Where
it is known what the rest of a model pays for a token, ``uncut`` is one more.

All is counted in query-key pairs, in integers, so that every rank finds the same: a pair of all query heads is the unit of time. It
is a coarse form of :func:`cpattn.estimate`, which takes ten times as long: :mod:`cpattn.metadata.layout_costs`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from operator import add
from typing import Any, NamedTuple, TypeVar

import torch

from cpattn.errors import OptionError, PlanError, shown
from cpattn.machine import MACHINES, Machine, find_machine
from cpattn.metadata.batch import MAX_TOKENS, is_integer
from cpattn.metadata.laid_out import LaidOut, Zigzag
from cpattn.metadata.layout import Layout
from cpattn.metadata.layout_costs import Attention, Transfers, least_pairs
from cpattn.metadata.pair_costs import PairCosts
from cpattn.metadata.partition import REMAINDERS
from cpattn.metadata.problem_checks import check_is_problem, check_problem
from cpattn.problem import Problem

AUTO = "auto"
# What it chooses from; of equal ones the first, which cuts less.
CANDIDATES = ("whole", "zigzag")
# Uneven in tokens, so that it needs to be known what a token costs.
UNEVEN = "uncut"
# Taken where nobody says what is asked for: the shapes that figures in the documentation are for.
USUAL = Problem(torch.device("cuda"), torch.bfloat16, rows=0, q_heads=32, kv_heads=8, head_dim=128, v_head_dim=128)
# The same where nobody says on what: with the backend that needs no other package.
USUAL_MACHINE = MACHINES["h100-nvlink"].only("triton")

P = TypeVar("P", bound=Layout)


class AutoChoice(NamedTuple):
    """What ``auto`` goes by, checked."""

    problem: Problem
    machine: Machine
    token_cost: int | None = None

    @classmethod
    def of(cls, problem: Any, machine: Any, token_cost: Any = None) -> AutoChoice:
        """Of what a caller says; None for what is usual. Raises OptionError, HeadCountError or UnknownNameError."""
        if token_cost is not None and (not is_integer(token_cost) or not 0 <= token_cost <= MAX_TOKENS):
            raise OptionError(
                f"token_cost={shown(token_cost)}; pass what the rest of a layer pays for a token, in query-key pairs: an integer from 0 to "
                f"{MAX_TOKENS}"
            )
        if problem is None:
            problem = USUAL
        check_is_problem(problem)
        check_problem(problem)
        machine = USUAL_MACHINE if machine is None else find_machine(machine)
        return cls(problem, machine, None if token_cost is None else int(token_cost))

    def names(self, sharded: bool) -> tuple[str, ...]:
        """Of what it chooses from. With a sharded cache one rank would hold a whole request's tokens, and decode it alone."""
        return CANDIDATES if self.token_cost is None or sharded else (*CANDIDATES, UNEVEN)

    def cheapest(self, names: tuple[str, ...], make: Callable[[str], P]) -> P:
        """Of these partitions the plan whose call takes the least; of equal ones the first. ``make`` makes the plan of a partition."""
        best = make(names[0])
        if len(names) == 1 or best.cp_size == 1:
            return best
        costs = PairCosts.of(self.problem, self.machine, best.cp_size)
        least = self.pairs(LaidOut(best), costs)
        # Of the batch, whatever the partition.
        has_closed_form = not best.sharded and self.problem.window is None and costs.reads_peers
        for name in names[1:]:
            if self._floor(best, name, costs) >= least:
                continue
            try:
                plan = None if name == "zigzag" and has_closed_form else make(name)
            except PlanError:
                # A request that is not cut may be more rows on a rank than ranks can have; the first one is even.
                continue
            pairs = self.pairs(Zigzag(best) if plan is None else LaidOut(plan), costs, least)
            if pairs < least:
                best, least = make(name) if plan is None else plan, pairs
        return best

    def pairs(self, laid_out: LaidOut, costs: PairCosts, most: int | None = None) -> int:
        """What a layer takes on the slowest rank by the fastest kernel, transfers included. Of what takes ``most`` or more it is enough
        to know that: what it sends need not be."""
        tokens = self._tokens(laid_out.most_tokens)
        attention = Attention(laid_out, self.problem, costs)
        least = costs.fastest(attention.least) + tokens
        if most is not None and least >= most:
            return least
        transfers = Transfers(laid_out, self.problem, costs)

        def together(pairs: list[int]) -> int:
            return costs.fastest(list(map(add, pairs, transfers.beside(pairs)))) + tokens

        least = together(attention.least)
        if most is not None and least >= most:
            return least
        until_last = attention.until_last()
        return least if until_last == attention.least else together(until_last)

    def _floor(self, like: Layout, name: str, costs: PairCosts) -> int:
        """What a partition takes at least, of a layout of the same batch; worked out in little time."""
        is_even = name != UNEVEN
        tokens = -(-like.num_tokens // like.cp_size) if is_even else int(like.extend_lens.max(initial=0))
        return costs.fastest(least_pairs(like, self.problem, costs, cuts=is_even)) + self._tokens(tokens)

    def _tokens(self, tokens: int) -> int:
        return (self.token_cost or 0) * tokens


def explain_partition(plan: Layout, problem: Problem, machine: Machine | str | None = None, token_cost: int | None = None) -> str:
    """What a plan's partition is, and what ``auto`` takes for its batch, with the microseconds of a layer that decide. Of a plan that is
    uncut those as well, though ``auto`` takes it with a ``token_cost`` alone."""
    if plan.cp_size == 1:
        return f"{plan.kind}: there is one rank"
    choice = AutoChoice.of(problem, machine, token_cost)
    names = choice.names(plan.sharded)
    is_beside = plan.kind == UNEVEN and UNEVEN not in names
    made: dict[str, Layout] = {}
    for name in (*names, UNEVEN) if is_beside else names:
        with suppress(PlanError):  # as in cheapest
            made[name] = replace(plan, partition=name, remainder=REMAINDERS[0])
    costs = PairCosts.of(problem, choice.machine, plan.cp_size)
    times = ", ".join(f"{choice.pairs(LaidOut(one), costs) * costs.seconds * 1e6:,.0f} us with {name}" for name, one in made.items())
    taken = choice.cheapest(tuple(name for name in names if name in made), made.__getitem__).kind
    rest = "" if token_cost is None else f", with token_cost={token_cost} for the rest of it,"
    without = ", without token_cost" if is_beside and not plan.sharded else ""
    return f"{plan.kind}; 'auto' takes {taken}{without}: a layer's attention{rest} on {choice.machine.name} is estimated at {times}"
