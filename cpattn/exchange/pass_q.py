"""Strategies ``pass_q`` and ``pass_q_ring``: queries travel and keys stay; partial results go back to the queries' owner.

Yang et al., Context Parallelism for Scalable Million-Token Inference, arXiv:2411.01783 (pass-Q). Each rank attends to
what it holds: its shard of a sharded cache, and its new tokens. What goes over the wire does not grow with the context.

``pass_q``, for few queries (decode): one all-gather of the queries, one launch over those of all other ranks, one
exchange of ``(out, LSE)``; the rank's own queries are computed while the others' arrive.
``pass_q_ring``, for many (prefill): queries go around as keys do in a ring; each hop is computed while the next one's
queries and the last one's results are in flight. It holds two ranks' queries and results instead of everyone's.
Where few queries see keys of other ranks those alone travel: :mod:`cpattn.exchange.needed_pass_q`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.keys_at_hand import HeldShard, OwnKeys, OwnShard, Prefixes
from cpattn.exchange.message import KVFormat, message_buffer
from cpattn.exchange.needed_pass_q import Held, NeededPassQ, NeededPassQRing
from cpattn.exchange.new_keys_alone import NewKeysAlone, new_keys_alone_schedule, nothing_is_cached, prepare_new_keys_alone
from cpattn.exchange.page_rows import Places, write_rows
from cpattn.exchange.pass_q_with_new_keys import PassQWithNewKeys, brings_new_keys, new_keys_schedule
from cpattn.exchange.queries_and_keys import QueriesAndKeys
from cpattn.exchange.results import Results
from cpattn.exchange.ring import prefix_hop, shard_hop, why_not_shards
from cpattn.exchange.schedule import Hop, Schedule, sends
from cpattn.exchange.step_spans import gathered_source_spans, source_spans
from cpattn.exchange.strategy import IO, Setup, Strategy
from cpattn.exchange.striped_shard import StripedShard
from cpattn.exchange.traveling_queries import TravelingQueries, traveling_queries
from cpattn.exchange.wanted_rows import WantedRows
from cpattn.kv_cache import PagedKV
from cpattn.metadata.layout import Layout
from cpattn.metadata.striped_places import owned_places_by_rank
from cpattn.problem import Problem
from cpattn.spans import Alignment, Spans
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport


def _gather_schedule(problem: Problem, plan: Layout) -> Schedule:
    if brings_new_keys(problem, plan):
        return (new_keys_alone_schedule if nothing_is_cached(problem, plan) else new_keys_schedule)(problem, plan)
    others, travels = plan.cp_size - 1, traveling_queries(problem, plan)
    queries = travels.between.sum(axis=1) * problem.query_bytes
    results = travels.between.sum(axis=0) * problem.result_bytes
    own = shard_hop(problem, plan, 0, 0, queries)
    if travels.what == "nothing":
        return (*prefix_hop(problem, plan), own)
    alignment: Alignment = "full" if problem.window is None else "any"
    return (*prefix_hop(problem, plan), own, Hop("others", 0, alignment, others * own.results, results))


class GatheredQueries(NamedTuple):
    """
    Attributes:
        own_spans: this rank's queries over its own keys, launch after launch; spans: all other ranks' queries, rank after rank.
        queries: memory for all ranks' queries ``[cp_size * rows, Hq, D]``; own: this rank's part of it. None for one rank.
    """

    transfers: tuple[Transfer, ...]
    keys: OwnKeys | OwnShard | StripedShard | HeldShard
    prefixes: Prefixes | None
    own_spans: list[Spans]
    spans: list[Spans]
    queries: Tensor | None
    own: Tensor | None
    sent: Results | None
    received: Results | None

    @classmethod
    def of(
        cls,
        setup: Setup,
        keys: OwnKeys | OwnShard | StripedShard | HeldShard,
        prefixes: Prefixes | None,
        own_spans: list[Spans],
        spans: list[Spans],
    ) -> GatheredQueries:
        """Memory and transfers for it."""
        problem, transport = setup.problem, setup.transport
        if transport.size == 1:
            return cls((), keys, prefixes, own_spans, [], None, None, None, None)
        shape = transport.size, problem.rows, problem.q_heads, problem.head_dim
        queries = transport.arena.buffer("queries", shape, problem.dtype, problem.device)
        own = queries[transport.rank]
        sent, received = (Results.of(setup, f"results {end}", transport.size) for end in ("sent", "received"))
        gather = transport.prepare_all_gather(queries, own)._replace(fill_missing=partial(own.fill_, torch.nan))
        exchange = transport.prepare_all_to_all(received.message, sent.message)
        exchange = exchange._replace(fill_missing=partial(sent.message.fill_, torch.nan))
        return cls(
            transfers=(gather, exchange),
            keys=keys,
            prefixes=prefixes,
            own_spans=own_spans,
            spans=spans,
            queries=queries.flatten(0, 1),
            own=own,
            sent=sent,
            received=received,
        )


def _prepare_gather(setup: Setup) -> GatheredQueries | NeededPassQ | PassQWithNewKeys | WantedRows | NewKeysAlone:
    meta, window = setup.meta, setup.problem.window
    if brings_new_keys(setup.problem, meta.plan):
        return (prepare_new_keys_alone if nothing_is_cached(setup.problem, meta.plan) else PassQWithNewKeys.of)(setup)
    is_paged = _attends_to_pages(setup)
    travels, keys = traveling_queries(setup.problem, meta.plan), _keys_at_hand(setup)
    if travels.what != "all" and not isinstance(keys, StripedShard):
        needed = NeededPassQ.of(setup, Held.of(setup, keys, is_paged), travels, is_paged)
        if needed is not None:
            return needed
    own_spans = source_spans(meta, window, is_paged)[meta.cp_rank]
    others = gathered_source_spans(meta, window, is_paged)
    return GatheredQueries.of(setup, keys, Prefixes.of(setup), own_spans, others)


def _forward_gather(held: GatheredQueries | NeededPassQ | PassQWithNewKeys | WantedRows | NewKeysAlone, io: IO, attend: Attend) -> None:
    if isinstance(held, (NeededPassQ, PassQWithNewKeys, WantedRows, NewKeysAlone)):
        held.forward(io, attend)
    else:
        forward_gathered(held, io, attend)


def forward_gathered(held: GatheredQueries, io: IO, attend: Attend) -> None:
    """Makes one call."""
    keys = held.keys.keys(io)
    arriving = None
    if held.own is not None:
        held.own.copy_(io.q)
        arriving = io.start()
    if held.prefixes is not None:
        held.prefixes.attend(io, attend)
    for spans in held.own_spans:
        attend(keys, spans)
    if arriving is None or held.queries is None or held.sent is None or held.received is None:
        return
    arriving.wait()
    held.sent.put(*attend.others(held.queries, keys, held.spans))
    io.start().wait()
    attend.merge(*held.received.partials)


def _ring_schedule(problem: Problem, plan: Layout) -> Schedule:
    queries, results = problem.rows * problem.query_bytes, problem.rows * problem.result_bytes
    if plan.owner is None:
        travels = traveling_queries(problem, plan)
        if travels.what != "all":
            return (*prefix_hop(problem, plan), *_needed_hops(problem, plan, travels))
    else:
        # New keys and values travel beside them, to those who hold them.
        queries = problem.rows * problem.query_and_key_bytes
    hops = []
    for hop in range(plan.cp_size):
        # The queries of the next hop set out before it; its own results go back after it.
        sent = queries * (hop + 1 < plan.cp_size) + results * (hop > 0)
        hops.append(shard_hop(problem, plan, hop, 0, sends(problem, plan, sent)))
    return (*prefix_hop(problem, plan), *hops)


def _needed_hops(problem: Problem, plan: Layout, travels: TravelingQueries) -> Schedule:
    """Queries of the next hop set out before each, and its own results go back after it."""
    size, ranks = plan.cp_size, np.arange(plan.cp_size)
    hops, between = [0, *travels.hops], travels.between
    out = [between[ranks, (ranks + hop) % size] * problem.query_bytes for hop in travels.hops] + [sends(problem, plan, 0)]
    back = [sends(problem, plan, 0), *(between[(ranks - hop) % size, ranks] * problem.result_bytes for hop in travels.hops)]
    return [shard_hop(problem, plan, hop, 0, there + here) for hop, there, here in zip(hops, out, back, strict=True)]


class _NewTokens(NamedTuple):
    """Over a striped cache, new keys and values: they go around with the queries, past the ranks that hold them.

    Attributes:
        turns: two messages that take turns; none for one rank.
        places: of each hop where those that are there go in this rank's pages.
    """

    turns: tuple[QueriesAndKeys, ...]
    places: list[Places]
    kv: KVFormat

    @classmethod
    def of(cls, setup: Setup) -> _NewTokens | None:
        meta, size = setup.meta, setup.transport.size
        if meta.plan.owner is None:
            return None
        places = owned_places_by_rank(meta)
        turns = tuple(QueriesAndKeys.of(setup, f"queries and keys {n}") for n in range(2 if size > 1 else 0))
        return cls(turns, [places[(meta.cp_rank - hop) % size] for hop in range(size)], setup.kv)

    def write(self, io: IO, hop: int) -> None:
        """Those that are there in a hop."""
        assert isinstance(io.cache, PagedKV)
        k, v = (io.k, io.v) if hop == 0 else self.turns[hop % 2].new.parts
        write_rows(self.kv, io.cache, self.places[hop], k, v)


class _PassQRing(NamedTuple):
    """
    Attributes:
        new: what travels beside the queries, if anything does.
        spans: of each hop its launches.
        queries: two buffers ``[rows, Hq, D]`` that take turns: what is there, and what is on its way.
        sent, received: results, of two hops each, that take turns.
    """

    transfers: tuple[Transfer, ...]
    keys: OwnKeys | OwnShard | StripedShard
    prefixes: Prefixes | None
    new: _NewTokens | None
    spans: list[list[Spans]]
    queries: tuple[Tensor, ...]
    sent: tuple[Results, ...]
    received: tuple[Results, ...]


def _prepare_ring(setup: Setup) -> _PassQRing | NeededPassQRing:
    problem, meta, transport = setup.problem, setup.meta, setup.transport
    size, is_paged, keys = transport.size, _attends_to_pages(setup), _keys_at_hand(setup)
    if not isinstance(keys, StripedShard):
        travels = traveling_queries(problem, meta.plan)
        needed = NeededPassQRing.of(setup, Held.of(setup, keys, is_paged), travels, is_paged) if travels.what != "all" else None
        if needed is not None:
            return needed
    by_source = source_spans(meta, problem.window, is_paged)
    spans = [by_source[(meta.cp_rank - hop) % size] for hop in range(size)]
    prefixes, new = Prefixes.of(setup), _NewTokens.of(setup)
    if size == 1:
        return _PassQRing((), keys, prefixes, new, spans, (), (), ())
    if new is None:
        shape = problem.rows, problem.q_heads, problem.head_dim
        messages = queries = tuple(transport.arena.buffer(f"queries {n}", shape, problem.dtype, problem.device) for n in range(2))
        fill_missing: Callable[[], object] = partial(queries[0].fill_, torch.nan)
    else:
        messages, queries = tuple(turn.whole for turn in new.turns), tuple(turn.q for turn in new.turns)
        fill_missing = new.turns[0].fill_missing
    sent, received = (tuple(Results.of(setup, f"results {n} {end}", 1) for n in range(2)) for end in ("sent", "received"))
    shifts = [transport.prepare_shift(messages[1 - hop % 2], messages[hop % 2]) for hop in range(size - 1)]
    # All that comes later was received.
    shifts[0] = shifts[0]._replace(fill_missing=fill_missing)
    returns = [_return_results(transport, sent[hop % 2], received[hop % 2], hop) for hop in range(1, size)]
    # In each hop the queries of the next one set out before the results of this one go back.
    in_turn = [transfer for pair in zip(shifts[1:], returns, strict=False) for transfer in pair]
    return _PassQRing((shifts[0], *in_turn, returns[-1]), keys, prefixes, new, spans, queries, sent, received)


def _return_results(transport: Transport, sent: Results, received: Results, hop: int) -> Transfer:
    transfer = transport.prepare_shift(received.message, sent.message, by=-hop)
    return transfer._replace(fill_missing=partial(sent.message.fill_, torch.nan))


def _forward_ring(held: _PassQRing | NeededPassQRing, io: IO, attend: Attend) -> None:
    if isinstance(held, NeededPassQRing):
        held.forward(io, attend)
        return
    keys = held.keys.keys(io)
    if held.new is not None and held.new.turns:
        held.new.turns[0].put(io)
    elif held.queries:
        held.queries[0].copy_(io.q)
    returning = None
    for hop, launches in enumerate(held.spans):
        arriving = io.start() if hop + 1 < len(held.spans) else None
        if held.new is not None:
            held.new.write(io, hop)
        if hop == 0:
            if held.prefixes is not None:
                held.prefixes.attend(io, attend)
            for spans in launches:
                attend(keys, spans)
        else:
            result = attend.others(held.queries[hop % 2], keys, launches)
            if returning is not None:
                returning.wait()
                attend.merge(*held.received[(hop - 1) % 2].partials)
            held.sent[hop % 2].put(*result)
            returning = io.start()
        if arriving is not None:
            arriving.wait()
    if returning is not None:
        returning.wait()
        attend.merge(*held.received[(len(held.spans) - 1) % 2].partials)


def _attends_to_pages(setup: Setup) -> bool:
    plan = setup.meta.plan
    return setup.problem.cache == "paged" and plan.sharded and plan.owner is None and setup.reads_pages


def _keys_at_hand(setup: Setup) -> OwnKeys | OwnShard | StripedShard:
    """What this rank holds, or brings of a striped cache."""
    plan = setup.meta.plan
    if not (plan.sharded and setup.problem.cache == "paged"):
        return OwnKeys.of(setup)
    if plan.owner is not None:
        return StripedShard.of(setup, message_buffer(setup.transport.arena, "shard", setup.kv, plan.largest_shard))
    copy = None if setup.reads_pages else message_buffer(setup.transport.arena, "shard", setup.kv, plan.largest_shard)
    return OwnShard.of(setup, copy)


def _why_not(problem: Problem, plan: Layout) -> str | None:
    if problem.cache == "paged" and not plan.sharded:
        return (
            "it moves no keys, and pages that every rank holds whole want all of them; shard the cache (owner, prefix_ranks or "
            "prefix_shards of cpattn.plan)"
        )
    if plan.sharded and plan.knows_positions:
        return None
    return why_not_shards(problem, plan)


def _why_not_ring(problem: Problem, plan: Layout) -> str | None:
    if plan.sharded and problem.window is not None:
        return why_not_shards(problem, plan)
    if plan.owner is not None and problem.fixed:
        return "of a striped cache it attends to a copy, which changes in size from batch to batch, and a bucket's graph cannot"
    return _why_not(problem, plan)


_TRAVELS = "queries, and partial outputs back"
PASS_Q = Strategy("pass_q", _gather_schedule, _prepare_gather, _forward_gather, _why_not, _TRAVELS, stored=True, expands=True)
PASS_Q_RING = Strategy("pass_q_ring", _ring_schedule, _prepare_ring, _forward_ring, _why_not_ring, _TRAVELS, stored=True, expands=True)
