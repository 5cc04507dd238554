"""How many keys an all-gather over a sharded cache brings, of a window's reach or of new tokens alone: nothing, what is wanted, or all.

It follows from the plan and the problem, so that every rank finds the same.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from cpattn.byte_sizes import in_words
from cpattn.device_tables import IntArray
from cpattn.exchange.schedule import sends
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import MOST_NEEDED, Lacking
from cpattn.metadata.wanted_keys import WantedKeys, seen_by_chunks
from cpattn.metadata.window_reach import reach_rows
from cpattn.problem import Problem


class TravelingOverShards(NamedTuple):
    """
    Attributes:
        sent: int64 ``[cp_size]`` rows that each rank sends.
        received: of the rank that receives the most; put: of the one that puts the most in order.
        why: what decided, in words.
    """

    what: Literal["nothing", "wanted", "all"]
    sent: IntArray
    received: int
    put: int
    why: str


def rows_brought(problem: Problem, plan: Layout) -> int:
    """By each rank, where all of them go to all: its new ones, and cached ones that a window reaches, as many as the rank with the most."""
    return problem.rows + (0 if problem.window is None else reach_rows(plan, problem.window, problem.max_requests))


def traveling_over_shards(problem: Problem, plan: Layout) -> TravelingOverShards:
    """Of one call; worked out once."""
    key = "traveling over shards", problem.rows, problem.window, problem.fixed, problem.max_requests
    found: TravelingOverShards | None = plan.memo.get(key)
    return found or plan.memo.keep(key, _traveling(problem, plan))


def _traveling(problem: Problem, plan: Layout) -> TravelingOverShards:
    all_rows = (plan.cp_size - 1) * rows_brought(problem, plan)
    everything = TravelingOverShards("all", np.full(plan.cp_size, all_rows), all_rows, all_rows, "there is one rank")
    if plan.cp_size == 1:
        return everything
    if problem.fixed:
        return everything._replace(why="a bucket's messages are of its size, whatever batch it holds")
    if WantedKeys.are_too_many(plan, problem.window):
        return everything._replace(why="there are too many ranks and tokens to work out which are needed")
    # What ranks are to hold only adds to that.
    seen = seen_by_chunks(plan, problem.window)
    if seen.is_nearly_all(all_rows):
        return everything._replace(why=_busiest("at least " if seen.most < all_rows else "", seen, all_rows))
    wanted = WantedKeys.of(plan, problem.window)
    lacking, put = wanted.lacking(), max(int(np.count_nonzero(used)) for used in wanted.used)
    if not lacking.most:
        also = "" if plan.owner is None else ", and all that it is to hold"
        return TravelingOverShards("nothing", lacking.sent, 0, put, f"each rank holds all that its queries see{also}")
    if lacking.is_nearly_all(all_rows):
        return everything._replace(why=_busiest("", lacking, all_rows))
    return TravelingOverShards("wanted", lacking.sent, int(lacking.received.max()), put, _busiest("", lacking, all_rows))


def _busiest(at_least: str, lacking: Lacking, all_rows: int) -> str:
    limit = "which is above" if lacking.is_nearly_all(all_rows) else "within"
    return f"the busiest rank receives or sends {at_least}{lacking.most / all_rows:.0%} of all, {limit} {MOST_NEEDED:.0%}"


def sent_over_shards(problem: Problem, plan: Layout) -> IntArray:
    """int64 ``[cp_size]`` bytes of each rank."""
    what, sent, *_ = traveling_over_shards(problem, plan)
    row = problem.key_bytes
    return sends(problem, plan, (plan.cp_size - 1) * rows_brought(problem, plan) * row) if what == "all" else sent * row


def explain_over_shards(problem: Problem, plan: Layout) -> str:
    """The same in words, with the bytes of the rank that receives the most."""
    what, _, received, _, why = traveling_over_shards(problem, plan)
    if what == "nothing":
        return f"none travel: {why}"
    all_rows = (plan.cp_size - 1) * rows_brought(problem, plan)
    if what == "wanted":
        also = "" if plan.owner is None else " or that it is to hold"
        most, everything = (in_words(rows * problem.key_bytes) for rows in (received, all_rows))
        return f"a rank receives those that its queries see{also}, at most {most} of {everything}: {why}"
    others = (plan.cp_size - 1) * problem.rows
    new, cached = (in_words(rows * problem.key_bytes) for rows in (others, all_rows - others))
    reached = "" if problem.window is None else f", and of the cached ones what the window reaches, {cached}"
    return f"a rank receives all new ones, {new}{reached}: {why}"
