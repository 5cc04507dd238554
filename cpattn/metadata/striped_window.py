"""What a window reaches of the prefixes in a striped cache: the last tokens of each, which lie one after another on each rank."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.device_tables import DeviceTables, IntArray, exclusive_cumsum, expand_runs_on_host
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.metadata.striped_places import Places, owned_places


class Reach(NamedTuple):
    """The cached tokens that some new one sees through a window: at most ``window - 1`` of each request.

    Attributes:
        lengths: int64 ``[num_requests]`` of each prefix, at its end.
        first, counts: int64 ``[num_requests, cp_size]`` the number of the first of them on each rank, and how many lie there.
    """

    lengths: IntArray
    first: IntArray
    counts: IntArray

    @classmethod
    def of(cls, plan: Layout, window: int) -> Reach:
        assert plan.owner is not None
        # Of a request with nothing new no query sees any.
        lengths = np.where(plan.extend_lens > 0, np.minimum(plan.prefix_lens, window - 1), 0)
        first = plan.owner.held(plan.prefix_lens - lengths, plan.cp_size)
        return cls(lengths, first, plan.shard_lens - first)


def reach_rows(plan: Layout, window: int, max_requests: int | None) -> int:
    """How many cached rows each rank sends: those of the rank that has the most. In a bucket, the most that so many requests may
    have on any."""
    assert plan.owner is not None
    if max_requests is None:
        return int(Reach.of(plan, window).counts.sum(axis=0).max())
    turns, rest = divmod(window - 1, plan.owner.interleave * plan.cp_size)
    return max_requests * (turns * plan.owner.interleave + min(rest, plan.owner.interleave))


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

    def build() -> WindowPlaces:
        plan: Layout = meta.plan
        reach, most = Reach.of(plan, window), reach_rows(plan, window, None if meta.bucket is None else meta.bucket.max_requests)
        rank = meta.cp_rank
        counts = reach.counts[:, rank]
        keys = int(reach.lengths.sum()) + plan.num_tokens
        if meta.bucket is not None:
            keys = meta.bucket.max_requests * (window - 1) + plan.cp_size * meta.rows
        tables = {
            "request": _padded(_runs(np.arange(len(counts)), counts, step=0), most),
            "number": _padded(_runs(reach.first[:, rank], counts), most),
            "order": _padded(_rows_in_order(plan, reach, meta.rows, most), keys),
        }
        on_device = DeviceTables(tables, meta.device)
        missing = torch.full((plan.cp_size, most), -1, dtype=torch.int32, device=meta.device)
        request, number = (torch.cat([x.view(plan.cp_size, meta.rows), missing], dim=1).flatten() for x in owned_places(meta))
        return WindowPlaces((on_device["request"], on_device["number"]), (request, number), on_device["order"])

    return meta.derive(("window places", window), build)


def _rows_in_order(plan: Layout, reach: Reach, rows: int, most: int) -> IntArray:
    """Of each key its row among all messages, of which each has ``rows`` new and ``most`` cached rows."""
    assert plan.owner is not None
    chunks, size = plan.chunk_table, rows + most
    begins = exclusive_cumsum(reach.lengths + plan.extend_lens)
    in_order = np.empty(int(reach.lengths.sum()) + plan.num_tokens, dtype=np.int64)
    in_order[_runs(begins + reach.lengths, plan.extend_lens)] = _runs(chunks.rank * size + plan.chunk_rows, chunks.length)
    request = _runs(np.arange(len(begins)), reach.lengths, step=0)
    position = _runs(plan.prefix_lens - reach.lengths, reach.lengths)
    owner = plan.owner.ranks(position, plan.cp_size)
    before = (reach.counts.cumsum(axis=0) - reach.counts)[request, owner]
    place = plan.owner.numbers(position, plan.cp_size) - reach.first[request, owner]
    in_order[_runs(begins, reach.lengths)] = owner * size + rows + before + place
    return in_order


def _runs(first: IntArray, lengths: IntArray, step: int = 1) -> IntArray:
    return expand_runs_on_host(first, lengths, int(lengths.sum()), step).numpy().astype(np.int64)


def _padded(table: IntArray, size: int) -> IntArray:
    return np.pad(table, (0, size - len(table)), constant_values=-1)
