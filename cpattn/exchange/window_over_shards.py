"""Strategy ``all_gather`` over a sharded cache with a window: of the cached keys those travel that the window reaches.

A window is no range of the keys in a shard, but one of all keys in order. Those in its reach are few, whatever the context: each
rank sends its own beside its new keys, and all are put in order.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.exchange.page_rows import read_rows, write_rows
from cpattn.exchange.schedule import Hop, Schedule
from cpattn.exchange.step_spans import window_spans
from cpattn.exchange.strategy import IO, Setup
from cpattn.exchange.traveling_over_shards import sent_over_shards
from cpattn.kv_cache import PagedKV
from cpattn.metadata.layout import Layout
from cpattn.metadata.window_reach import WindowPlaces, require_positions, window_places
from cpattn.moves.moves import Moves, moves_for
from cpattn.problem import Problem
from cpattn.spans import Spans
from cpattn.transports.transfer import Transfer


def window_schedule(problem: Problem, plan: Layout) -> Schedule:
    """The one hop of a call."""
    return (Hop(queries=0, keys="all", alignment="bottom_right", results=1, sent=sent_over_shards(problem, plan)),)


class WindowOverShards(NamedTuple):
    """
    Attributes:
        all: new and cached rows of all ranks; new, cached: this rank's.
        ordered: memory for what the spans are over.
    """

    transfers: tuple[Transfer, ...]
    all: Message
    new: Message
    cached: Message
    places: WindowPlaces
    ordered: Message
    spans: Spans
    num_tokens: int | Tensor
    kv: KVFormat
    moves: Moves

    @classmethod
    def of(cls, setup: Setup) -> WindowOverShards:
        """What one call needs."""
        problem, meta, transport, kv = setup.problem, setup.meta, setup.transport, setup.kv
        assert problem.window is not None
        meta.on_copy(require_positions)
        places = window_places(meta, problem.window)
        rows = meta.rows + len(places.cached[0])
        everyone = message_buffer(transport.arena, "gathered", kv, transport.size * rows)
        own = everyone.whole.narrow(0, transport.rank * rows, rows)
        transfers: tuple[Transfer, ...] = ()
        if transport.size > 1:
            gather = transport.prepare_all_gather(everyone.whole, own)
            transfers = (gather._replace(fill_missing=partial(kv.fill_missing_, own)),)
        return cls(
            transfers=transfers,
            all=everyone,
            new=Message.of(own[: meta.rows], kv),
            cached=Message.of(own[meta.rows :], kv),
            places=places,
            ordered=message_buffer(transport.arena, "ordered", kv, len(places.order)),
            spans=window_spans(meta, problem.window),
            num_tokens=setup.num_tokens,
            kv=kv,
            moves=moves_for(problem.device),
        )

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        cache, moves, places = io.cache, self.moves, self.places
        assert isinstance(cache, PagedKV)
        moves.pack(self.new.whole, io.k, io.v, self.num_tokens)
        read_rows(self.kv, cache, places.cached, *self.cached.parts)
        if self.transfers:
            io.start().wait()
        write_rows(self.kv, cache, places.owned, *self.all.parts)
        moves.gather_rows(self.ordered.whole, self.all.whole, places.order)
        attend(self.ordered.keys, self.spans)
