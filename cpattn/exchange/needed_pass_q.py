"""Strategies ``pass_q`` and ``pass_q_ring`` where few queries see keys of other ranks: those alone travel, and their results back.

Where no query sees any, each rank attends to what it holds, and no rank waits for another. Otherwise what :mod:`cpattn.exchange.pass_q`
says of the two holds; in the ring a rank receives queries straight from the one whose they are, and hops without any are left out.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.keys_at_hand import OwnKeys, OwnShard, Prefixes
from cpattn.exchange.query_rows import QueryRows, QueryTables, ReturnedRows, put_in, query_rows
from cpattn.exchange.step_spans import needed_source_spans, source_spans
from cpattn.exchange.strategy import IO, Setup
from cpattn.exchange.traveling_queries import TravelingQueries
from cpattn.keys import Keys
from cpattn.moves.moves import Moves, moves_for
from cpattn.spans import Spans
from cpattn.transports.transfer import Transfer, Work


class Held(NamedTuple):
    """What a rank's own queries see without others: its keys, and the prefixes that it has whole."""

    keys: OwnKeys | OwnShard
    prefixes: Prefixes | None
    spans: list[Spans]

    @classmethod
    def of(cls, setup: Setup, keys: OwnKeys | OwnShard, paged: bool) -> Held:
        """``paged`` if the keys are attended to in pages."""
        return cls(keys, Prefixes.of(setup), source_spans(setup.meta, setup.problem.window, paged)[setup.meta.cp_rank])

    def attend(self, keys: Keys, io: IO, attend: Attend) -> None:
        """Lets them see it."""
        if self.prefixes is not None:
            self.prefixes.attend(io, attend)
        for spans in self.spans:
            attend(keys, spans)


class NeededPassQ(NamedTuple):
    """
    Attributes:
        rows: the queries that travel; None where none do. spans: those that come over this rank's keys, launch after launch.
    """

    transfers: tuple[Transfer, ...]
    held: Held
    rows: QueryRows | None
    spans: list[Spans]

    @classmethod
    def of(cls, setup: Setup, held: Held, travels: TravelingQueries, paged: bool) -> NeededPassQ | None:
        """None where the transport cannot send such messages."""
        if travels.what == "nothing":
            return cls((), held, None, [])
        rows = query_rows(setup, travels.between)
        if rows is None:
            return None
        sources = travels.between[:, setup.meta.cp_rank].nonzero()[0].tolist()
        spans = needed_source_spans(setup.meta, setup.problem.window, sources, paged) if sources else []
        return cls((rows.there, rows.back), held, rows, spans)

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        keys = self.held.keys.keys(io)
        if self.rows is None:
            self.held.attend(keys, io, attend)
            return
        self.rows.put(io.q)
        arriving = io.start()
        self.held.attend(keys, io, attend)
        arriving.wait()
        queries = self.rows.queries()
        self.rows.put_results(*attend.others(queries, keys, self.spans))
        io.start().wait()
        out, lse = self.rows.results()
        if len(out):
            attend.merge(out, lse)


class _Hop(NamedTuple):
    """One hop.

    Attributes:
        message: queries to the rank that comes so many later; rows: which of this rank's they are.
        queries: from the rank that came so many before; spans: those over this rank's keys.
        sent: their results; received: those of this rank's queries, and slots: which those are of.
    """

    message: Tensor
    rows: Tensor
    queries: Tensor
    spans: list[Spans]
    sent: Tensor
    received: Tensor


class NeededPassQRing(NamedTuple):
    """
    Attributes:
        own: this rank's queries, of which some go out; None where none do, on no rank.
        numbers: in turn; returned: memory for one rank's results.
    """

    transfers: tuple[Transfer, ...]
    held: Held
    hops: tuple[_Hop, ...]
    own: Tensor | None
    numbers: Tensor | None
    returned: ReturnedRows | None
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, held: Held, travels: TravelingQueries, paged: bool) -> NeededPassQRing | None:
        """None where the transport cannot send such messages."""
        problem, meta, transport = setup.problem, setup.meta, setup.transport
        size, rank, between = transport.size, meta.cp_rank, travels.between
        moves = moves_for(problem.device)
        if not travels.hops:
            return cls((), held, (), None, None, None, moves)
        table = QueryTables.of(meta, problem.window, between)
        outgoing = torch.split(table.outgoing, list(table.sent))
        ranks = np.arange(size)

        def buffer(name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
            return transport.arena.buffer(name, (rows, problem.q_heads, width), dtype, problem.device)

        there, back, hops = [], [], []
        for number, hop in enumerate(travels.hops):
            owner, source, turn = (rank + hop) % size, (rank - hop) % size, number % 2
            many_out, many_in = int(between[rank, owner]), int(between[source, rank])
            # As large on every rank.
            most = int(between[ranks, (ranks + hop) % size].max())
            message = buffer(f"queries out {turn}", most, problem.head_dim, problem.dtype)
            queries = buffer(f"queries in {turn}", many_in, problem.head_dim, problem.dtype)
            sent = buffer(f"results sent {turn}", most, problem.v_head_dim + 1, problem.merge_dtype)
            received = buffer(f"results received {turn}", many_out, problem.v_head_dim + 1, problem.merge_dtype)
            of_queries = transport.prepare_rows_to(queries, message, hop, many_out, many_in)
            of_results = transport.prepare_rows_to(received, sent, -hop, many_in, many_out)
            if of_queries is None or of_results is None:
                return None
            there.append(of_queries._replace(fill_missing=partial(message.fill_, torch.nan)))
            back.append(of_results._replace(fill_missing=partial(sent.fill_, torch.nan)))
            spans = needed_source_spans(meta, problem.window, [source], paged) if many_in else []
            hops.append(_Hop(message, outgoing[owner], queries, spans, sent[:many_in], received))
        # In each hop the queries of the next one set out before the results of this one go back.
        in_turn = [transfer for pair in zip(there[1:], back, strict=False) for transfer in pair]
        own = buffer("queries", problem.rows, problem.head_dim, problem.dtype)
        returned = ReturnedRows.of(setup, "results of an owner", 1)
        return cls((there[0], *in_turn, back[-1]), held, tuple(hops), own, table.numbers, returned, moves)

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        keys = self.held.keys.keys(io)
        if self.own is not None:
            self.own.copy_(io.q)
        arriving = self._send(io, 0)
        self.held.attend(keys, io, attend)
        returning: Work | None = None
        for number, hop in enumerate(self.hops):
            assert arriving is not None
            arriving.wait()
            arriving = self._send(io, number + 1)
            result = attend.others(hop.queries, keys, hop.spans)
            if returning is not None:
                self._merge(returning, self.hops[number - 1], attend)
            put_in(hop.sent, *result)
            returning = io.start()
        if returning is not None:
            self._merge(returning, self.hops[-1], attend)

    def _send(self, io: IO, number: int) -> Work | None:
        """Queries of a hop; None behind the last."""
        if number == len(self.hops):
            return None
        message, rows, *_ = self.hops[number]
        if len(rows):
            assert self.own is not None  # of which they are
            self.moves.gather_rows(message[: len(rows)], self.own, rows)
        return io.start()

    def _merge(self, returning: Work, hop: _Hop, attend: Attend) -> None:
        """The results of a hop."""
        returning.wait()
        if len(hop.rows):
            assert self.returned is not None
            assert self.numbers is not None  # as some queries go out
            self.moves.gather_rows(self.returned.flat, hop.received, self.numbers[: len(hop.rows)], hop.rows)
            attend.merge(*self.returned.partials)
