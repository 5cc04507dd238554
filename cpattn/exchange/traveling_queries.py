"""Which queries travel to the ranks that hold keys: none, those that see any there, or all."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from cpattn.byte_sizes import in_words
from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import MOST_NEEDED, Lacking
from cpattn.metadata.needed_queries import needed_queries
from cpattn.problem import Problem


class TravelingQueries(NamedTuple):
    """Of one call, the same on every rank.

    Attributes:
        between: int64 ``[source, owner]`` rows that travel, and come back as results.
        needed: how many of them see keys, of the rank to which the most come; -1 where that is not known.
        why: what decided, in words.
    """

    what: Literal["nothing", "needed", "all"]
    between: IntArray
    needed: int
    why: str

    @property
    def hops(self) -> list[int]:
        """In which a rank has queries of the one that comes so many before it."""
        ranks = np.arange(len(self.between))
        return [hop for hop in range(1, len(ranks)) if self.between[ranks, (ranks + hop) % len(ranks)].any()]


def traveling_queries(problem: Problem, plan: Layout) -> TravelingQueries:
    """Over whatever holds keys but a striped cache."""
    size, rows = plan.cp_size, problem.rows
    all_rows = np.full((size, size), rows, dtype=np.int64)
    np.fill_diagonal(all_rows, 0)
    if size == 1:
        return TravelingQueries("nothing", all_rows, 0, "there is one rank")
    between = needed_queries(plan, problem.window)
    if between is None:
        return TravelingQueries("all", all_rows, -1, "there are too many ranks and chunks to work out which are needed")
    needed, most = Lacking(between.sum(axis=0), between.sum(axis=1)), (size - 1) * rows
    busiest = int(needed.received.max())
    if problem.fixed:
        return TravelingQueries("all", all_rows, busiest, "a bucket's messages are of its size, whatever batch it holds")
    if not busiest:
        return TravelingQueries("nothing", between, 0, "each rank holds all that its queries see")
    share = f"the busiest rank receives or sends {needed.most / most:.0%} of all"
    if needed.is_nearly_all(most):
        return TravelingQueries("all", all_rows, busiest, f"{share}, which is above {MOST_NEEDED:.0%}")
    return TravelingQueries("needed", between, busiest, f"{share}, within {MOST_NEEDED:.0%}")


def explain_queries(problem: Problem, plan: Layout) -> str:
    """The same in words, with the bytes of the rank to which the most queries come."""
    what, _, needed, why = traveling_queries(problem, plan)
    if what == "nothing":
        return f"none travel: {why}"
    everything, seen = (in_words(rows * problem.query_bytes) for rows in ((plan.cp_size - 1) * problem.rows, needed))
    if what == "needed":
        return f"a rank receives those that see its keys, at most {seen} of {everything}: {why}"
    of_which = f", of which at most {seen} see its keys" if needed >= 0 else ""
    return f"a rank receives all of them, {everything}{of_which}: {why}"
