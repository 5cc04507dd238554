"""Strategies ``pass_q`` and ``pass_q_ring``: queries travel and keys stay; partial results go back to the queries' owner.

Yang et al., Context Parallelism for Scalable Million-Token Inference, arXiv:2411.01783 (pass-Q). Each rank attends to
what it holds: its shard of a sharded cache, and its new tokens. What goes over the wire does not grow with the context.

``pass_q``, for few queries (decode): one all-gather of the queries, one launch over those of all other ranks, one
exchange of ``(out, LSE)``; the rank's own queries are computed while the others' arrive.
``pass_q_ring``, for many (prefill): queries go around as keys do in a ring; each hop is computed while the next one's
queries and the last one's results are in flight. It holds two ranks' queries and results instead of everyone's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.attention.rows import RaggedRows
from cpattn.exchange.communicator import Communicator, Transfer
from cpattn.exchange.message import message_buffer
from cpattn.exchange.own_keys import own_rows, prefix_step, read_shard_, write_own
from cpattn.exchange.ring import num_merges, shard_alignments, why_not_shards
from cpattn.exchange.step_rows import gathered_source_rows, source_rows
from cpattn.exchange.strategy import ExchangeInputs, Partials, Step, Steps, Strategy
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata


def _gather_steps(inputs: ExchangeInputs, meta: CPMetadata, communicator: Communicator) -> Steps:
    q, cp_size = inputs.q, meta.plan.cp_size
    k, v, paged = _keys_at_hand(inputs, meta, communicator)
    gathering = _gathered_queries(inputs, communicator)
    work = None
    if cp_size > 1:
        gathering.own.copy_(q)
        work = communicator.start(gathering.transfer)
    prefix = prefix_step(inputs, meta, communicator)
    if prefix is not None:
        yield prefix
    yield Step(k, v, _over(inputs, source_rows(meta, inputs.window, paged)[meta.cp_rank], paged))
    if work is None:
        return
    work.wait()
    rows = gathered_source_rows(meta, inputs.window, paged)
    result = yield Step(k, v, _over(inputs, rows, paged), q=gathering.all)
    assert result is not None  # a step with q is answered
    send, received, transfer = _results("results", cp_size, inputs, communicator)
    send.put(*result)
    communicator.start(transfer).wait()
    yield received.partials


def _ring_steps(inputs: ExchangeInputs, meta: CPMetadata, communicator: Communicator) -> Steps:
    q, cp_size = inputs.q, meta.plan.cp_size
    k, v, paged = _keys_at_hand(inputs, meta, communicator)
    rows = source_rows(meta, inputs.window, paged)
    queries, shifts = _hop_queries(inputs, communicator) if cp_size > 1 else ([], [])
    if queries:
        queries[0].copy_(q)
    returning = None
    for hop in range(cp_size):
        source = (meta.cp_rank - hop) % cp_size
        shift = communicator.start(shifts[hop % 2]) if hop + 1 < cp_size else None
        if hop == 0:
            prefix = prefix_step(inputs, meta, communicator)
            if prefix is not None:
                yield prefix
            yield Step(k, v, _over(inputs, rows[source], paged))
        else:
            result = yield Step(k, v, _over(inputs, rows[source], paged), q=queries[hop % 2])
            assert result is not None  # a step with q is answered
            if returning is not None:
                work, received = returning
                work.wait()
                yield received.partials
            send, received, transfer = _results(f"results {hop % 2}", 1, inputs, communicator, -hop)
            send.put(*result)
            returning = communicator.start(transfer), received
        if shift is not None:
            shift.wait()
    if returning is not None:
        work, received = returning
        work.wait()
        yield received.partials


def _keys_at_hand(inputs: ExchangeInputs, meta: CPMetadata, communicator: Communicator) -> tuple[Tensor, Tensor, bool]:
    """K and V that this rank holds, and whether they are pages."""
    cache, kv = inputs.cache, inputs.format
    if not (meta.plan.sharded and isinstance(cache, PagedKV)):
        return *own_rows(inputs, meta, communicator), False
    write_own(cache, inputs, meta)
    if inputs.reads_pages:
        return *kv.pair(cache.k_pages, cache.v_pages), True
    shard = message_buffer(communicator, "shard", kv, meta.plan.largest_shard)
    read_shard_(shard, cache, meta)
    return *shard.pair, False


def _over(inputs: ExchangeInputs, rows: list[RaggedRows], paged: bool) -> list[RaggedRows]:
    if not paged:
        return rows
    assert isinstance(inputs.cache, PagedKV)
    return [launch.with_pages(inputs.cache.page_table, inputs.cache.page_size) for launch in rows]


class _Queries(NamedTuple):
    """Memory for all ranks' queries ``[cp_size * rows, Hq, D]``, this rank's part of it, and the transfer of the others'."""

    all: Tensor
    own: Tensor
    transfer: Transfer


