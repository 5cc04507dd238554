"""The spans of a strategy's steps: which of a rank's queries see which keys of those at hand.

Keys lie in one of these orders: all of a batch (each request's prefix and extend in one piece), the prefixes alone, the new
tokens alone, or one rank's shard. A shard is, for each request, what this rank holds of the prefix, then its chunks in sequence order.
What a chunk of queries sees of a shard is a beginning of its request's piece, one key range, whether it is none, one
chunk or all. A sliding window breaks this, since a shard has gaps in position: with a window a shard is as many
launches as a rank may own chunks of a request.
In pages each request has a line of its own, so that all key ranges begin at 0.

The last span of every table is the padding of q: queries without keys, for which every backend gives 0 and LSE -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cpattn.device_tables import Unsent, exclusive_cumsum
from cpattn.exchange.key_order import Ordered, RequestRows
from cpattn.metadata.batch import IntArray
from cpattn.metadata.chunk_tables import ChunkTables, chunk_tables
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.draft import Draft
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import unseen_tokens
from cpattn.metadata.needed_queries import queries_that_see
from cpattn.metadata.wanted_keys import seen_ends
from cpattn.metadata.window_reach import Reach
from cpattn.spans import Alignment, Spans, SpanTable


class KeyRanges(NamedTuple):
    """The key range of each chunk of a rank's queries, int64 ``[c]`` each; see :class:`cpattn.spans.Spans`."""

    k_start: IntArray
    k_len: IntArray
    diagonal: IntArray
    alignment: Alignment


def causal_spans(meta: CPMetadata, paged: bool) -> Spans:
    """This rank's queries over all keys of the batch: the last query of a chunk sees the range's last key."""
    return meta.derive_sent(causal_draft(meta, paged))


def causal_draft(meta: CPMetadata, paged: bool) -> Draft[Spans]:
    """Of :func:`causal_spans`, to be sent with other tables."""
    return Draft(("causal spans", paged), lambda: _causal(meta, meta.k_starts, paged))


def spans_in_order(meta: CPMetadata, ordered: Ordered) -> Spans:
    """The same over keys in the order of :class:`cpattn.exchange.key_order.KeyOrder`, where each request's begin elsewhere."""
    return meta.derive_sent(in_order_draft(meta, ordered))


def in_order_draft(meta: CPMetadata, ordered: Ordered) -> Draft[Spans]:
    """Of :func:`spans_in_order`, to be sent with other tables."""
    if meta.bucket is not None:
        return causal_draft(meta, paged=False)
    return Draft(("spans in order", ordered), lambda: _causal(meta, RequestRows.of(meta, ordered).k_starts, paged=False))


def _causal(meta: CPMetadata, starts: IntArray, paged: bool) -> Unsent[Spans]:
    chunks = meta.chunk_host
    ranges = KeyRanges(starts[chunks.request], chunks.k_len, chunks.k_len - chunks.q_len + 1, "bottom_right")
    spans = _unsent(meta, [_own_table(meta, ranges)], paged)
    return Unsent(spans.tables, lambda sent: spans.finish(sent)[0])


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
            _own_table(meta, ranges) for owner in range(meta.plan.cp_size) for ranges in _shard_ranges(meta, meta.cp_rank, owner, window)
        ]
        return _by_launch(_build(meta, tables, paged=False), _launches(meta, window))

    return meta.derive(("shard spans", window), build)


def needed_shard_spans(meta: CPMetadata, window: int | None, owner: int) -> list[Spans]:
    """This rank's queries over those rows of another rank's shard that they see, ``[launch]``: they lie one after another."""

    def build() -> list[Spans]:
        ranges = _shard_ranges(meta, meta.cp_rank, owner, window, needed=True)
        return _build(meta, [_own_table(meta, launch) for launch in ranges], paged=False)

    return meta.derive(("needed shard spans", window, owner), build)


def source_spans(meta: CPMetadata, window: int | None, paged: bool) -> list[list[Spans]]:
    """The queries of each rank over this rank's shard, ``[source][launch]``."""

    def build() -> list[list[Spans]]:
        tables = [
            _table(meta, source, ranges)
            for source in range(meta.plan.cp_size)
            for ranges in _shard_ranges(meta, source, meta.cp_rank, window)
        ]
        return _by_launch(_build(meta, tables, paged), _launches(meta, window))

    return meta.derive(("source spans", window, paged), build)


