"""Over a sharded cache, new keys and the cached ones that a window reaches, brought to the ranks whose queries see them, and to those that
are to hold them: put in order, written to the pages of their holders from there, and attended to in one launch. What a rank does not want
has no place there, but for what lies between keys that its queries see.

Over collectives in an uneven all-to-all; through the memory of peers each rank reads what it wants of what all have posted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cpattn.device_tables import Unsent
from cpattn.exchange.attend import Attend
from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.exchange.needed_rows import needed_rows
from cpattn.exchange.page_rows import Places, read_rows, write_rows
from cpattn.exchange.seen_keys import ExchangedRows
from cpattn.exchange.step_spans import wanted_draft, wanted_spans
from cpattn.exchange.strategy import IO, Setup
from cpattn.exchange.traveling_over_shards import TravelingOverShards, rows_brought
from cpattn.kv_cache import PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.draft import Draft
from cpattn.metadata.wanted_keys import WantedKeys
from cpattn.metadata.window_reach import reached_places
from cpattn.moves.moves import Moves, moves_for
from cpattn.spans import Spans
from cpattn.transports.rows_of_all import RowsInOrder
from cpattn.transports.transfer import Transfer


class _Brought(NamedTuple):
    """What there is to put in the order: this rank's new rows, and behind them cached ones that a window reaches.

    Attributes:
        all: of both; new, cached: parts of it.
        places: of the cached ones in this rank's pages.
    """

    all: Message
    new: Message
    cached: Message
    places: Places


class WantedRows(NamedTuple):
    """
    Attributes:
        brought: None where no cached keys travel, so that this rank's new rows are sent from where they lie.
        rows: what is sent, and comes.
        ordered: memory for what this rank puts in order (:meth:`WantedKeys.placed`); order: where each row comes from, negative for what
            lies between those that are wanted.
        places: of each of these in this rank's pages, if it is one that it is to hold.
    """

    transfers: tuple[Transfer, ...]
    brought: _Brought | None
    rows: RowsInOrder
    ordered: Message
    order: Tensor
    places: Places
    spans: Spans
    num_tokens: int | Tensor
    kv: KVFormat
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, travels: TravelingOverShards) -> WantedRows | None:
        """What one call needs; None where the transport sends no such messages."""
        problem, meta, transport, kv = setup.problem, setup.meta, setup.transport, setup.kv
        own, window = rows_brought(problem, meta.plan), problem.window
        shape = own, kv.heads, kv.width
        peers = None
        if travels.what == "wanted" and kv.is_dense:
            peers = transport.rows_of_all(shape, kv.wire_dtype, kv.device, kv.fill_missing_)
        tables = _tables(meta, window, own, reads_peers=peers is not None)
        meta.derive_together(tables, wanted_draft(meta, window))
        table, places = meta.derive_sent(tables)
        rows: RowsInOrder
        if peers is None:
            found = needed_rows(transport, kv, table, own, 1, travels.what == "wanted")
            if found is None:
                return None
            (rows,) = found
        else:
            rows = peers
        transfers: tuple[Transfer, ...] = ()
        if rows.transfer is not None:
            transfers = (rows.transfer._replace(nbytes=int(travels.sent[meta.cp_rank]) * problem.key_bytes),)
        brought = None
        if window is not None and own > problem.rows:
            memory = message_buffer(transport.arena, "brought", kv, own)
            new, cached = (Message.of(part, kv) for part in (memory.whole[: problem.rows], memory.whole[problem.rows :]))
            brought = _Brought(memory, new, cached, reached_places(meta, window))
        return cls(
            transfers=transfers,
            brought=brought,
            rows=rows,
            ordered=message_buffer(transport.arena, "ordered", kv, len(table.source)),
            order=table.source,
            places=places,
            spans=wanted_spans(meta, window),
            num_tokens=setup.num_tokens,
            kv=kv,
            moves=moves_for(problem.device),
        )

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        cache, brought, k, v, many = io.cache, self.brought, io.k, io.v, self.num_tokens
        assert isinstance(cache, PagedKV)
        if brought is not None:
            self.moves.pack(brought.new.whole, k, v, many)
            read_rows(self.kv, cache, brought.places, *brought.cached.parts)
            (k, v), many = brought.all.parts, len(brought.all.whole)
        self.rows.put(k, v, many)
        if self.transfers:
            io.start().wait()
        self.rows.gather(self.ordered.whole, self.order, None)
        write_rows(self.kv, cache, self.places, *self.ordered.parts)
        attend(self.ordered.keys, self.spans)


def _tables(meta: CPMetadata, window: int | None, own: int, *, reads_peers: bool) -> Draft[tuple[ExchangedRows, Places]]:
    """What this rank sends and where it finds what it wants, among its own rows and those that it receives, or among those of all ranks;
    and where those belong that it is to hold."""
    return Draft(("wanted rows", window, own, reads_peers), lambda: _unsent(meta, window, own, reads_peers))


def _unsent(meta: CPMetadata, window: int | None, own: int, reads_peers: bool) -> Unsent[tuple[ExchangedRows, Places]]:
    plan, rank = meta.plan, meta.cp_rank
    found = WantedKeys.of(plan, window)
    leaving = [found.sent_to(rank, other) for other in range(plan.cp_size)]
    coming = [found.sent_to(other, rank) for other in range(plan.cp_size)]
    sent, received = (tuple(map(len, runs)) for runs in (leaving, coming))
    placed = found.placed(plan, window, rank)
    place = found.row
    if reads_peers:
        place = found.source.astype(np.int64) * own + place
    else:
        place, arriving = place.copy(), np.concatenate(coming)
        place[arriving] = own + np.arange(len(arriving))
    request, number = found.to_hold(plan, rank)
    tables = {
        "source": np.where(found.used[rank][placed], place[placed], -1),
        "outgoing": found.row[np.concatenate(leaving)],
        "request": request[placed],
        "number": number[placed],
    }

    def finish(on_device: Mapping[str, Tensor]) -> tuple[ExchangedRows, Places]:
        rows = ExchangedRows(sent, received, own, numbers=None, outgoing=on_device["outgoing"], source=on_device["source"])
        return rows, (on_device["request"], on_device["number"])

    return Unsent(tables, finish)
