"""Strategies ``pass_q`` and ``pass_q_ring``: queries travel and keys stay; partial results go back to the queries' owner.

Yang et al., Context Parallelism for Scalable Million-Token Inference, arXiv:2411.01783 (pass-Q). Each rank attends to
what it holds: its shard of a sharded cache, and its new tokens. What goes over the wire does not grow with the context.

``pass_q``, for few queries (decode): one all-gather of the queries, one launch over those of all other ranks, one
exchange of ``(out, LSE)``; the rank's own queries are computed while the others' arrive.
``pass_q_ring``, for many (prefill): queries go around as keys do in a ring; each hop is computed while the next one's
queries and the last one's results are in flight. It holds two ranks' queries and results instead of everyone's.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.keys_at_hand import OwnKeys, OwnShard, Prefixes
from cpattn.exchange.message import message_buffer
from cpattn.exchange.ring import prefix_hop, shard_hop, why_not_shards
from cpattn.exchange.schedule import Hop, Schedule, sends
from cpattn.exchange.step_spans import gathered_source_spans, source_spans
from cpattn.exchange.strategy import IO, Setup, Strategy
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem
from cpattn.spans import Alignment, Spans
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport


def _gather_schedule(problem: Problem, plan: Layout) -> Schedule:
    others = plan.cp_size - 1
    queries, results = (sends(problem, plan, others * problem.rows * row) for row in (problem.query_bytes, problem.result_bytes))
    own = shard_hop(problem, plan, 0, 0, queries)
    if not others:
        return (*prefix_hop(problem, plan), own)
    alignment: Alignment = "full" if problem.window is None else "any"
    return (*prefix_hop(problem, plan), own, Hop("others", 0, alignment, others * own.results, results))


class _PassQ(NamedTuple):
    """
    Attributes:
        own_spans: this rank's queries over its own keys, launch after launch; spans: all other ranks' queries, rank after rank.
        queries: memory for all ranks' queries ``[cp_size * rows, Hq, D]``; own: this rank's part of it. None for one rank.
    """

    transfers: tuple[Transfer, ...]
    keys: OwnKeys | OwnShard
    prefixes: Prefixes | None
    own_spans: list[Spans]
    spans: list[Spans]
    queries: Tensor | None
    own: Tensor | None
    sent: _Results | None
    received: _Results | None


def _prepare_gather(setup: Setup) -> _PassQ:
    problem, meta, transport = setup.problem, setup.meta, setup.transport
    is_paged = _attends_to_pages(setup)
    own_spans = source_spans(meta, problem.window, is_paged)[meta.cp_rank]
    keys, prefixes = _keys_at_hand(setup), Prefixes.of(setup)
    if transport.size == 1:
        return _PassQ((), keys, prefixes, own_spans, [], None, None, None, None)
    shape = transport.size, problem.rows, problem.q_heads, problem.head_dim
    queries = transport.arena.buffer("queries", shape, problem.dtype, problem.device)
    own = queries[transport.rank]
    sent, received = (_Results.of(setup, f"results {end}", transport.size) for end in ("sent", "received"))
    gather = transport.prepare_all_gather(queries, own)._replace(fill_missing=partial(own.fill_, torch.nan))
    exchange = transport.prepare_all_to_all(received.message, sent.message)
    exchange = exchange._replace(fill_missing=partial(sent.message.fill_, torch.nan))
    return _PassQ(
        transfers=(gather, exchange),
        keys=keys,
        prefixes=prefixes,
        own_spans=own_spans,
        spans=gathered_source_spans(meta, problem.window, is_paged),
        queries=queries.flatten(0, 1),
        own=own,
        sent=sent,
        received=received,
    )


def _forward_gather(held: _PassQ, io: IO, attend: Attend) -> None:
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
    hops = []
    for hop in range(plan.cp_size):
        # The queries of the next hop set out before it; its own results go back after it.
        sent = queries * (hop + 1 < plan.cp_size) + results * (hop > 0)
        hops.append(shard_hop(problem, plan, hop, 0, sends(problem, plan, sent)))
    return (*prefix_hop(problem, plan), *hops)


class _PassQRing(NamedTuple):
    """
    Attributes:
        spans: of each hop its launches.
        queries: two buffers ``[rows, Hq, D]`` that take turns: what is there, and what is on its way.
        sent, received: results, of two hops each, that take turns.
    """

    transfers: tuple[Transfer, ...]
    keys: OwnKeys | OwnShard
    prefixes: Prefixes | None
    spans: list[list[Spans]]
    queries: tuple[Tensor, ...]
    sent: tuple[_Results, ...]
    received: tuple[_Results, ...]


def _prepare_ring(setup: Setup) -> _PassQRing:
    problem, meta, transport = setup.problem, setup.meta, setup.transport
    size = transport.size
    by_source = source_spans(meta, problem.window, _attends_to_pages(setup))
    spans = [by_source[(meta.cp_rank - hop) % size] for hop in range(size)]
    keys, prefixes = _keys_at_hand(setup), Prefixes.of(setup)
    if size == 1:
        return _PassQRing((), keys, prefixes, spans, (), (), ())
    shape = problem.rows, problem.q_heads, problem.head_dim
    queries = tuple(transport.arena.buffer(f"queries {n}", shape, problem.dtype, problem.device) for n in range(2))
    sent, received = (tuple(_Results.of(setup, f"results {n} {end}", 1) for n in range(2)) for end in ("sent", "received"))
    shifts = [_shift_queries(transport, queries, hop) for hop in range(size - 1)]
    returns = [_return_results(transport, sent[hop % 2], received[hop % 2], hop) for hop in range(1, size)]
    # In each hop the queries of the next one set out before the results of this one go back.
    in_turn = [transfer for pair in zip(shifts[1:], returns, strict=False) for transfer in pair]
    return _PassQRing((shifts[0], *in_turn, returns[-1]), keys, prefixes, spans, queries, sent, received)


def _shift_queries(transport: Transport, queries: tuple[Tensor, ...], hop: int) -> Transfer:
    transfer = transport.prepare_shift(queries[1 - hop % 2], queries[hop % 2])
    # All that comes later was received.
    return transfer if hop else transfer._replace(fill_missing=partial(queries[0].fill_, torch.nan))


def _return_results(transport: Transport, sent: _Results, received: _Results, hop: int) -> Transfer:
    transfer = transport.prepare_shift(received.message, sent.message, by=-hop)
    return transfer._replace(fill_missing=partial(sent.message.fill_, torch.nan))


def _forward_ring(held: _PassQRing, io: IO, attend: Attend) -> None:
    keys = held.keys.keys(io)
    if held.queries:
        held.queries[0].copy_(io.q)
    returning = None
    for hop, launches in enumerate(held.spans):
        arriving = io.start() if hop + 1 < len(held.spans) else None
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
    return setup.problem.cache == "paged" and setup.meta.plan.sharded and setup.reads_pages


def _keys_at_hand(setup: Setup) -> OwnKeys | OwnShard:
    """What this rank holds."""
    plan = setup.meta.plan
    if not (plan.sharded and setup.problem.cache == "paged"):
        return OwnKeys.of(setup)
    copy = None if setup.reads_pages else message_buffer(setup.transport.arena, "shard", setup.kv, plan.largest_shard)
    return OwnShard.of(setup, copy)


class _Results(NamedTuple):
    """A message of results ``[ranks, rows, Hq, Dv + 1]``: out, and LSE in the last column.

    Attributes:
        out, lse: its parts with the rows of all ranks on one axis; partials: with an axis of ranks.
    """

    message: Tensor
    out: Tensor
    lse: Tensor
    partials: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, setup: Setup, name: str, ranks: int) -> _Results:
        problem = setup.problem
        shape = ranks, problem.rows, problem.q_heads, problem.v_head_dim + 1
        message = setup.transport.arena.buffer(name, shape, problem.merge_dtype, problem.device)
        flat = message.flatten(0, 1)
        return cls(message, flat[..., :-1], flat[..., -1], (message[..., :-1], message[..., -1]))

    def put(self, out: Tensor, lse: Tensor) -> None:
        """Fills the message."""
        self.out.copy_(out)
        self.lse.copy_(lse)


def _why_not(problem: Problem, plan: Layout) -> str | None:
    if problem.cache == "paged" and not plan.sharded:
        return "it moves no keys, and pages that every rank holds whole want all of them; shard the cache (prefix_shards)"
    return why_not_shards(problem, plan)


_TRAVELS = "queries, and partial outputs back"
PASS_Q = Strategy("pass_q", _gather_schedule, _prepare_gather, _forward_gather, _why_not, _TRAVELS)
PASS_Q_RING = Strategy("pass_q_ring", _ring_schedule, _prepare_ring, _forward_ring, _why_not, _TRAVELS)
