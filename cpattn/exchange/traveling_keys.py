"""How much of new keys and values an all-gather brings before the attention: nothing, what is needed, or everything. Pages that every
rank holds whole get the rest beside the attention, or after it. (Where keys come late, :mod:`cpattn.exchange.late_pages`, all of it comes
beside the attention.)

It follows from the plan and the problem, so that every rank finds the same.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from cpattn.byte_sizes import in_words
from cpattn.device_tables import IntArray
from cpattn.exchange.strategy import Setup
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import MOST_NEEDED, lacking_rows
from cpattn.problem import Problem
from cpattn.transports.transfer import Transfer

# What decides in a bucket.
_FIXED = (
    "over collectives a bucket's messages are of its size, whatever batch it holds; through the memory of peers a rank reads before the "
    "attention what its queries see"
)


class Traveling(NamedTuple):
    """What travels.

    Attributes:
        what: before the attention. ``"needed"`` are the rows that a rank's queries see and that it does not hold.
        sent: int64 ``[cp_size]`` rows that each rank sends for that.
        needed: rows that the rank lacks which lacks the most.
        why: what decided, in words.
        rest_sent: int64 ``[cp_size]`` rows that each rank sends beside or after the attention: pages that every rank holds whole want all.
        rest: of those, what the rank receives which receives the most.
    """

    what: Literal["nothing", "needed", "all"]
    sent: IntArray
    needed: int
    why: str
    rest_sent: IntArray
    rest: int = 0


def traveling_keys(problem: Problem, plan: Layout) -> Traveling:
    """Of one call, the same on every rank; worked out once."""
    key = "traveling keys", problem.rows, problem.window, problem.fixed, problem.cache
    found: Traveling | None = plan.memo.get(key)
    if found is None:
        found = plan.memo.keep(key, _traveling_keys(problem, plan))
    return found


def _traveling_keys(problem: Problem, plan: Layout) -> Traveling:
    nothing = np.zeros(plan.cp_size, dtype=np.int64)
    if plan.cp_size == 1:
        return Traveling("nothing", nothing, 0, "there is one rank", nothing)
    lacking = lacking_rows(plan, problem.window)
    all_rows = (plan.cp_size - 1) * problem.rows
    everything, needed = np.full(plan.cp_size, all_rows), int(lacking.received.max())
    if problem.fixed:
        return Traveling("all", everything, needed, _FIXED, nothing)
    wants_all = problem.cache == "paged"
    if not needed:
        why = "each rank holds all that its queries see"
        return Traveling("nothing", nothing, 0, why, *((everything, all_rows) if wants_all else (nothing, 0)))
    share = f"the busiest rank receives or sends {lacking.most / all_rows:.0%} of all"
    if lacking.is_nearly_all(all_rows):
        return Traveling("all", everything, needed, f"{share}, which is above {MOST_NEEDED:.0%}", nothing)
    why = f"{share}, within {MOST_NEEDED:.0%}"
    if not wants_all:
        return Traveling("needed", lacking.sent, needed, why, nothing)
    tokens = np.array(plan.rank_tokens, dtype=np.int64)
    rest_sent = (plan.cp_size - 1) * tokens - lacking.sent
    return Traveling("needed", lacking.sent, needed, why, rest_sent, int((plan.num_tokens - tokens - lacking.received).max()))


def counted(transfer: Transfer, travels: Traveling, setup: Setup) -> Transfer:
    """A transfer of an all-gather, of which a message that lies where others read it counts what they read."""
    problem = setup.problem
    rows = (travels.sent + travels.rest_sent)[setup.meta.cp_rank]
    nbytes = int(rows) * problem.key_bytes // problem.overlap
    return transfer if transfer.posted is None else transfer._replace(nbytes=nbytes)


def explain_keys(problem: Problem, plan: Layout) -> str:
    """The same in words, with the bytes of the rank that receives the most."""
    what, _, needed, why, _, rest = traveling_keys(problem, plan)
    all_rows = (plan.cp_size - 1) * problem.rows
    everything, seen, later = (in_words(rows * problem.key_bytes) for rows in (all_rows, needed, rest))
    if problem.kv_dtype is not None:
        stored = str(problem.kv_dtype).removeprefix("torch.")
        everything, later = f"{everything} in {stored}", f"{later} in {stored}"
    if what == "nothing":
        if not rest:
            return f"none travel: {why}"
        return f"none travel before the attention, and all of them, {later}, beside it or after it, as every rank's pages hold all: {why}"
    if what == "needed":
        of_rest = "" if not rest else f" before the attention, and at most {later} beside it or after it, as its pages hold all"
        return f"a rank receives those that its queries see, at most {seen} of {everything}{of_rest}: {why}"
    return f"a rank receives all of them, {everything}, of which its queries see at most {seen}: {why}"
