"""Whether an all-gather's keys come beside the attention where ranks read each other's memory, and if not, why; and whether they go into
pages after it."""

from __future__ import annotations

from cpattn.call.choose import Choice
from cpattn.exchange.late_pages import why_not_late
from cpattn.exchange.order_into_pages import lie_in_order
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.exchange.two_level import TwoLevel, has_levels
from cpattn.metadata.layout import Layout


def explain_arrival(choice: Choice, plan: Layout) -> str:
    """In words, after semicolons; nothing of what comes where none travel before the attention or beside it, or otherwise than through that
    memory."""
    return _explain_arrival(choice, plan) + explain_pages(choice, plan)


def explain_pages(choice: Choice, plan: Layout) -> str:
    """In words, after a semicolon; nothing where new keys are attended to in pages, or come late, or there are no pages."""
    problem, strategy = choice.problem, choice.strategy
    if not choice.writes_pages_after(problem, plan):
        return ""
    # In two levels all rows are put in order, whoever has them.
    in_levels = isinstance(strategy, TwoLevel) and has_levels(strategy.within, problem, plan)
    lie = "as they lie" if lie_in_order(problem, plan) and not in_levels else "in order"
    return f"; attended to {lie}, and written to the pages after that"


def _explain_arrival(choice: Choice, plan: Layout) -> str:
    problem, backend = choice.problem, choice.backend
    travels = traveling_keys(problem, plan)
    if choice.decision.call.transport != "peer_memory" or plan.sharded or travels.what == "nothing":
        return ""
    if problem.expands or not backend.waits_for_keys(problem):
        return f"; before the attention, as {backend.name!r} cannot wait for keys within a launch"
    if problem.overlap > 1:
        return "; before the attention to each group of heads, as overlap= divides them"
    why_not = None
    if problem.cache == "paged":
        reads_pages = backend.takes_several_places(problem)
        why_not = why_not_late(problem, plan, travels) if reads_pages else f"{backend.name!r} does not read prefixes in such pages"
    if why_not is None:
        return "; beside the attention"
    into = "" if choice.writes_pages_after(problem, plan) else "into the pages "
    return f"; {into}before the attention, as {why_not}"