def needed_source_spans(meta: CPMetadata, window: int | None, sources: Sequence[int], paged: bool) -> list[Spans]:
    """Those queries of some ranks that see keys of this rank's shard over it, one after another, ``[launch]``."""

    def build() -> list[Spans]:
        many = queries_that_see(meta.plan, window, meta.cp_rank)
        tables = []
        for launch in range(_launches(meta, window)):
            parts = []
            for source in sources:
                chunks, ranges = chunk_tables(meta.plan, source), _shard_ranges(meta, source, meta.cp_rank, window)[launch]
                q_len = many[chunks.entry]
                columns = (q_len, ranges.k_start, ranges.k_len, ranges.diagonal, chunks.request)
                q_len, k_start, k_len, diagonal, request = (column[q_len > 0] for column in columns)
                parts.append(SpanTable(q_len, k_start, k_len, diagonal, request, ranges.alignment))
            tables.append(_one_after_another(parts))
        return _build(meta, tables, paged)

    return meta.derive(("needed source spans", window, tuple(sources), paged), build)


def gathered_source_spans(meta: CPMetadata, window: int | None, paged: bool) -> list[Spans]:
    """The queries of all other ranks over this rank's shard, ``[launch]``: q is rank-major, and of this rank's own
    queries none sees anything here."""

    def build() -> list[Spans]:
        tables = []
        for launch in range(_launches(meta, window)):
            parts = []
            for source in range(meta.plan.cp_size):
                ranges = _shard_ranges(meta, source, meta.cp_rank, window)[launch]
                if source == meta.cp_rank:
                    ranges = ranges._replace(k_len=np.zeros_like(ranges.k_len), alignment="full" if window is None else "any")
                parts.append(_table(meta, source, ranges))
            tables.append(_one_after_another(parts))
        return _build(meta, tables, paged)

    return meta.derive(("gathered source spans", window, paged), build)


def cached_spans(meta: CPMetadata, paged: bool) -> tuple[Spans, Spans]:
    """Over what this rank holds of the prefixes: its own queries, and those of all other ranks, rank after rank. New tokens lie
    apart."""
    own, others = meta.derive_sent(cached_draft(meta, paged))
    return own, others


def cached_draft(meta: CPMetadata, paged: bool) -> Draft[list[Spans]]:
    """The same, to be sent with other tables."""

    def make() -> Unsent[list[Spans]]:
        own = _cached_ranges(meta, meta.chunk_host)
        parts = []
        for source in range(meta.plan.cp_size):
            ranges = _cached_ranges(meta, chunk_tables(meta.plan, source))
            if source == meta.cp_rank:
                ranges = ranges._replace(k_len=np.zeros_like(ranges.k_len))
            parts.append(_table(meta, source, ranges))
        return _unsent(meta, [_own_table(meta, own), _one_after_another(parts)], paged)

    return Draft(("cached spans", paged), make)


def new_token_spans(meta: CPMetadata) -> Spans:
    """This rank's queries over the new tokens of all ranks, request after request, without the prefixes."""
    (spans,) = meta.derive_sent(new_token_draft(meta))
    return spans


def new_token_draft(meta: CPMetadata) -> Draft[list[Spans]]:
    """The same, to be sent with other tables."""

    def make() -> Unsent[list[Spans]]:
        chunks = meta.chunk_host
        begins = exclusive_cumsum(meta.plan.extend_lens)[chunks.request]
        ranges = KeyRanges(begins, chunks.start + chunks.q_len, chunks.start + 1, "bottom_right")
        return _unsent(meta, [_own_table(meta, ranges)], paged=False)

    return Draft("new token spans", make)


def window_spans(meta: CPMetadata, window: int) -> Spans:
    """This rank's queries over what their window reaches of the prefixes, and the new tokens of all ranks, in one piece for each
    request."""

    def build() -> Spans:
        chunks, plan = meta.chunk_host, meta.plan
        reached = Reach.of(plan, window).lengths
        before = reached[chunks.request] + chunks.start
        begins = exclusive_cumsum(reached + plan.extend_lens)[chunks.request]
        ranges = KeyRanges(begins, before + chunks.q_len, before + 1, "bottom_right")
        return _build(meta, [_own_table(meta, ranges)], paged=False, reached=window - 1)[0]

    return meta.derive(("window spans", window), build)


