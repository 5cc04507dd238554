"""Strategy ``all_gather``: every rank receives the K and V that its queries see, puts them in order, and computes in one launch.

Where nearly everything is needed somewhere, and where it has to be there anyway, all ranks receive all of it:
:mod:`cpattn.exchange.traveling_keys`. Where nothing is needed, nothing is sent. With pages the order of keys is that of the
pages: what arrives is written to its slots, and attended to there.
With ``overlap`` above 1 this is done for so many groups of KV heads, one after another: all their transfers are started
at once, and over collectives the attention of the first group runs while the next is in flight.

Over the memory of peers, and with a backend whose launches wait for keys, the others' come while the attention runs. Packed prefixes
are read where they lie if the backend can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.brought_keys import keys_in_order, rows_of_all
from cpattn.exchange.key_order import key_order
from cpattn.exchange.keys_at_hand import OwnKeys, WholePages
from cpattn.exchange.keys_in_order import InOrder, OrderedKeys, OwnInOrder, OwnInPlace
from cpattn.exchange.late_keys import LateInOrder
from cpattn.exchange.message import KVFormat, heads_of, pages_of_heads
from cpattn.exchange.schedule import Hop, Schedule
from cpattn.exchange.step_spans import spans_in_order
from cpattn.exchange.strategy import IO, Setup, Strategy
from cpattn.exchange.striped_window import StripedWindow, window_schedule
from cpattn.exchange.traveling_keys import Traveling, traveling_keys
from cpattn.keys import Keys
from cpattn.kv_cache import PagedKV
from cpattn.metadata.layout import Layout
from cpattn.moves.moves import Moves, moves_for
from cpattn.problem import Problem
from cpattn.spans import Spans
from cpattn.transports.rows_of_all import RowsOfAll, SentRows
from cpattn.transports.transfer import Transfer


def _schedule(problem: Problem, plan: Layout) -> Schedule:
    if plan.owner is not None:
        return window_schedule(problem, plan)
    sent = traveling_keys(problem, plan).sent * problem.key_bytes
    return (Hop(queries=0, keys="all", alignment="bottom_right", results=1, sent=sent),)


def _prepare(setup: Setup) -> _Alone | _AllGather | StripedWindow:
    problem, meta = setup.problem, setup.meta
    if meta.plan.owner is not None:
        return StripedWindow.of(setup)
    travels = traveling_keys(problem, meta.plan)
    if travels.what == "nothing" and _are_at_hand(setup):
        return _Alone.of(setup)
    kv = setup.kv.group(problem.overlap)
    all_rows: Sequence[SentRows]
    order: InOrder | LateInOrder | OwnInOrder | OwnInPlace | _IntoPages
    if problem.cache == "paged":
        all_rows, order = rows_of_all(setup, kv), _IntoPages.of(setup, kv)
    else:
        all_rows, order = keys_in_order(setup, kv, travels)
    groups = []
    for number, rows in enumerate(all_rows):
        kv_heads = q_heads = None
        if problem.overlap > 1:
            kv_heads = slice(number * kv.heads, (number + 1) * kv.heads)
            queries_a_key = problem.q_heads // problem.kv_heads
            q_heads = slice(kv_heads.start * queries_a_key, kv_heads.stop * queries_a_key)
        groups.append(_Group(rows, kv_heads, q_heads))
    ordered = order.ordered if isinstance(order, (InOrder, LateInOrder, OwnInOrder)) else None
    return _AllGather(
        transfers=tuple(_counted(rows.transfer, travels, setup) for rows in all_rows if rows.transfer is not None),
        groups=tuple(groups),
        num_tokens=setup.num_tokens,
        order=order,
        prefix=ordered if ordered is not None and ordered.order.prefix_places is not None else None,
    )


def _counted(transfer: Transfer, travels: Traveling, setup: Setup) -> Transfer:
    """Of a message that lies where others read it counts what they read."""
    problem = setup.problem
    nbytes = int(travels.sent[setup.meta.cp_rank]) * problem.key_bytes // problem.overlap
    return transfer if transfer.posted is None else transfer._replace(nbytes=nbytes)


def _are_at_hand(setup: Setup) -> bool:
    """Whether this rank's new keys are all that its queries see, and lie in order."""
    meta = setup.meta
    if setup.problem.cache == "paged" or meta.bucket is not None:
        return setup.transport.size == 1
    return key_order(meta, setup.reads_prefix).are_own


def _forward(held: _Alone | _AllGather | StripedWindow, io: IO, attend: Attend) -> None:
    if isinstance(held, StripedWindow):
        held.forward(io, attend)
        return
    if isinstance(held, _Alone):
        attend(held.keys(io), held.spans)
        return
    _, groups, num_tokens, order, prefix = held
    works = []
    for rows, kv_heads, _ in groups:
        k, v = (io.k, io.v) if kv_heads is None else (heads_of(io.k, kv_heads), heads_of(io.v, kv_heads))
        rows.put(k, v, num_tokens)
        works.append(None if rows.transfer is None else io.start())
    for (rows, kv_heads, q_heads), work in zip(groups, works, strict=True):
        if prefix is not None:
            # It is there, and the new keys are still on their way.
            prefix.put_prefix(io, kv_heads)
        if work is not None:
            work.wait()
        keys = order.keys(io, rows, kv_heads)
        if q_heads is None:
            attend(keys, order.spans)
        else:
            attend.heads(keys, order.spans, q_heads)


class _Alone(NamedTuple):
    """A rank whose keys are attended to where they are, in a group in which nothing travels.

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
        if setup.problem.cache != "paged":
            return cls(own, None, None, spans_in_order(setup.meta, setup.reads_prefix), moves)
        pages = WholePages.of(setup, setup.kv)
        return cls(own, pages, setup.meta.gathered_places, pages.spans, moves)

    def keys(self, io: IO) -> Keys:
        """All there are."""
        if self.pages is None or self.places is None:
            return self.own.keys(io)
        assert isinstance(io.cache, PagedKV)
        self.moves.write_pages(io.cache.k_pages, io.cache.v_pages, io.cache.page_table, *self.places, io.k, io.v)
        return self.pages.keys(io.cache)


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

    def keys(self, io: IO, arrived: SentRows, heads: slice | None) -> Keys:
        """What has arrived, in its slots."""
        assert isinstance(io.cache, PagedKV)
        cache = pages_of_heads(io.cache, heads)
        # Pages that every rank holds whole want the rows of all ranks.
        cast("RowsOfAll", arrived).write_pages(cache.k_pages, cache.v_pages, cache.page_table, *self.places)
        return self.pages.keys(cache)


class _Group(NamedTuple):
    """A group of KV heads, and the query heads that they belong to; None for all, which spares the slicing."""

    rows: SentRows
    kv_heads: slice | None
    q_heads: slice | None


class _AllGather(NamedTuple):
    transfers: tuple[Transfer, ...]
    groups: tuple[_Group, ...]
    num_tokens: int | Tensor
    order: InOrder | LateInOrder | OwnInOrder | OwnInPlace | _IntoPages
    prefix: OrderedKeys | None


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
