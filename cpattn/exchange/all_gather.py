"""Strategy ``all_gather``: every rank receives the K and V that its queries see, puts them in order, and computes in one launch.

Where nearly everything is needed somewhere, and where it has to be there anyway, all ranks receive all of it:
:mod:`cpattn.exchange.traveling_keys`. Where nothing is needed, nothing is sent. With pages what arrives is written to its slots, and
attended to there, or before that in order.
With ``overlap`` above 1 this is done for so many groups of KV heads, one after another: all their transfers are started
at once, and over collectives the attention of the first group runs while the next is in flight.

Over the memory of peers, and with a backend whose launches wait for keys, the others' come while the attention runs; into pages they
are written after it. Packed prefixes are read where they lie if the backend can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.brought_keys import keys_in_order
from cpattn.exchange.gather_into_pages import GatherIntoPages
from cpattn.exchange.head_groups import HeadGroup, attend_to_group, head_groups
from cpattn.exchange.key_order import Ordered, key_order
from cpattn.exchange.keys_at_hand import OwnKeys, WholePages
from cpattn.exchange.keys_in_order import InOrder, OrderedKeys, OwnInOrder, OwnInPlace
from cpattn.exchange.late_keys import LateInOrder
from cpattn.exchange.late_pages import LateIntoPages
from cpattn.exchange.message import heads_of
from cpattn.exchange.page_rows import Places, write_rows
from cpattn.exchange.ring import UNKNOWN_POSITIONS
from cpattn.exchange.schedule import Hop, Schedule
from cpattn.exchange.step_spans import spans_in_order
from cpattn.exchange.strategy import IO, Setup, Strategy
from cpattn.exchange.traveling_keys import counted, explain_keys, traveling_keys
from cpattn.exchange.traveling_over_shards import explain_over_shards, traveling_over_shards
from cpattn.exchange.wanted_rows import WantedRows
from cpattn.exchange.window_over_shards import WindowOverShards, window_schedule
from cpattn.kv_cache import PagedKV
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem
from cpattn.spans import Spans
from cpattn.transports.rows_of_all import SentRows
from cpattn.transports.transfer import Transfer


def _schedule(problem: Problem, plan: Layout) -> Schedule:
    if plan.sharded:
        return window_schedule(problem, plan)
    travels = traveling_keys(problem, plan)
    sent = (travels.sent + travels.rest_sent) * problem.key_bytes
    return (Hop(queries=0, keys="all", alignment="bottom_right", results=1, sent=sent),)


def explain_gathered(problem: Problem, plan: Layout) -> str:
    """What travels, in words."""
    return explain_over_shards(problem, plan) if plan.sharded else explain_keys(problem, plan)


def _prepare(setup: Setup) -> _Alone | _AllGather | GatherIntoPages | LateIntoPages | WindowOverShards | WantedRows:
    problem, meta = setup.problem, setup.meta
    if meta.plan.sharded:
        brings = traveling_over_shards(problem, meta.plan)
        wanted = None if brings.what == "all" else WantedRows.of(setup, brings)
        return wanted or WindowOverShards.of(setup)
    travels = traveling_keys(problem, meta.plan)
    if travels.what == "nothing" and _are_at_hand(setup):
        return _Alone.of(setup)
    if problem.cache == "paged":
        return LateIntoPages.of(setup, travels) or GatherIntoPages.of(setup, travels)
    rows, order = keys_in_order(setup, setup.kv.group(problem.overlap), travels)
    ordered = order.ordered if isinstance(order, (InOrder, LateInOrder, OwnInOrder)) else None
    return _AllGather(
        transfers=tuple(counted(group.transfer, travels, setup) for group in rows if group.transfer is not None),
        rows=rows,
        groups=head_groups(problem),
        num_tokens=setup.num_tokens,
        order=order,
        prefix=ordered if ordered is not None and ordered.order.prefix_places is not None else None,
    )


def _are_at_hand(setup: Setup) -> bool:
    """Whether this rank's new keys are all that its queries see, and lie in order."""
    meta = setup.meta
    if setup.problem.cache == "paged" or meta.bucket is not None:
        return setup.transport.size == 1
    return key_order(meta, setup.ordered).are_own