def _gathered_queries(inputs: ExchangeInputs, communicator: Communicator) -> _Queries:
    q, size = inputs.q, communicator.size

    def make() -> _Queries:
        queries = communicator.buffer("queries", (size, *q.shape), q.dtype, q.device)
        own = queries[communicator.rank]
        return _Queries(queries.flatten(0, 1), own, communicator.prepare_all_gather(queries, own))

    return communicator.reuse("queries", (q.shape, q.dtype, q.device), q.device, make)


def _hop_queries(inputs: ExchangeInputs, communicator: Communicator) -> tuple[list[Tensor], list[Transfer]]:
    """The two buffers that take turns: what is there, and what is on its way; and the transfers from each to the other."""
    q = inputs.q

    def make() -> tuple[list[Tensor], list[Transfer]]:
        queries = [communicator.buffer(f"queries {n}", q.shape, q.dtype, q.device) for n in range(2)]
        return queries, [communicator.prepare_shift(queries[1 - n], queries[n]) for n in range(2)]

    return communicator.reuse("hop queries", (q.shape, q.dtype, q.device), q.device, make)


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


def _results(
    name: str, ranks: int, inputs: ExchangeInputs, communicator: Communicator, shift: int | None = None
) -> tuple[_Results, _Results, Transfer]:
    """Memory for results that are sent, for those that are received, and the transfer: a shift by so many ranks, or an
    exchange between all."""
    # Results stay fp32 until all are merged.
    dtype, device = torch.promote_types(inputs.q.dtype, torch.float32), inputs.q.device
    shape = ranks, *inputs.q.shape[:2], inputs.format.v_head_dim + 1

    def make() -> tuple[_Results, _Results, Transfer]:
        both = []
        for end in ("sent", "received"):
            message = communicator.buffer(f"{name} {end}", shape, dtype, device)
            flat = message.flatten(0, 1)
            both.append(_Results(message, flat[..., :-1], flat[..., -1], Partials(message[..., :-1], message[..., -1])))
        send, received = both
        if shift is None:
            return send, received, communicator.prepare_all_to_all(received.message, send.message)
        return send, received, communicator.prepare_shift(received.message, send.message, by=shift)

    return communicator.reuse(name if shift is None else f"{name} by {shift}", (shape, dtype, device), device, make)


def _why_not(meta: CPMetadata, cache: PackedKV | PagedKV | None, window: int | None) -> str | None:
    if isinstance(cache, PagedKV) and not meta.plan.sharded:
        return "it moves no keys, and pages that every rank holds whole want all of them; shard the cache (prefix_shards)"
    return why_not_shards(meta, cache, window)


PASS_Q = Strategy(name="pass_q", steps=_gather_steps, num_steps=num_merges, alignments=shard_alignments, why_not=_why_not)
PASS_Q_RING = Strategy(name="pass_q_ring", steps=_ring_steps, num_steps=num_merges, alignments=shard_alignments, why_not=_why_not)
