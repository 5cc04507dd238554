"""Over sharded caches: which rank takes which share of the work, so that requests go to ranks that hold little of them.

A rank keeps what it computes. If one rank made all the tokens of a request, its cache alone would grow.
"""

from __future__ import annotations

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.chunks import Chunks, pairs_by_rank, steps_off
from cpattn.metadata.whole.division import Division
from cpattn.metadata.whole.even_out import Filler, even_out
from cpattn.metadata.whole.work import BITS, Work


def to_least_held(batch: IntArray, chunks: Chunks, shard_lens: IntArray) -> Chunks:
    """The chunks of a batch ``[n, 2]`` on ranks that hold little of their requests (``shard_lens [n, cp_size]``).

    First whole ranks trade places. Then requests of one token do, of which each rank has as many as before. Pairs stay as
    even as they are, by steps of 2%.
    """
    held = shard_lens[chunks.request]
    costs = np.zeros((shard_lens.shape[1],) * 2, dtype=np.int64)
    np.add.at(costs, chunks.rank, chunks.length[:, None] * held)
    chunks = chunks._replace(rank=_matched(costs)[chunks.rank])
    lengths = batch[chunks.request, 1]
    # Those with the most pairs first.
    decodes = (-batch[chunks.request, 0]).argsort(kind="stable")
    decodes = decodes[lengths[decodes] == 1]
    rank = chunks.rank.copy()
    rank[decodes] = _dealt(held[decodes], np.bincount(chunks.rank[decodes], minlength=len(costs)))
    return _evened(batch, chunks._replace(rank=rank), chunks, len(costs))


def _dealt(held: IntArray, counts: IntArray) -> IntArray:
    """The rank of each decode, by what ranks hold ``[d, cp_size]``, and by how many each takes.

    They take in rounds, one at most in each. Neighbours have about as many pairs, and so have ranks after a round.
    """
    ranks, first = np.empty(len(held), dtype=np.int64), 0
    while first < len(held):
        takers = counts.nonzero()[0]
        counts[takers] -= 1
        end = first + len(takers)
        ranks[first:end] = takers[_matched(held[first:end, takers])]
        first = end
    return ranks


def _matched(costs: IntArray) -> IntArray:
    """``[k]`` the column of each row of ``costs [k, k]``, each another: by turns the cheapest left, and then rows trade."""
    column, free = np.empty(len(costs), dtype=np.int64), list(range(len(costs)))
    for row, of_row in enumerate(costs.tolist()):
        column[row] = cheapest = min(free, key=of_row.__getitem__)
        free.remove(cheapest)
    rows = np.arange(len(costs))
    for row in (costs[rows, column] > costs.min(axis=1)).nonzero()[0].tolist():
        own = costs[rows, column]
        saved = own[row] + own - costs[row, column] - costs[rows, column[row]]
        other = int(saved.argmax())
        if saved[other] > 0:
            column[[row, other]] = column[[other, row]]
    return column


def _evened(batch: IntArray, dealt: Chunks, before: Chunks, cp_size: int) -> Chunks:
    """What was dealt, if need be with decodes traded once more, or what was before where that is more even in pairs."""
    allowed = steps_off(pairs_by_rank(before, batch, cp_size))
    pairs = pairs_by_rank(dealt, batch, cp_size)
    if steps_off(pairs) <= allowed:
        return dealt
    # No rank has room for more, so that only decodes for decodes change ranks.
    division, is_decode = Division(Work(batch, [0] * cp_size)), batch[dealt.request, 1] == 1
    division.rank_of[dealt.request[is_decode]] = dealt.rank[is_decode]
    division.pair_load = [(of_rank << BITS) // sum(pairs) for of_rank in pairs]
    even_out(division, Filler(1, 0), [0] * cp_size)
    dealt = dealt._replace(rank=np.where(is_decode, division.rank_of[dealt.request], dealt.rank))
    return dealt if steps_off(pairs_by_rank(dealt, batch, cp_size)) <= allowed else before