def _forward(held: _Alone | _AllGather | GatherIntoPages | LateIntoPages | WindowOverShards | WantedRows, io: IO, attend: Attend) -> None:
    if isinstance(held, (_Alone, GatherIntoPages, LateIntoPages, WindowOverShards, WantedRows)):
        held.forward(io, attend)
        return
    _, all_rows, groups, num_tokens, order, prefix = held
    works = []
    for rows, (kv_heads, _) in zip(all_rows, groups, strict=True):
        rows.put(heads_of(io.k, kv_heads), heads_of(io.v, kv_heads), num_tokens)
        works.append(None if rows.transfer is None else io.start())
    for rows, group, work in zip(all_rows, groups, works, strict=True):
        if prefix is not None:
            # It is there, and the new keys are still on their way.
            prefix.put_prefix(io, group.kv_heads)
        comes_late = isinstance(order, LateInOrder)
        if work is not None and not comes_late:
            work.wait()
        keys = order.keys(io, rows, group.kv_heads)
        if work is not None and comes_late:
            # Nothing comes between the launch that brings them and the one that reads them.
            work.wait()
        attend_to_group(attend, keys, order.spans, group)


class _Alone(NamedTuple):
    """A rank whose keys are attended to where they are, in a group in which nothing travels.

    Attributes:
        own: where they are attended to; pages: what is attended to in their place, once they are written there.
        places: where they are written, before or after the attention; None where there are no pages.
    """

    own: OwnKeys
    pages: WholePages | None
    places: Places | None
    spans: Spans
    transfers: tuple[Transfer, ...] = ()

    @classmethod
    def of(cls, setup: Setup) -> _Alone:
        problem, meta = setup.problem, setup.meta
        own, is_paged = OwnKeys.of(setup), problem.cache == "paged"
        places = meta.gathered_places if is_paged else None
        if is_paged and not setup.writes_pages_after(problem, meta.plan):
            pages = WholePages.of(setup, setup.kv)
            return cls(own, pages, places, pages.spans)
        # They lie in the order of all that is seen.
        return cls(own, None, places, spans_in_order(meta, Ordered.SEEN))

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        if self.pages is None:
            attend(self.own.keys(io), self.spans)
            self._write(io)
        else:
            self._write(io)
            assert isinstance(io.cache, PagedKV)
            attend(self.pages.keys(io.cache), self.spans)

    def _write(self, io: IO) -> None:
        if self.places is not None:
            assert isinstance(io.cache, PagedKV)
            write_rows(self.own.kv, io.cache, self.places, io.k, io.v)


class _AllGather(NamedTuple):
    """Into order.

    Attributes:
        rows: of each group of heads.
        prefix: where cached keys are put; None where none are.
    """

    transfers: tuple[Transfer, ...]
    rows: Sequence[SentRows]
    groups: Sequence[HeadGroup]
    num_tokens: int | Tensor
    order: InOrder | LateInOrder | OwnInOrder | OwnInPlace
    prefix: OrderedKeys | None


def _why_not(problem: Problem, plan: Layout) -> str | None:
    if not plan.sharded:
        return None
    if not plan.knows_positions:
        return "it would bring the whole of a sharded cache to every rank" if problem.window is None else UNKNOWN_POSITIONS
    if problem.window is None:
        return "it would bring the whole of a sharded cache to every rank, as there is no window"
    return None if problem.overlap == 1 else "of a sharded cache it brings all heads at once; leave overlap out"


ALL_GATHER = Strategy("all_gather", _schedule, _prepare, _forward, _why_not, "keys and values", stored=True, expands=True)
