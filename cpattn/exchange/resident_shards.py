"""What :func:`cpattn.attend` makes over a sharded cache that holds everything already: pass-Q in which nothing is written."""

from __future__ import annotations

from typing import Any

from cpattn.exchange.helix import RESIDENT_HELIX
from cpattn.exchange.keys_at_hand import HeldShard
from cpattn.exchange.pass_q import GatheredQueries, forward_gathered
from cpattn.exchange.resident import RESIDENT
from cpattn.exchange.ring import UNKNOWN_POSITIONS
from cpattn.exchange.schedule import Hop, Schedule, sends
from cpattn.exchange.step_spans import held_alignment, held_spans, seen_spans
from cpattn.exchange.strategy import Setup, Strategy
from cpattn.metadata.layout import Layout
from cpattn.metadata.window_reach import require_positions
from cpattn.problem import Problem
from cpattn.spans import Alignment


def _alignment(problem: Problem, plan: Layout, own: bool) -> Alignment:
    return held_alignment(plan, problem.fixed, own) if problem.window is None else "bottom_right"


def _schedule(problem: Problem, plan: Layout) -> Schedule:
    others = plan.cp_size - 1
    queries, results = (sends(problem, plan, others * problem.rows * row) for row in (problem.query_bytes, problem.result_bytes))
    own = Hop(0, 0, _alignment(problem, plan, own=True), 1, queries)
    return (own, Hop("others", 0, _alignment(problem, plan, own=False), others, results)) if others else (own,)


def _prepare(setup: Setup) -> GatheredQueries:
    meta, window = setup.meta, setup.problem.window
    if window is None:
        own, others = held_spans(meta, setup.reads_pages)
        return GatheredQueries.of(setup, HeldShard.of(setup), None, [own], [others])
    meta.on_copy(require_positions)
    own, others = seen_spans(meta, window)
    return GatheredQueries.of(setup, HeldShard.seen_through(setup, window), None, [own], [others])


def _why_not(problem: Problem, plan: Layout) -> str | None:
    return None if problem.window is None or plan.knows_positions else UNKNOWN_POSITIONS


RESIDENT_SHARDS = Strategy("resident shards", _schedule, _prepare, forward_gathered, _why_not, stored=True)


def is_resident(strategy: Any) -> bool:
    """Whether its calls write nothing: all keys lie in pages already."""
    return strategy is RESIDENT or strategy is RESIDENT_SHARDS or strategy is RESIDENT_HELIX


def as_asked_for(strategy: Strategy) -> str:
    """How messages call it: who attends to what lies there has named no strategy."""
    return "attend" if is_resident(strategy) else f"strategy={strategy.name!r}"
