"""The spans of a strategy's steps: which of a rank's queries see which keys of those at hand.

Keys lie in one of three orders: all of a batch (each request's prefix and extend in one piece), the prefixes alone, or
one rank's shard. A shard is, for each request, what this rank holds of the prefix, then its chunks in sequence order.
What a chunk of queries sees of a shard is a beginning of its request's piece, one key range, whether it is none, one
chunk or all. A sliding window breaks this, since a shard has gaps in position: with a window a shard is as many
launches as a rank may own chunks of a request.
In pages each request has a line of its own, so that all key ranges begin at 0.

The last span of every table is the padding of q: queries without keys, for which every backend gives 0 and LSE -inf.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.device_tables import exclusive_cumsum
from cpattn.metadata.batch import IntArray
from cpattn.metadata.chunk_tables import ChunkTables, chunk_tables
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.spans import Alignment, Spans, SpanTable


class KeyRanges(NamedTuple):
    """The key range of each chunk of a rank's queries, int64 ``[c]`` each; see :class:`cpattn.spans.Spans`."""

    k_start: IntArray
    k_len: IntArray
    diagonal: IntArray
    alignment: Alignment


def causal_spans(meta: CPMetadata, paged: bool, k_starts: IntArray | None = None) -> Spans:
    """This rank's queries over all keys of the batch: the last query of a chunk sees the range's last key.

    Args:
        k_starts: of each request, where keys are in another order than one after another, which no bucket's are.
    """

    def build() -> Spans:
        chunks = meta.chunk_host
        k_start = (meta.k_starts if k_starts is None else k_starts)[chunks.request]
        ranges = KeyRanges(k_start, chunks.k_len, chunks.k_len - chunks.q_len + 1, "bottom_right")
        return _build(meta, [_own_table(meta, ranges)], paged)[0]

    return meta.derive(("causal spans", paged, k_starts is None), build)


def all_causal_spans(meta: CPMetadata) -> Spans:
    """The queries of all ranks, rank after rank, over all keys of the batch."""

    def build() -> Spans:
        parts = []
        for source in range(meta.plan.cp_size):
            chunks = chunk_tables(meta.plan, source)
            ranges = KeyRanges(meta.k_starts[chunks.request], chunks.k_len, chunks.k_len - chunks.q_len + 1, "bottom_right")
            parts.append(_with_padding(meta, chunks, ranges))
        return _build(meta, [_one_after_another(parts)], paged=False)[0]

    return meta.derive("all causal spans", build)


def prefix_spans(meta: CPMetadata, window: int | None, paged: bool) -> Spans:
    """This rank's queries over the prefixes."""

    def build() -> Spans:
        chunks, prefix_lens = meta.chunk_host, meta.plan.prefix_lens
        k_start = exclusive_cumsum(prefix_lens)[chunks.request]
        k_len = prefix_lens[chunks.request]
        ranges = KeyRanges(k_start, k_len, k_len, "full")
        if window is not None:
            ranges = _within_window(k_start, k_len, k_len + chunks.start + 1, window)
        return _build(meta, [_own_table(meta, ranges)], paged)[0]

    return meta.derive(("prefix spans", window, paged), build)


def shard_spans(meta: CPMetadata, window: int | None) -> list[list[Spans]]:
    """This rank's queries over the shard of each rank, ``[owner][launch]``."""

    def build() -> list[list[Spans]]:
        tables = [
            _own_table(meta, ranges)
            for owner in range(meta.plan.cp_size)
            for ranges in _shard_ranges(meta.plan, meta.cp_rank, owner, window)
        ]
        return _by_launch(_build(meta, tables, paged=False), launches_per_shard(meta.plan, window))

    return meta.derive(("shard spans", window), build)


def source_spans(meta: CPMetadata, window: int | None, paged: bool) -> list[list[Spans]]:
    """The queries of each rank over this rank's shard, ``[source][launch]``."""

    def build() -> list[list[Spans]]:
        tables = [
            _table(meta, source, ranges)
            for source in range(meta.plan.cp_size)
            for ranges in _shard_ranges(meta.plan, source, meta.cp_rank, window)
        ]
        return _by_launch(_build(meta, tables, paged), launches_per_shard(meta.plan, window))

    return meta.derive(("source spans", window, paged), build)


def gathered_source_spans(meta: CPMetadata, window: int | None, paged: bool) -> list[Spans]:
    """The queries of all other ranks over this rank's shard, ``[launch]``: q is rank-major, and of this rank's own
    queries none sees anything here."""

    def build() -> list[Spans]:
        tables = []
        for launch in range(launches_per_shard(meta.plan, window)):
            parts = []
            for source in range(meta.plan.cp_size):
                ranges = _shard_ranges(meta.plan, source, meta.cp_rank, window)[launch]
                if source == meta.cp_rank:
                    ranges = ranges._replace(k_len=np.zeros_like(ranges.k_len), alignment="full" if window is None else "any")
                parts.append(_table(meta, source, ranges))
            tables.append(_one_after_another(parts))
        return _build(meta, tables, paged)

    return meta.derive(("gathered source spans", window, paged), build)


