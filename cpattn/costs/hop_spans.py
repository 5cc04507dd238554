"""The spans of a schedule's hop, of all ranks at once: who attends to how many keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.exchange.schedule import Hop
from cpattn.metadata.layout import Layout
from cpattn.metadata.united import united_layout

# Of the hops of a long ring so many are looked at, evenly spread: they are much alike.
MOST_OFFSETS = 8


class RankSpans(NamedTuple):
    """Flat int64 arrays ``[n]``, a span each, of all ranks.

    Attributes:
        rank: that attends.
        q_len, k_len, diagonal: see :class:`cpattn.spans.Spans`.
    """

    rank: IntArray
    q_len: IntArray
    k_len: IntArray
    diagonal: IntArray


def spans_of(plan: Layout, hop: Hop) -> Iterator[tuple[RankSpans, int]]:
    """The spans of a hop, in parts, and for how many such parts each stands."""
    request, start, length, rank = plan.chunk_table
    if hop.united > 1:
        # Each rank of a group attends to what the group does, with a share of the heads.
        for group, count in spans_of(united_layout(plan, hop.united), hop._replace(united=1)):
            columns = (column.repeat(hop.united) for column in group)
            spans = RankSpans(*columns)
            yield spans._replace(rank=spans.rank * hop.united + np.tile(np.arange(hop.united), len(group.rank))), count
    elif hop.keys == "prefix":
        prefix = np.zeros_like(length) if plan.sharded else plan.prefix_lens[request]
        yield RankSpans(rank, length, prefix, prefix), 1
    elif hop.keys == "all":
        k_len = plan.prefix_lens[request] + start + length
        yield RankSpans(rank, length, k_len, k_len - length + 1), 1
    elif hop.keys == "new":
        yield RankSpans(rank, length, start + length, start + 1), 1
    elif hop.keys == "cached":
        for offset, count in [(0, 1)] if hop.queries == 0 else sample(1, plan.cp_size):
            attends = (rank + offset) % plan.cp_size
            cached = plan.shard_lens[request, attends]
            yield RankSpans(attends, length, cached, cached), count
    elif hop.queries == "all":
        for offset, count in sample(0, plan.cp_size):
            yield _over_shards(plan, hop.keys + offset, hop.keys), count
    elif isinstance(hop.queries, int):
        yield _over_shards(plan, hop.queries, hop.keys), 1
    else:
        for offset, count in sample(1, plan.cp_size):
            yield _over_shards(plan, hop.keys + offset, hop.keys), count


def sample(start: int, stop: int) -> list[tuple[int, int]]:
    """Numbers from ``start`` to ``stop - 1``, all or some that are evenly spread, and for how many of them each stands.

    >>> sample(1, 4)
    [(1, 1), (2, 1), (3, 1)]
    >>> sample(0, 64)[:3]
    [(4, 8), (12, 8), (20, 8)]
    """
    count = stop - start
    parts = min(count, MOST_OFFSETS)
    bounds = [start + count * part // parts for part in range(parts + 1)] if parts else []
    return [((low + high) // 2, high - low) for low, high in pairwise(bounds)]


def over_shards(plan: Layout, hops: Sequence[Hop]) -> RankSpans:
    """Of hops in which each rank's queries are one rank's, and the keys one shard, hop after hop: ranks are counted on, so that hop h has
    ``h * cp_size`` to ``(h + 1) * cp_size - 1``."""
    numbers = np.array([(hop.queries, hop.keys) for hop in hops], dtype=np.int64)
    spans = _over_shards(plan, numbers[:, :1], numbers[:, 1:])
    ranks = spans.rank + plan.cp_size * np.arange(len(hops))[:, None]
    return RankSpans._make(column.ravel() for column in spans._replace(rank=ranks))


def _over_shards(plan: Layout, queries: int | IntArray, keys: int | IntArray) -> RankSpans:
    """On rank r the queries of rank ``r - queries`` over the shard of rank ``r - keys``."""
    request, _, length, source = plan.chunk_table
    size, count = plan.cp_size, len(request)
    rank = (source + queries) % size
    owner = (rank - keys) % size
    # The owner's tokens in chunks before this one, of the same request: chunks are by request, then by position.
    share, ends = _shares(plan)
    first = (request * size + owner) * count
    before = ends[share.searchsorted(first + np.arange(count))] - ends[share.searchsorted(first)]
    if plan.sharded:
        before = before + plan.shard_lens[request, owner]
    own = owner == source
    lengths = np.broadcast_to(length, own.shape)
    return RankSpans(rank, lengths, np.where(own, before + length, before), np.where(own, before + 1, before))


def _shares(plan: Layout) -> tuple[IntArray, IntArray]:
    """Of each chunk a number that is by request, then by rank, then by position, ascending; and the tokens up to each of them. Worked out
    once."""
    found: tuple[IntArray, IntArray] | None = plan.memo.get("shares")
    if found is None:
        request, _, length, source = plan.chunk_table
        share = (request * plan.cp_size + source) * len(request) + np.arange(len(request))
        order = share.argsort()
        found = plan.memo.keep("shares", (share[order], np.append(0, length[order].cumsum())))
    return found
