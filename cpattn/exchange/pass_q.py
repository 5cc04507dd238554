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

from cpattn.exchange.message import message_buffer
from cpattn.exchange.own_keys import own_rows, prefix_step, read_shard_, write_own
from cpattn.exchange.ring import num_merges, shard_alignments, why_not_shards
from cpattn.exchange.step_rows import gathered_source_spans, source_spans
from cpattn.exchange.strategy import ExchangeInputs, ExchangeSizes, Partials, Step, Steps, Strategy
from cpattn.keys import Keys
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transport import Transfer, Transport


def _gather_transfers(sizes: ExchangeSizes, meta: CPMetadata, communicator: Transport) -> list[Transfer]:
    if communicator.size == 1:
        return []
    return [_gathered_queries(sizes, communicator).transfer, _all_results(sizes, communicator).transfer]


def _gather_steps(inputs: ExchangeInputs, meta: CPMetadata, in_flight: InFlight) -> Steps:
    communicator, sizes = in_flight.transport, inputs.sizes
    keys = _keys_at_hand(inputs, meta, communicator)
    gathering = _gathered_queries(sizes, communicator)
    work = None
    if communicator.size > 1:
        gathering.own.copy_(inputs.q)
        work = in_flight.start()
    prefix = prefix_step(inputs, meta, communicator)
    if prefix is not None:
        yield prefix
    yield Step(keys, source_spans(meta, inputs.window, keys.page_table is not None)[meta.cp_rank])
    if work is None:
        return
    work.wait()
    result = yield Step(keys, gathered_source_spans(meta, inputs.window, keys.page_table is not None), q=gathering.all)
    assert result is not None  # a step with q is answered
    results = _all_results(sizes, communicator)
    results.sent.put(*result)
    in_flight.start().wait()
    yield results.received.partials


def _ring_transfers(sizes: ExchangeSizes, meta: CPMetadata, communicator: Transport) -> list[Transfer]:
    """In each hop the queries of the next one set out before the results of this one go back."""
    if communicator.size == 1:
        return []
    _, shifts = _hop_queries(sizes, communicator)
    returns = [_hop_results(sizes, communicator, hop).transfer for hop in range(1, communicator.size)]
    return [shifts[0], *(transfer for pair in zip(shifts[1:], returns, strict=False) for transfer in pair), returns[-1]]


def _ring_steps(inputs: ExchangeInputs, meta: CPMetadata, in_flight: InFlight) -> Steps:
    communicator, sizes, cp_size = in_flight.transport, inputs.sizes, meta.plan.cp_size
    keys = _keys_at_hand(inputs, meta, communicator)
    spans = source_spans(meta, inputs.window, keys.page_table is not None)
    queries, _ = _hop_queries(sizes, communicator) if cp_size > 1 else ([], [])
    if queries:
        queries[0].copy_(inputs.q)
    returning = None
    for hop in range(cp_size):
        source = (meta.cp_rank - hop) % cp_size
        shift = in_flight.start() if hop + 1 < cp_size else None
        if hop == 0:
            prefix = prefix_step(inputs, meta, communicator)
            if prefix is not None:
                yield prefix
            yield Step(keys, spans[source])
        else:
            result = yield Step(keys, spans[source], q=queries[hop % 2])
            assert result is not None  # a step with q is answered
            if returning is not None:
                work, received = returning
                work.wait()
                yield received.partials
            results = _hop_results(sizes, communicator, hop)
            results.sent.put(*result)
            returning = in_flight.start(), results.received
        if shift is not None:
            shift.wait()
    if returning is not None:
        work, received = returning
        work.wait()
        yield received.partials


def _keys_at_hand(inputs: ExchangeInputs, meta: CPMetadata, communicator: Transport) -> Keys:
    """K and V that this rank holds."""
    cache, kv = inputs.cache, inputs.format
    if not (meta.plan.sharded and isinstance(cache, PagedKV)):
        return Keys(*own_rows(inputs, meta, communicator))
    write_own(cache, inputs, meta)
    if inputs.reads_pages:
        return Keys(*kv.pair(cache.k_pages, cache.v_pages), cache.page_table)
    shard = message_buffer(communicator, "shard", kv, meta.plan.largest_shard)
    read_shard_(shard, cache, meta)
    return Keys(*shard.pair)


class _Queries(NamedTuple):
    """Memory for all ranks' queries ``[cp_size * rows, Hq, D]``, this rank's part of it, and the transfer of the others'."""

    all: Tensor
    own: Tensor
    transfer: Transfer