def launches_per_shard(plan: Layout, window: int | None) -> int:
    """How many launches one shard takes."""
    return 1 if window is None else plan.most_chunks


def _shard_ranges(plan: Layout, source: int, owner: int, window: int | None) -> list[KeyRanges]:
    """The queries of ``source`` over the shard of ``owner``, for each launch."""
    chunks, keys = chunk_tables(plan, source), chunk_tables(plan, owner)
    cached, extends = plan.shard_lens[:, owner], plan.rank_extends[:, owner]
    begins = exclusive_cumsum(cached + extends)[chunks.request]
    first_new = exclusive_cumsum(extends)
    key_rows = plan.chunk_rows.take(keys.entry)
    if window is None:
        # The new tokens of all the owner's chunks before this one, less those of earlier requests.
        new_before = np.append(key_rows, extends.sum()).take(keys.entry.searchsorted(chunks.entry))
        before = new_before + (cached - first_new)[chunks.request]
        if owner == source:
            return [KeyRanges(begins, before + chunks.q_len, before + 1, "bottom_right")]
        return [KeyRanges(begins, before, before, "full")]
    # Cached tokens of a shard may be from anywhere in the sequence; a strategy refuses them with a window.
    # Where the owner has fewer chunks of a request than another rank has, an entry behind the last stands for one without a token.
    count = len(keys.entry)
    entry, start, q_len, offset = columns = np.zeros((4, count + 1), dtype=np.int64)
    columns[:, :count] = keys.entry, keys.start, keys.q_len, key_rows - first_new[keys.request]
    bounds = keys.request.searchsorted(np.arange(len(plan.batch) + 1))
    launches = []
    for nth in range(plan.most_chunks):
        nth_of_request = bounds[:-1] + nth
        key = np.where(nth_of_request < bounds[1:], nth_of_request, count)[chunks.request]
        k_len = np.where(entry[key] <= chunks.entry, q_len[key], 0)
        launches.append(_within_window(begins + offset[key], k_len, chunks.start - start[key] + 1, window))
    return launches


def _within_window(k_start: IntArray, k_len: IntArray, diagonal: IntArray, window: int) -> KeyRanges:
    """Empties the ranges that lie before the first query's window, and so before every query's."""
    return KeyRanges(k_start, np.where(diagonal - window >= k_len, 0, k_len), diagonal, "any")


def _one_after_another(parts: list[SpanTable]) -> SpanTable:
    """Of queries that lie one after another; what holds for all of them is the widest alignment."""
    q_len, k_start, k_len, diagonal, request = (np.concatenate(columns) for columns in zip(*(part[:5] for part in parts), strict=True))
    kinds = {part.alignment for part in parts}
    return SpanTable(q_len, k_start, k_len, diagonal, request, kinds.pop() if len(kinds) == 1 else "any")


def _own_table(meta: CPMetadata, ranges: KeyRanges) -> SpanTable:
    return _with_padding(meta, meta.chunk_host, ranges)


def _table(meta: CPMetadata, source: int, ranges: KeyRanges) -> SpanTable:
    return _with_padding(meta, chunk_tables(meta.plan, source), ranges)


def _with_padding(meta: CPMetadata, chunks: ChunkTables, ranges: KeyRanges) -> SpanTable:
    """With the padding of q as the last span; in a bucket, after as many empty spans as there may be chunks."""
    missing = 0 if meta.bucket is None else meta.bucket.max_chunks - len(chunks.q_len)
    padding = meta.rows - int(chunks.q_len.sum())
    more = missing + (1 if padding or meta.bucket is not None else 0)
    q_len, k_start, k_len, diagonal, request = (
        np.pad(column, (0, more)) for column in (chunks.q_len, ranges.k_start, ranges.k_len, ranges.diagonal, chunks.request)
    )
    if padding:
        q_len[-1] = padding
    return SpanTable(q_len, k_start, k_len, diagonal, request, ranges.alignment)


def _build(meta: CPMetadata, tables: list[SpanTable], paged: bool) -> list[Spans]:
    if paged:
        tables = [table._replace(k_start=np.zeros_like(table.k_start)) for table in tables]
    fixed_lengths = None
    if meta.bucket is not None:
        # Without pages a bucket has no prefixes, and all ranks' rows are the most that there can be.
        longest = meta.bucket.max_seqlen if paged else min(meta.bucket.max_seqlen, meta.plan.cp_size * meta.rows)
        fixed_lengths = meta.bucket.max_rows, longest
    return Spans.build_all(tables, meta.device, fixed_lengths)


def _by_launch(spans: list[Spans], launches: int) -> list[list[Spans]]:
    return [spans[first : first + launches] for first in range(0, len(spans), launches)]