def wanted_spans(meta: CPMetadata, window: int | None) -> Spans:
    """The same, or with no window over new tokens alone, where of each request nothing lies behind the last of these queries."""
    (spans,) = meta.derive_sent(wanted_draft(meta, window))
    return spans


def wanted_draft(meta: CPMetadata, window: int | None) -> Draft[list[Spans]]:
    """The same, to be sent with other tables."""

    def make() -> Unsent[list[Spans]]:
        chunks, plan = meta.chunk_host, meta.plan
        begins = exclusive_cumsum(seen_ends(plan, window, meta.cp_rank))[chunks.request]
        before = chunks.start if window is None else Reach.of(plan, window).lengths[chunks.request] + chunks.start
        return _unsent(meta, [_own_table(meta, KeyRanges(begins, before + chunks.q_len, before + 1, "bottom_right"))], paged=False)

    return Draft(("wanted spans", window), make)


def held_spans(meta: CPMetadata, paged: bool) -> tuple[Spans, Spans]:
    """Over what this rank holds of a sharded cache, new tokens included: its own queries, and those of all other ranks, rank after
    rank."""
    if meta.plan.owner is None:
        return source_spans(meta, None, paged)[meta.cp_rank][0], gathered_source_spans(meta, None, paged)[0]

    def build() -> list[Spans]:
        return _build(meta, _own_and_others(meta, lambda source: _held_ranges(meta, source)), paged)

    own, others = meta.derive(("held spans", paged), build)
    return own, others


def _own_and_others(meta: CPMetadata, ranges_of: Callable[[int], tuple[ChunkTables, KeyRanges]]) -> list[SpanTable]:
    """Of what the queries of each rank see here: a table of this rank's own, and one of all ranks', in which its own see nothing."""
    parts, own = [], None
    for source in range(meta.plan.cp_size):
        queries, ranges = ranges_of(source)
        if source == meta.cp_rank:
            own = _with_padding(meta, queries, ranges, meta.rows)
            ranges = ranges._replace(k_len=np.zeros_like(ranges.k_len))
        parts.append(_with_padding(meta, queries, ranges, meta.rows))
    assert own is not None
    return [own, _one_after_another(parts)]


def all_queries_spans(meta: CPMetadata, window: int | None, paged: bool) -> Spans:
    """Where each rank has queries of all tokens: those over what it holds of a sharded cache, new tokens included. With a window, over
    what that sees, each query by itself."""

    def build() -> Spans:
        if window is not None:
            queries, ranges = _seen_ranges(meta, meta.cp_rank, window)
        else:
            queries, ranges = _held_ranges(meta, meta.cp_rank) if meta.plan.owner is not None else _kept_ranges(meta)
        reached = 0 if window is None else window - 1
        return _build(meta, [_with_padding(meta, queries, ranges, meta.rows)], paged, reached)[0]

    return meta.derive(("all queries spans", window, paged), build)


def all_queries_alignment(plan: Layout, window: int | None, fixed: bool) -> Alignment:
    """Of those."""
    if window is not None:
        return "bottom_right"
    return "full" if not fixed and plan.extend_lens.max(initial=0) <= 1 else "any"


def _kept_ranges(meta: CPMetadata) -> tuple[ChunkTables, KeyRanges]:
    """All queries over what this rank keeps, chunk by chunk: of its own chunks each query sees one key more than the one before."""
    plan, rank = meta.plan, meta.cp_rank
    request, start, length, owner = plan.chunk_table
    own = np.where(owner == rank, length, 0)
    before = exclusive_cumsum(own) + (plan.shard_lens[:, rank] - exclusive_cumsum(plan.rank_extends[:, rank]))[request]
    ends = plan.prefix_lens[request] + start + length
    begins = exclusive_cumsum(plan.held_lens[:, rank])[request]
    alignment = all_queries_alignment(plan, None, meta.bucket is not None)
    ranges = KeyRanges(begins, before + own, np.where(owner == rank, before + 1, before), alignment)
    return ChunkTables(np.arange(len(request)), request, start, length, ends), ranges


def held_alignment(plan: Layout, fixed: bool, own: bool) -> Alignment:
    """Of those."""
    if plan.owner is None:
        return "bottom_right" if own else "full"
    # A single query sees all of its range.
    return "full" if not fixed and plan.extend_lens.max(initial=0) <= 1 else "any"


