"""How much of new keys and values an all-gather brings before the attention: nothing, what is needed, or everything.

It follows from the plan and the problem, so that every rank finds the same.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from cpattn.byte_sizes import in_words
from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import MOST_NEEDED, lacking_rows
from cpattn.problem import Problem


class Traveling(NamedTuple):
    """What travels before the attention.

    Attributes:
        what: ``"needed"`` are the rows that a rank's queries see and that it does not hold.
        sent: int64 ``[cp_size]`` rows that each rank sends.
        needed: rows that the rank lacks which lacks the most.
        why: what decided, in words.
    """

    what: Literal["nothing", "needed", "all"]
    sent: IntArray
    needed: int
    why: str


def traveling_keys(problem: Problem, plan: Layout) -> Traveling:
    """Of one call, the same on every rank."""
    nothing = np.zeros(plan.cp_size, dtype=np.int64)
    if plan.cp_size == 1:
        return Traveling("nothing", nothing, 0, "there is one rank")
    lacking = lacking_rows(plan, problem.window)
    all_rows = (plan.cp_size - 1) * problem.rows
    everything, needed = np.full(plan.cp_size, all_rows), int(lacking.received.max())
    if problem.fixed:
        return Traveling("all", everything, needed, "a bucket's messages are of its size, whatever batch it holds")
    if problem.cache == "paged":
        return Traveling("all", everything, needed, "pages that every rank holds whole want all of them")
    if not needed:
        return Traveling("nothing", nothing, 0, "each rank holds all that its queries see")
    share = f"the busiest rank receives or sends {lacking.most / all_rows:.0%} of all"
    if lacking.is_nearly_all(plan):
        return Traveling("all", everything, needed, f"{share}, which is above {MOST_NEEDED:.0%}")
    return Traveling("needed", lacking.sent, needed, f"{share}, within {MOST_NEEDED:.0%}")


def explain_keys(problem: Problem, plan: Layout) -> str:
    """The same in words, with the bytes of the rank that receives the most."""
    what, _, needed, why = traveling_keys(problem, plan)
    if what == "nothing":
        return f"none travel: {why}"
    all_rows = (plan.cp_size - 1) * problem.rows
    everything, seen = (in_words(rows * problem.key_bytes) for rows in (all_rows, needed))
    if what == "needed":
        return f"a rank receives those that its queries see, at most {seen} of {everything}: {why}"
    return f"a rank receives all of them, {everything}, of which its queries see at most {seen}: {why}"
