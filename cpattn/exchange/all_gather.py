"""Strategy ``all_gather``: every rank receives all K and V, puts them in order, and computes in one launch.

With pages their order is that of the pages: what arrives is written to its slots, and attended to there.
With ``overlap`` above 1 this is done for so many groups of KV heads, one after another: all their transfers are started
at once, and over collectives the attention of the first group runs while the next is in flight.

Over the memory of peers, and with a backend whose launches wait for keys, the others' come while the attention runs, and only those
that this rank's queries see. Packed prefixes are read where they lie if the backend can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.gathered_rows import gathered_rows
from cpattn.exchange.key_order import KeyOrder, key_order
from cpattn.exchange.keys_at_hand import OwnKeys, WholePages
from cpattn.exchange.late_keys import LateKeys
from cpattn.exchange.message import KVFormat, Message, heads_of, message_buffer, pages_of_heads
from cpattn.exchange.schedule import Hop, Schedule, sends
from cpattn.exchange.step_spans import causal_spans
from cpattn.exchange.strategy import IO, Setup, Strategy
from cpattn.exchange.striped_window import StripedWindow, window_schedule
from cpattn.keys import Keys, PrefixKeys
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.layout import Layout
from cpattn.moves.moves import Moves, moves_for
from cpattn.problem import Problem
from cpattn.spans import Spans
from cpattn.transports.rows_of_all import RowsOfAll
from cpattn.transports.transfer import Transfer


def _schedule(problem: Problem, plan: Layout) -> Schedule:
    if plan.owner is not None:
        return window_schedule(problem, plan)
    message = 0 if _is_alone(problem, plan) else problem.rows * problem.key_bytes
    return (Hop(queries=0, keys="all", alignment="bottom_right", results=1, sent=sends(problem, plan, (plan.cp_size - 1) * message)),)


def _is_alone(problem: Problem, plan: Layout) -> bool:
    """Whether a rank's new keys are all that is missing, and no others have to be put in order with them."""
    return plan.cp_size == 1 and problem.cache != "packed"


def _prepare(setup: Setup) -> _Alone | _AllGather | StripedWindow:
    if setup.meta.plan.owner is not None:
        return StripedWindow.of(setup)
    if _is_alone(setup.problem, setup.meta.plan):
        return _Alone.of(setup)
    problem = setup.problem
    kv = setup.kv.group(problem.overlap)
    all_rows = _rows_of_all(setup, kv)
    groups = []
    for number, rows in enumerate(all_rows):
        kv_heads = q_heads = None
        if problem.overlap > 1:
            kv_heads = slice(number * kv.heads, (number + 1) * kv.heads)
            queries_a_key = problem.q_heads // problem.kv_heads
            q_heads = slice(kv_heads.start * queries_a_key, kv_heads.stop * queries_a_key)
        groups.append(_Group(rows, kv_heads, q_heads))
    order = _IntoPages.of(setup, kv) if problem.cache == "paged" else _InOrder.of(setup, kv)
    late = None
    if isinstance(order, _InOrder) and len(all_rows) == 1 and all_rows[0].can_bring and setup.waits_for_keys:
        late = LateKeys.of(setup, order.ordered, order.order)
    return _AllGather(
        transfers=tuple(rows.transfer for rows in all_rows),
        groups=tuple(groups),
        num_tokens=setup.num_tokens,
        order=order,
        prefix=order.prefix if isinstance(order, _InOrder) else None,
        late=late,
    )


def _forward(held: _Alone | _AllGather | StripedWindow, io: IO, attend: Attend) -> None:
    if isinstance(held, StripedWindow):
        held.forward(io, attend)
        return
    if isinstance(held, _Alone):
        attend(held.keys(io), held.spans)
        return
    _, groups, num_tokens, order, prefix, late = held
    works = []
    for rows, kv_heads, _ in groups:
        k, v = (io.k, io.v) if kv_heads is None else (heads_of(io.k, kv_heads), heads_of(io.v, kv_heads))
        if late is None:
            rows.put(k, v, num_tokens)
        else:
            rows.put(k, v, num_tokens, late.rows)
        works.append(io.start())
    for (rows, kv_heads, q_heads), work in zip(groups, works, strict=True):
        if prefix is not None:
            # It is there, and the new keys are still on their way.
            prefix.put(io, kv_heads)
        work.wait()
        if late is not None:
            assert isinstance(order, _InOrder)
            rows.bring(late.rows)
            attend(order.with_prefix(late.keys, io, kv_heads), order.spans)
            continue
        keys = order.keys(io, rows, kv_heads)
        if q_heads is None:
            attend(keys, order.spans)
        else:
            attend.heads(keys, order.spans, q_heads)


class _Alone(NamedTuple):
    """A group of one rank, whose keys are attended to where they are.

    Attributes:
        pages: where they are written first, and attended to there; places: where in them.
    """

    own: OwnKeys
    pages: WholePages | None
    places: tuple[Tensor, Tensor] | None
    spans: Spans
    moves: Moves
    transfers: tuple[Transfer, ...] = ()

    @classmethod
    def of(cls, setup: Setup) -> _Alone:
        own, moves = OwnKeys.of(setup), moves_for(setup.problem.device)
        if setup.problem.cache is None:
            return cls(own, None, None, causal_spans(setup.meta, paged=False), moves)
        pages = WholePages.of(setup, setup.kv)
        return cls(own, pages, setup.meta.gathered_places, pages.spans, moves)

    def keys(self, io: IO) -> Keys:
        """All there are."""
        if self.pages is None or self.places is None:
            return self.own.keys(io)
        assert isinstance(io.cache, PagedKV)
        self.moves.write_pages(io.cache.k_pages, io.cache.v_pages, io.cache.page_table, *self.places, io.k, io.v)
        return self.pages.keys(io.cache)