def _held_ranges(meta: CPMetadata, source: int) -> tuple[ChunkTables, KeyRanges]:
    """The queries of ``source``, cut where this rank's turn of the stripes begins, over what this rank holds. From there on each query
    sees one key more than the one before, up to the last of the turn, and then as many until the next turn."""
    plan, rank = meta.plan, meta.cp_rank
    chunks, owner = chunk_tables(plan, source), plan.owner
    begin, turn = rank * owner.interleave, plan.cp_size * owner.interleave
    first = chunks.k_len - chunks.q_len  # absolute positions
    next_turn = (first - begin) // turn + 1
    pieces = 1 + np.maximum(0, -((begin - chunks.k_len) // turn) - next_turn)
    nth = np.arange(pieces.sum()) - exclusive_cumsum(pieces).repeat(pieces)
    start = np.where(nth == 0, first.repeat(pieces), begin + (next_turn.repeat(pieces) + nth - 1) * turn)
    end = np.where(nth + 1 == pieces.repeat(pieces), chunks.k_len.repeat(pieces), begin + (next_turn.repeat(pieces) + nth) * turn)
    entry, request = chunks.entry.repeat(pieces), chunks.request.repeat(pieces)
    held = plan.held_lens[:, rank]
    k_len, diagonal = (owner.held(seen, plan.cp_size)[:, rank] for seen in (end, start + 1))
    cut = ChunkTables(entry, request, start - plan.prefix_lens[request], end - start, end)
    alignment = held_alignment(plan, meta.bucket is not None, own=source == rank)
    return cut, KeyRanges(exclusive_cumsum(held)[request], k_len, diagonal, alignment)


def reached_spans(meta: CPMetadata, window: int) -> tuple[Spans, Spans]:
    """Over what their window reaches of the prefixes on this rank: its own queries, and those of all other ranks, rank after rank.

    A query's window begins at a number of its own in the stripe, so that each query is a span.
    """

    def build() -> list[Spans]:
        return _build(meta, _own_and_others(meta, lambda source: _reached_ranges(meta, source, window)), paged=False, reached=window - 1)

    own, others = meta.derive(("reached spans", window), build)
    return own, others


def _reached_ranges(meta: CPMetadata, source: int, window: int) -> tuple[ChunkTables, KeyRanges]:
    plan, rank, queries = meta.plan, meta.cp_rank, _one_by_one(chunk_tables(meta.plan, source))
    reach, request = Reach.of(plan, window), queries.request
    prefix_lens = plan.prefix_lens[request]
    begins = np.clip(queries.k_len - window, prefix_lens - reach.lengths[request], prefix_lens)
    first = reach.held_before(plan, rank, request, begins)
    k_len = plan.shard_lens[request, rank] - first
    k_start = exclusive_cumsum(reach.counts[:, rank])[request] + first - reach.first[request, rank]
    return queries, KeyRanges(k_start, k_len, k_len, "bottom_right")


def seen_spans(meta: CPMetadata, window: int) -> tuple[Spans, Spans]:
    """Over what their window sees on this rank, where the new tokens lie already: its own queries, and those of all other ranks. Each
    query is a span, as above."""

    def build() -> list[Spans]:
        return _build(meta, _own_and_others(meta, lambda source: _seen_ranges(meta, source, window)), paged=False, reached=window - 1)

    own, others = meta.derive(("seen spans", window), build)
    return own, others


def _seen_ranges(meta: CPMetadata, source: int, window: int) -> tuple[ChunkTables, KeyRanges]:
    plan, rank, queries = meta.plan, meta.cp_rank, _one_by_one(chunk_tables(meta.plan, source))
    reach, request = Reach.of(plan, window), queries.request
    begins = np.maximum(queries.k_len - window, (plan.prefix_lens - reach.lengths)[request])
    first, end = (reach.held_before(plan, rank, request, position) for position in (begins, queries.k_len))
    counts = plan.held_lens[:, rank] - reach.first[:, rank]
    k_start = exclusive_cumsum(counts)[request] + first - reach.first[request, rank]
    return queries, KeyRanges(k_start, end - first, end - first, "bottom_right")


def _one_by_one(chunks: ChunkTables) -> ChunkTables:
    """Each query as a chunk."""
    nth = np.arange(chunks.q_len.sum()) - exclusive_cumsum(chunks.q_len).repeat(chunks.q_len)
    entry, request, start, before = (
        column.repeat(chunks.q_len) for column in (chunks.entry, chunks.request, chunks.start, chunks.k_len - chunks.q_len)
    )
    return ChunkTables(entry, request, start + nth, np.ones_like(nth), before + nth + 1)


def _cached_ranges(meta: CPMetadata, chunks: ChunkTables) -> KeyRanges:
    cached = meta.plan.shard_lens[:, meta.cp_rank]
    k_len = cached[chunks.request]
    return KeyRanges(exclusive_cumsum(cached)[chunks.request], k_len, k_len, "full")


def launches_per_shard(plan: Layout, window: int | None, fixed: bool) -> int:
    """How many launches one shard takes; where a bucket's batch may be followed by another's, one of any partition that may follow."""
    return 1 if window is None else plan.chunks_of_share(fixed)


def _launches(meta: CPMetadata, window: int | None) -> int:
    return launches_per_shard(meta.plan, window, meta.bucket is not None)


def _shard_ranges(meta: CPMetadata, source: int, owner: int, window: int | None, needed: bool = False) -> list[KeyRanges]:
    """The queries of ``source`` over the shard of ``owner``, for each launch; with ``needed`` over the rows of it that they see."""
    plan: Layout = meta.plan
    chunks, keys = chunk_tables(plan, source), chunk_tables(plan, owner)
    cached, extends = plan.shard_lens[:, owner], plan.rank_extends[:, owner]
    key_rows = plan.chunk_rows.take(keys.entry)
    if needed:
        unseen = unseen_tokens(plan, window, source)[keys.entry]
        keys = keys._replace(start=keys.start + unseen, q_len=keys.q_len - unseen)
        cached = cached * (plan.rank_extends[:, source] > 0)
        # Sums in float64 are exact: they are at most 2**31.
        extends = np.bincount(keys.request, keys.q_len, minlength=len(plan.batch)).astype(np.int64)
        key_rows = exclusive_cumsum(keys.q_len)
    begins = exclusive_cumsum(cached + extends)[chunks.request]
    first_new = exclusive_cumsum(extends)
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
    for nth in range(_launches(meta, window)):
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


def _with_padding(meta: CPMetadata, chunks: ChunkTables, ranges: KeyRanges, most: int | None = None) -> SpanTable:
    """With the padding of q as the last span; in a bucket, after as many empty spans as there may be chunks, or ``most``."""
    missing = 0 if meta.bucket is None else (most or meta.bucket.max_chunks) - len(chunks.q_len)
    padding = meta.rows - int(chunks.q_len.sum())
    more = missing + (1 if padding or meta.bucket is not None else 0)
    columns = np.zeros((5, len(chunks.q_len) + more), dtype=np.int64)
    columns[:, : len(chunks.q_len)] = chunks.q_len, ranges.k_start, ranges.k_len, ranges.diagonal, chunks.request
    if padding:
        columns[0, -1] = padding
    q_len, k_start, k_len, diagonal, request = columns
    return SpanTable(q_len, k_start, k_len, diagonal, request, ranges.alignment)


def _build(meta: CPMetadata, tables: list[SpanTable], paged: bool, reached: int = 0) -> list[Spans]:
    return _unsent(meta, tables, paged, reached).sent(meta.device)


def _unsent(meta: CPMetadata, tables: list[SpanTable], paged: bool, reached: int = 0) -> Unsent[list[Spans]]:
    if paged:
        tables = [table._replace(k_start=np.zeros_like(table.k_start)) for table in tables]
    fixed_lengths = None
    if meta.bucket is not None:
        # Without pages a bucket has no prefixes but what is reached of them, and all ranks' rows are the most that there can be.
        longest = meta.bucket.max_seqlen if paged else min(meta.bucket.max_seqlen, reached + meta.plan.cp_size * meta.rows)
        fixed_lengths = meta.bucket.max_rows, longest
    return Spans.unsent(tables, fixed_lengths)


def _by_launch(spans: list[Spans], launches: int) -> list[list[Spans]]:
    return [spans[first : first + launches] for first in range(0, len(spans), launches)]
