"""What a window reaches of the prefixes in a sharded cache: the last tokens of each, which lie one after another on each rank.

Which ranks hold them is known: by a rule of positions (``owner``), or token by token (``prefix_ranks``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.device_tables import DeviceTables, IntArray, exclusive_cumsum, expand_all, expand_runs_on_device, expand_runs_on_host
from cpattn.errors import PlanError
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.metadata.striped_places import Places, owned_places


class Reach(NamedTuple):
    """The cached tokens that some new one sees through a window: at most ``window - 1`` of each request.

    Attributes:
        lengths: int64 ``[num_requests]`` of each prefix, at its end.
        first, counts: int64 ``[num_requests, cp_size]`` the number of the first of them on each rank, and how many lie there.
        ranks: of each request what is reached, and its new tokens: the rank that holds each. None where a rule says it.
    """

    lengths: IntArray
    first: IntArray
    counts: IntArray
    ranks: IntArray | None

    @classmethod
    def of(cls, plan: Layout, window: int) -> Reach:
        """Made once a plan and window."""
        found: Reach | None = plan.memo.get(("reach", window))
        if found is None:
            # Of a request with nothing new no query sees any.
            lengths = np.where(plan.extend_lens > 0, np.minimum(plan.prefix_lens, window - 1), 0)
            if plan.owner is not None:
                first = plan.owner.held(plan.prefix_lens - lengths, plan.cp_size)
                found = cls(lengths, first, plan.shard_lens - first, None)
            else:
                ranks, counts = _ranks_of_computed(plan, lengths)
                found = cls(lengths, plan.shard_lens - counts, counts, ranks)
            plan.memo.keep(("reach", window), found)
        return found

    def held_before(self, plan: Layout, rank: int, request: IntArray, position: IntArray) -> IntArray:
        """``[n]`` how many tokens before a position a rank holds of its request. The position is that of a token that is reached, or
        new, or the one after the last."""
        if plan.owner is not None:
            return plan.owner.held(position, plan.cp_size)[:, rank]
        assert self.ranks is not None
        before = np.append(0, (self.ranks == rank).cumsum())
        begins = exclusive_cumsum(self.lengths + plan.extend_lens)
        first = self.first[:, rank] - before[begins]
        entry = (begins - (plan.prefix_lens - self.lengths))[request] + position
        held: IntArray = first[request] + before[entry]
        return held


def _ranks_of_computed(plan: Layout, lengths: IntArray) -> tuple[IntArray, IntArray]:
    """Of the last tokens of each prefix, so many, and the new ones the ranks; and of the former how many ``[num_requests, cp_size]``."""
    require_positions(plan)
    assert plan.prefix_ranks is not None
    reached = [ranks[len(ranks) - length :] for ranks, length in zip(plan.prefix_ranks.ranks, lengths.tolist(), strict=True)]
    counts = np.zeros((len(reached), plan.cp_size), dtype=np.int64)
    for request, ranks in enumerate(reached):
        counts[request] = np.bincount(ranks, minlength=plan.cp_size)
    new = np.split(plan.chunk_table.rank_of_tokens, plan.extend_lens.cumsum()[:-1])
    pieces = [piece for pair in zip(reached, new, strict=False) for piece in pair]
    return np.concatenate([np.empty(0, dtype=np.int64), *pieces]), counts


def require_positions(plan: Layout) -> None:
    """Raises PlanError for a plan that does not say which tokens each rank holds."""
    if not plan.knows_positions:
        raise PlanError(
            "the plan has prefix_shards, which say how many tokens each rank holds, but not which, and a call with a window needs that; "
            "pass prefix_ranks in their place, or let a KVPool make the plan"
        )


def reach_rows(plan: Layout, window: int, max_requests: int | None) -> int:
    """How many cached rows each rank sends: those of the rank that has the most. In a bucket, the most that so many requests may
    have on any. No window is longer than a bucket's longest request: calls leave such a one out."""
    if max_requests is None:
        return int(Reach.of(plan, window).counts.sum(axis=0).max())
    if plan.owner is None:
        # One rank may hold all of them.
        return max_requests * (window - 1)
    turns, rest = divmod(window - 1, plan.owner.interleave * plan.cp_size)
    return max_requests * (turns * plan.owner.interleave + min(rest, plan.owner.interleave))


def reached_places(meta: CPMetadata, window: int) -> Places:
    """Of each cached row that this rank sends, or attends to a copy of: its request and its number there. Then -1, up to the rank that
    has the most. Made once a batch and window."""

    def build() -> Places:
        reach = Reach.of(meta.plan, window)
        return _runs_on_device(meta, reach.first[:, meta.cp_rank], reach.counts[:, meta.cp_rank], _most_rows(meta, window))

    return meta.derive(("reached places", window), build)


def seen_places(meta: CPMetadata, window: int) -> Places:
    """The same of what this rank holds once the new tokens lie there: what is reached of each request, and its new ones. Then -1."""

    def build() -> Places:
        plan = meta.plan
        first = Reach.of(plan, window).first
        counts = plan.held_lens - first
        most = int(counts.sum(axis=0).max())
        if meta.bucket is not None:
            most = _most_rows(meta, window) + plan.cp_size * meta.rows
        return _runs_on_device(meta, first[:, meta.cp_rank], counts[:, meta.cp_rank], most)

    return meta.derive(("seen places", window), build)


