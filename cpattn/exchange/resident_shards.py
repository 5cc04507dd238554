"""What :func:`cpattn.attend` makes over a sharded cache that holds everything already: pass-Q in which nothing is written."""

from __future__ import annotations

from typing import Any

from cpattn.exchange.keys_at_hand import HeldShard
from cpattn.exchange.pass_q import GatheredQueries, forward_gathered
from cpattn.exchange.resident import RESIDENT
from cpattn.exchange.schedule import Hop, Schedule, sends
from cpattn.exchange.step_spans import held_alignment, held_spans
from cpattn.exchange.strategy import Setup, Strategy
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem


def _schedule(problem: Problem, plan: Layout) -> Schedule:
    others = plan.cp_size - 1
    queries, results = (sends(problem, plan, others * problem.rows * row) for row in (problem.query_bytes, problem.result_bytes))
    own = Hop(0, 0, held_alignment(plan, problem.fixed, own=True), 1, queries)
    return (own, Hop("others", 0, held_alignment(plan, problem.fixed, own=False), others, results)) if others else (own,)


def _prepare(setup: Setup) -> GatheredQueries:
    own, others = held_spans(setup.meta, setup.reads_pages)
    return GatheredQueries.of(setup, HeldShard.of(setup), None, [own], [others])


def _why_not(problem: Problem, plan: Layout) -> str | None:
    if problem.window is None:
        return None
    fix = "; cp_attention takes one over a striped cache" if plan.owner is not None else ""
    return f"between its neighbours in a shard a token's positions have gaps, so that no window is a range of keys there{fix}"


RESIDENT_SHARDS = Strategy("resident shards", _schedule, _prepare, forward_gathered, _why_not, stored=True)


def is_resident(strategy: Any) -> bool:
    """Whether its calls write nothing: all keys lie in pages already."""
    return strategy is RESIDENT or strategy is RESIDENT_SHARDS