def _gathered_queries(sizes: ExchangeSizes, communicator: Transport) -> _Queries:
    shape, kv = sizes.q_shape, sizes.format

    def make() -> _Queries:
        queries = communicator.buffer("queries", (communicator.size, *shape), kv.dtype, kv.device)
        own = queries[communicator.rank]
        transfer = communicator.prepare_all_gather(queries, own)._replace(fill_missing=partial(own.fill_, torch.nan))
        return _Queries(queries.flatten(0, 1), own, transfer)

    return communicator.reuse("queries", (shape, kv.dtype, kv.device), kv.device, make)


def _hop_queries(sizes: ExchangeSizes, communicator: Transport) -> tuple[list[Tensor], list[Transfer]]:
    """The two buffers that take turns: what is there, and what is on its way; and each hop's transfer from one to the other."""
    shape, kv = sizes.q_shape, sizes.format

    def make() -> tuple[list[Tensor], list[Transfer]]:
        queries = [communicator.buffer(f"queries {n}", shape, kv.dtype, kv.device) for n in range(2)]
        turns = [communicator.prepare_shift(queries[1 - n], queries[n]) for n in range(2)]
        transfers = [turns[hop % 2] for hop in range(communicator.size - 1)]
        # All that comes later was received.
        transfers[0] = transfers[0]._replace(fill_missing=partial(queries[0].fill_, torch.nan))
        return queries, transfers

    return communicator.reuse("hop queries", (shape, kv.dtype, kv.device), kv.device, make)


class _Results(NamedTuple):
    """A message of results ``[ranks, rows, Hq, Dv + 1]``: out, and LSE in the last column.

    Attributes:
        out, lse: its parts with the rows of all ranks on one axis; partials: with an axis of ranks.
    """

    message: Tensor
    out: Tensor
    lse: Tensor
    partials: Partials

    def put(self, out: Tensor, lse: Tensor) -> None:
        self.out.copy_(out)
        self.lse.copy_(lse)


class _Exchange(NamedTuple):
    """Memory for results that are sent and that are received, and the transfer."""

    sent: _Results
    received: _Results
    transfer: Transfer


def _all_results(sizes: ExchangeSizes, communicator: Transport) -> _Exchange:
    """Each rank's results to where its queries came from, between all ranks at once."""
    return _results("results", communicator.size, sizes, communicator)


def _hop_results(sizes: ExchangeSizes, communicator: Transport, hop: int) -> _Exchange:
    """The results of one hop, back to where its queries came from; two hops' memory takes turns."""
    return _results(f"results {hop % 2}", 1, sizes, communicator, shift=-hop)


def _results(name: str, ranks: int, sizes: ExchangeSizes, communicator: Transport, shift: int | None = None) -> _Exchange:
    kv = sizes.format
    # Results stay fp32 until all are merged.
    dtype = torch.promote_types(kv.dtype, torch.float32)
    shape = ranks, *sizes.q_shape[:2], kv.v_head_dim + 1

    def make() -> _Exchange:
        both = []
        for end in ("sent", "received"):
            message = communicator.buffer(f"{name} {end}", shape, dtype, kv.device)
            flat = message.flatten(0, 1)
            both.append(_Results(message, flat[..., :-1], flat[..., -1], Partials(message[..., :-1], message[..., -1])))
        sent, received = both
        if shift is None:
            transfer = communicator.prepare_all_to_all(received.message, sent.message)
        else:
            transfer = communicator.prepare_shift(received.message, sent.message, by=shift)
        return _Exchange(sent, received, transfer._replace(fill_missing=partial(sent.message.fill_, torch.nan)))

    return communicator.reuse(name if shift is None else f"{name} by {shift}", (shape, dtype, kv.device), kv.device, make)


def _why_not(meta: CPMetadata, cache: PackedKV | PagedKV | None, window: int | None) -> str | None:
    if isinstance(cache, PagedKV) and not meta.plan.sharded:
        return "it moves no keys, and pages that every rank holds whole want all of them; shard the cache (prefix_shards)"
    return why_not_shards(meta, cache, window)


PASS_Q = Strategy(
    name="pass_q",
    transfers=_gather_transfers,
    steps=_gather_steps,
    num_steps=num_merges,
    alignments=shard_alignments,
    why_not=_why_not,
)
PASS_Q_RING = Strategy(
    name="pass_q_ring",
    transfers=_ring_transfers,
    steps=_ring_steps,
    num_steps=num_merges,
    alignments=shard_alignments,
    why_not=_why_not,
)
