"""What a ring sends: all keys from neighbour to neighbour, or to each rank straight from their owners those that its queries see."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.byte_sizes import in_words
from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import MOST_NEEDED
from cpattn.metadata.needed_shards import lacking_shards, needed_shards
from cpattn.problem import Problem


class RingKeys(NamedTuple):
    """Of one call, the same on every rank.

    Attributes:
        hops: in which keys come, of which rank ``r - hop`` is the owner.
        sent: ``[hop, rank]`` the rows that each rank sends for one.
        straight: whether they come from their owners, no more than are needed; else from the rank before.
        needed: rows that the rank lacks which lacks the most.
        why: what decided, in words.
    """

    hops: tuple[int, ...]
    sent: IntArray
    straight: bool
    needed: int
    why: str


def message_rows(problem: Problem, plan: Layout) -> int:
    """Of what goes from neighbour to neighbour."""
    return plan.largest_shard if plan.sharded else problem.rows


def ring_keys(problem: Problem, plan: Layout) -> RingKeys:
    """What travels in a ring; worked out once."""
    key = "ring keys", problem.rows, problem.window, problem.fixed, problem.cache
    found: RingKeys | None = plan.memo.get(key)
    if found is None:
        found = plan.memo.keep(key, _ring_keys(problem, plan))
    return found


def _ring_keys(problem: Problem, plan: Layout) -> RingKeys:
    size, rows = plan.cp_size, message_rows(problem, plan)
    if size == 1:
        return RingKeys((), np.zeros((0, 1), dtype=np.int64), False, 0, "there is one rank")
    lacking = lacking_shards(plan, problem.window)
    needed = int(lacking.received.max())
    all_around = RingKeys(tuple(range(1, size)), np.full((size - 1, size), rows), False, needed, "")
    if problem.fixed:
        return all_around._replace(why="a bucket's messages are of its size, whatever batch it holds")
    if problem.cache == "paged" and not plan.sharded:
        return all_around._replace(why="pages that every rank holds whole want all of them, beside the attention")
    if plan.owner is not None:
        return all_around._replace(why="new ones go past all ranks, to those that hold them")
    everything = (size - 1) * rows
    share = f"the busiest rank receives or sends {lacking.most / max(1, everything):.0%} of all"
    if lacking.is_nearly_all(everything):
        # Across hosts each key then crosses a link once.
        return all_around._replace(why=f"{share}, which is above {MOST_NEEDED:.0%}")
    if not needed:
        return RingKeys((), np.zeros((0, size), dtype=np.int64), True, 0, "each rank holds all that its queries see")
    between = needed_shards(plan, problem.window)
    if between is None:
        return all_around._replace(why="there are too many ranks and chunks to work out more")
    ranks = np.arange(size)
    sent = np.stack([between[ranks, (ranks + hop) % size] for hop in range(1, size)])
    used = sent.any(axis=1).nonzero()[0]
    return RingKeys(tuple((used + 1).tolist()), sent[used], True, needed, f"{share}, within {MOST_NEEDED:.0%}")


def explain_ring_keys(problem: Problem, plan: Layout) -> str:
    """The same in words, with the bytes of the rank that receives the most."""
    hops, _, straight, needed, why = ring_keys(problem, plan)
    if not hops:
        return f"none travel: {why}"
    rows = (plan.cp_size - 1) * message_rows(problem, plan)
    everything, seen = (in_words(count * problem.key_bytes) for count in (rows, needed))
    if straight:
        many = f"{len(hops)} of {plan.cp_size - 1} hops"
        return f"a rank receives those that its queries see from their owners, at most {seen} of {everything}, in {many}: {why}"
    return f"all go around, so that a rank receives {everything}, of which its queries see at most {seen}: {why}"