class _Prefix(NamedTuple):
    """Cached keys that are put in order beside the new ones: the memory for both, and where the cached ones go."""

    ordered: Tensor
    rows: Tensor
    moves: Moves

    def put(self, io: IO, heads: slice | None) -> None:
        """Of one group of heads."""
        cache = io.cache
        assert isinstance(cache, PackedKV)
        self.moves.pack(self.ordered, heads_of(cache.k, heads), heads_of(cache.v, heads), cache.k.shape[0], self.rows)


class _InOrder(NamedTuple):
    """From rank-major order to each request's keys in one piece, K and V at once; cached ones that the backend reads where they lie
    stay there.

    Attributes:
        ordered: memory for the keys of one group of heads: its attention has read them before the next group's take their place.
        order: where they go.
        prefix: of what is cached, where any of it is put.
        restore_index: the row of each new token among the gathered ones.
    """

    spans: Spans
    ordered: Message
    order: KeyOrder
    prefix: _Prefix | None
    restore_index: Tensor

    @classmethod
    def of(cls, setup: Setup, kv: KVFormat) -> _InOrder:
        meta, moves, is_packed = setup.meta, moves_for(setup.problem.device), setup.problem.cache == "packed"
        order = key_order(meta, is_packed, setup.reads_prefix)
        ordered = message_buffer(setup.transport.arena, "ordered", kv, order.rows)
        spans = causal_spans(meta, paged=False, k_starts=None if order.prefix_places is None else order.k_starts)
        prefix = None if order.prefix_rows is None else _Prefix(ordered.whole, order.prefix_rows, moves)
        return cls(spans, ordered, order, prefix, meta.restore_index)

    def keys(self, io: IO, arrived: RowsOfAll, heads: slice | None) -> Keys:
        """What has arrived, put in order."""
        arrived.gather(self.ordered.whole, self.restore_index, self.order.new_rows)
        return self.with_prefix(self.ordered.keys, io, heads)

    def with_prefix(self, keys: Keys, io: IO, heads: slice | None) -> Keys:
        """And what is read where it lies."""
        cache, places = io.cache, self.order.prefix_places
        if places is None:
            return keys
        assert isinstance(cache, PackedKV)
        k, v = heads_of(cache.k, heads), heads_of(cache.v, heads)
        assert v is not None  # it is not a part of K, or the backend would not read it there
        return keys._replace(prefix=PrefixKeys(_aligned(k), _aligned(v), places))


def _aligned(x: Tensor) -> Tensor:
    """As a kernel takes cached keys: rows and heads at multiples of 16 bytes."""
    numbers = x.data_ptr() | x.stride(0) * x.element_size() | x.stride(1) * x.element_size()
    return x if numbers % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


class _IntoPages(NamedTuple):
    """Into the slots of pages, and attended to there.

    Attributes:
        places: the request and the position of each gathered row.
    """

    spans: Spans
    pages: WholePages
    places: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, setup: Setup, kv: KVFormat) -> _IntoPages:
        pages = WholePages.of(setup, kv)
        return cls(pages.spans, pages, setup.meta.gathered_places)

    def keys(self, io: IO, arrived: RowsOfAll, heads: slice | None) -> Keys:
        """What has arrived, in its slots."""
        assert isinstance(io.cache, PagedKV)
        cache = pages_of_heads(io.cache, heads)
        arrived.write_pages(cache.k_pages, cache.v_pages, cache.page_table, *self.places)
        return self.pages.keys(cache)


class _Group(NamedTuple):
    """A group of KV heads, and the query heads that they belong to; None for all, which spares the slicing."""

    rows: RowsOfAll
    kv_heads: slice | None
    q_heads: slice | None


class _AllGather(NamedTuple):
    transfers: tuple[Transfer, ...]
    groups: tuple[_Group, ...]
    num_tokens: int | Tensor
    order: _InOrder | _IntoPages
    prefix: _Prefix | None
    late: LateKeys | None


def _rows_of_all(setup: Setup, kv: KVFormat) -> Sequence[RowsOfAll]:
    """Of each group of KV heads; ``kv`` is of one of them."""
    shape, transport = (setup.meta.rows, kv.heads, kv.width), setup.transport
    there = [transport.rows_of_all(shape, kv.dtype, kv.device, kv.fill_missing_) for _ in range(setup.problem.overlap)]
    found = [rows for rows in there if rows is not None]
    return found or gathered_rows(transport, kv, setup.meta.rows, setup.problem.overlap)


def _why_not(problem: Problem, plan: Layout) -> str | None:
    if plan.owner is not None and problem.window is not None:
        return None if problem.overlap == 1 else "of a striped cache it brings all heads at once; leave overlap out"
    if plan.owner is not None:
        # A longer window is left out of a call.
        return (
            "it would bring the whole of a striped cache to every rank, as no window is shorter than the longest request of this batch; "
            "'auto' takes for each batch what can serve it"
        )
    if plan.sharded:
        return "it would bring the whole of a sharded cache to every rank"
    return None


ALL_GATHER = Strategy("all_gather", _schedule, _prepare, _forward, _why_not, "keys and values")
