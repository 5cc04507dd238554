"""A strategy's schedule as data: which queries meet which keys in each hop, on every rank at once, and what travels meanwhile.

From it come the number of merges, the alignments that a backend must have, the bytes that are sent, the choice of a
strategy, and the picture of a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from cpattn.device_tables import IntArray, exclusive_cumsum
from cpattn.metadata.layout import Layout
from cpattn.metadata.united import united_layout
from cpattn.problem import Problem
from cpattn.spans import Alignment


class Hop(NamedTuple):
    """One step, on every rank at once.

    Attributes:
        queries: what rank r attends with: the queries of rank ``r - queries`` (0 for its own), those of all other ranks, or of all
            ranks those of its share of the heads.
        keys: what it attends to: the shard of rank ``r - keys`` (0 for its own), ``"all"`` keys of the batch, the prefixes that
            every rank has whole, what is ``"cached"`` of the prefixes on this rank alone, or the ``"new"`` tokens of all ranks.
        alignment: of its spans.
        results: partial results that it gives for each query that it is about.
        united: of so many ranks that follow each other all attend with the queries of all of them, each with its share of the heads;
            ``queries`` and ``keys`` then count such groups.
        sent: int64 ``[cp_size]`` bytes that each rank sends: what has set out before the hop, or during it, since the last one.
    """

    queries: int | Literal["others", "all"]
    keys: int | Literal["all", "prefix", "cached", "new"]
    alignment: Alignment
    results: int
    sent: IntArray
    united: int = 1


Schedule: TypeAlias = Sequence[Hop]


def sends(problem: Problem, plan: Layout, num_bytes: int) -> IntArray:
    """Every rank sends as much: rows that travel are physical ones, of which all ranks have as many. Without any, nothing."""
    return np.full(plan.cp_size, num_bytes if problem.rows else 0, dtype=np.int64)


def num_results(schedule: Schedule) -> int:
    """The partial results that are merged for each of a rank's queries."""
    return sum(hop.results for hop in schedule)


def alignments(schedule: Schedule) -> frozenset[Alignment]:
    """Of the spans of all hops."""
    return frozenset(hop.alignment for hop in schedule)


def bytes_sent(schedule: Schedule) -> IntArray:
    """``[cp_size]`` the bytes that each rank sends in a call."""
    total: IntArray = np.sum([hop.sent for hop in schedule], axis=0, dtype=np.int64)
    return total


def hop_pairs(plan: Layout, hop: Hop) -> IntArray:
    """``[cp_size]`` the query-key pairs that each rank computes in a hop, without a window."""
    ranks = np.arange(plan.cp_size)
    if hop.united > 1:
        # In units of all heads, of which each rank of a group has a share; together they are the group's.
        of_groups = hop_pairs(united_layout(plan, hop.united), hop._replace(united=1))
        shares: IntArray = (of_groups[:, None] + np.arange(hop.united)) // hop.united
        return shares.ravel()
    if hop.queries == "all":
        # In units of all heads, of which each rank has as many.
        return np.full(plan.cp_size, sum(plan.rank_pairs) // plan.cp_size, dtype=np.int64)
    if hop.keys == "all":
        return np.array(plan.rank_pairs, dtype=np.int64)
    if hop.keys == "prefix":
        return prefix_pairs(plan)
    if hop.keys == "new":
        over_new: IntArray = np.array(plan.rank_pairs, dtype=np.int64) - plan.rank_extends.T @ plan.prefix_lens
        return over_new
    if hop.keys == "cached":
        cached: IntArray = plan.rank_extends.T @ plan.shard_lens
        own = cached.diagonal()
        return cached.sum(axis=0) - own if hop.queries == "others" else own
    pairs = shard_pairs(plan)
    owners = (ranks - hop.keys) % plan.cp_size
    if hop.queries == "others":
        of_others: IntArray = pairs[:, owners].sum(axis=0) - pairs[ranks, owners]
        return of_others
    by_rank: IntArray = pairs[(ranks - hop.queries) % plan.cp_size, owners]
    return by_rank


def prefix_pairs(plan: Layout) -> IntArray:
    """``[cp_size]`` of each rank's queries and prefixes that lie on every rank."""
    pairs: IntArray = plan.rank_extends.T @ (np.zeros_like(plan.prefix_lens) if plan.sharded else plan.prefix_lens)
    return pairs


def shard_pairs(plan: Layout) -> IntArray:
    """``[cp_size, cp_size]`` of each rank's queries and each rank's new keys; of a sharded cache, what a rank has of it counts
    among its keys."""
    request, _, length, rank = plan.chunk_table
    pairs: IntArray = plan.rank_extends.T @ plan.shard_lens
    first = np.searchsorted(request, request)  # of each chunk's request
    for owner in range(plan.cp_size):
        owned = np.where(rank == owner, length, 0)
        owned_before = exclusive_cumsum(owned)
        # All of each earlier chunk of the request is seen by all of a later one; its own, by half.
        seen = length * (owned_before - owned_before[first]) + owned * (owned + 1) // 2
        pairs[:, owner] += plan.by_rank.sums(seen)
    return pairs
