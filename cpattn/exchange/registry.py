"""The strategies there are, by name."""

from __future__ import annotations

from typing import Any

from cpattn.errors import UnknownNameError
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.helix import HELIX
from cpattn.exchange.hybrid import Hybrid, hybrid
from cpattn.exchange.pass_q import PASS_Q, PASS_Q_RING
from cpattn.exchange.ring import RING
from cpattn.exchange.strategy import Strategy
from cpattn.exchange.two_level import TwoLevel, two_level
from cpattn.exchange.ulysses import ULYSSES
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in (ALL_GATHER, RING, PASS_Q, PASS_Q_RING, ULYSSES)}
"""What ``strategy=`` takes by name: ``all_gather`` and ``ring`` (keys travel), ``pass_q`` and ``pass_q_ring`` (queries do),
``ulysses`` (both do, by heads).
``"auto"`` chooses by sizes alone, and so alike on every rank."""


OF_ALL_QUERIES: dict[str, Strategy] = {HELIX.name: HELIX}
"""Those of plans with ``queries="all"``, whose queries are split by heads."""


def strategies_for(plan: Layout) -> dict[str, Strategy]:
    """Those of the library that are for such plans."""
    return OF_ALL_QUERIES if plan.all_queries else STRATEGIES


def find_strategy(given: Any) -> Strategy:
    """The strategy of that name, or a caller's own as it is; raises UnknownNameError if it is neither."""
    if isinstance(given, Strategy):
        return given
    named = STRATEGIES | OF_ALL_QUERIES
    if isinstance(given, str) and given in named:
        return named[given]
    known = ", ".join(map(repr, ["auto", *named]))
    raise UnknownNameError(
        f"strategy={given!r} is unknown; choose one of {known}, or pass cpattn.hybrid(within=), cpattn.two_level(within=) or a Strategy of "
        "your own"
    )


def is_of_library(strategy: Strategy) -> bool:
    """Whether it is one that has a name here, or that a function here makes."""
    if isinstance(strategy, Hybrid) and strategy.within is not None and strategy.across is not None:
        return strategy is hybrid(strategy.within, strategy.across.name)
    if isinstance(strategy, TwoLevel):
        return strategy is two_level(strategy.within)
    return any(strategy is one for one in (*STRATEGIES.values(), *OF_ALL_QUERIES.values()))


def able_strategies(problem: Problem, plan: Layout) -> list[Strategy]:
    """Those of the library that can serve a problem and plan."""
    return [strategy for strategy in strategies_for(plan).values() if strategy.refusal(problem, plan) is None]