def _runs_on_device(meta: CPMetadata, first: IntArray, counts: IntArray, most: int) -> Places:
    """Of each request so many numbers from the first on; padded with -1."""
    runs = {"request": (np.arange(len(counts)), counts), "number": (first, counts)}
    expanded = expand_all(runs, meta.device, repeated=("request",), size=most)
    return expanded["request"], expanded["number"]


class WindowPlaces(NamedTuple):
    """Of messages with each rank's new rows, and then the cached ones that it sends.

    Attributes:
        cached: where this rank's cached rows lie in its pages; -1 where there is none.
        owned: where rows of all messages go in this rank's pages; -1 where it does not hold them, or they are there.
        order: the row among all messages of each key in order: of each request what is reached, and its new tokens; -1 after the last.
    """

    cached: Places
    owned: Places
    order: Tensor


def window_places(meta: CPMetadata, window: int) -> WindowPlaces:
    """Made once a batch and window."""
    return WindowPlaces(reached_places(meta, window), _owned_in_messages(meta, window), _order_in_messages(meta, window))


def _owned_in_messages(meta: CPMetadata, window: int) -> Places:
    def build() -> Places:
        size = meta.plan.cp_size
        missing = torch.full((size, _most_rows(meta, window)), -1, dtype=torch.int32, device=meta.device)
        request, number = (torch.cat([x.view(size, meta.rows), missing], dim=1).flatten() for x in owned_places(meta))
        return request, number

    return meta.derive(("owned in messages", window), build)


def _order_in_messages(meta: CPMetadata, window: int) -> Tensor:
    def build() -> Tensor:
        plan: Layout = meta.plan
        keys = int(Reach.of(plan, window).lengths.sum()) + plan.num_tokens
        if meta.bucket is not None:
            keys = meta.bucket.max_requests * (window - 1) + plan.cp_size * meta.rows
        return _padded(_rows_in_order(meta, window), keys)

    return meta.derive(("order in messages", window), build)


def _rows_in_order(meta: CPMetadata, window: int) -> Tensor:
    """Of each key its row among all messages, of which each has this rank's number of new rows, and then cached ones."""
    plan, reach, size = meta.plan, Reach.of(meta.plan, window), meta.rows + _most_rows(meta, window)
    if reach.ranks is not None:
        return DeviceTables({"rows": _rows_of_computed(plan, reach, meta.rows, size)}, meta.device)["rows"]
    chunks, reached, new = plan.chunk_table, int(reach.lengths.sum()), plan.num_tokens
    begins = exclusive_cumsum(reach.lengths + plan.extend_lens)
    # Of each request and rank what to add to a token's number on that rank for its row in the message.
    shift = meta.rows + np.arange(plan.cp_size) * size + reach.counts.cumsum(axis=0) - reach.counts - reach.first
    tables = {
        "request": np.arange(len(begins)),
        "begins": begins,
        "reached": reach.lengths,
        "first": plan.prefix_lens - reach.lengths,
        "begins_new": begins + reach.lengths,
        "new": plan.extend_lens,
        "rows": chunks.rank * size + plan.chunk_rows,
        "length": chunks.length,
        "shift": shift.flatten(),
    }
    # Token by token only on the device: in decoding a window reaches many more tokens than are new.
    on_device = DeviceTables(tables, meta.device)

    def expanded(first: str, lengths: str, total: int, step: int = 1) -> Tensor:
        return expand_runs_on_device(on_device[first], on_device[lengths], total, step)

    request, position = expanded("request", "reached", reached, step=0), expanded("first", "reached", reached)
    of = request * plan.cp_size + plan.owner.ranks(position, plan.cp_size)
    rows = on_device["shift"].index_select(0, of) + plan.owner.numbers(position, plan.cp_size)
    in_order = torch.empty(reached + new, dtype=torch.int32, device=meta.device)
    in_order[expanded("begins", "reached", reached).long()] = rows
    in_order[expanded("begins_new", "new", new).long()] = expanded("rows", "length", new)
    return in_order


def _rows_of_computed(plan: Layout, reach: Reach, rows: int, size: int) -> IntArray:
    """The same on the host, token by token, as no rule says which rank has one."""
    assert reach.ranks is not None
    chunks, both = plan.chunk_table, np.stack([reach.lengths, plan.extend_lens], axis=1).ravel()
    is_cached = np.tile([True, False], len(reach.lengths)).repeat(both)
    in_order = np.empty(len(reach.ranks), dtype=np.int64)
    for rank in range(plan.cp_size):
        mine = (is_cached & (reach.ranks == rank)).nonzero()[0]
        in_order[mine] = rank * size + rows + np.arange(len(mine))
    first = chunks.rank * size + plan.chunk_rows
    in_order[~is_cached] = expand_runs_on_host(first, chunks.length, plan.num_tokens)
    return in_order


def _most_rows(meta: CPMetadata, window: int) -> int:
    return reach_rows(meta.plan, window, None if meta.bucket is None else meta.bucket.max_requests)


def _padded(table: Tensor, size: int) -> Tensor:
    return torch.cat([table, table.new_full((size - len(table),), -1)])
