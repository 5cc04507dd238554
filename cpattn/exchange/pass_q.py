"""Strategies ``pass_q`` and ``pass_q_ring``: queries travel and keys stay; partial results go back to the queries' owner.

Yang et al., Context Parallelism for Scalable Million-Token Inference, arXiv:2411.01783 (pass-Q). Each rank attends to
what it holds: its shard of a sharded cache, and its new tokens. What goes over the wire does not grow with the context.

``pass_q``, for few queries (decode): one all-gather of the queries, one launch over those of all other ranks, one
exchange of ``(out, LSE)``; the rank's own queries are computed while the others' arrive.
``pass_q_ring``, for many (prefill): queries go around as keys do in a ring; each hop is computed while the next one's
queries and the last one's results are in flight. It holds two ranks' queries and results instead of everyone's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpattn.attention.rows import RaggedRows
from cpattn.exchange.communicator import Communicator
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
    queries = communicator.buffer("queries", (cp_size, *q.shape), q.dtype, q.device)
    gather = None
    if cp_size > 1:
        queries[meta.cp_rank].copy_(q)
        gather = communicator.all_gather(queries, queries[meta.cp_rank])
    prefix = prefix_step(inputs, meta, communicator)
    if prefix is not None:
        yield prefix
    yield Step(k, v, _over(inputs, source_rows(meta, inputs.window, paged)[meta.cp_rank], paged))
    if gather is None:
        return
    gather.wait()
    rows = gathered_source_rows(meta, inputs.window, paged)
    result = yield Step(k, v, _over(inputs, rows, paged), q=queries.flatten(0, 1))
    assert result is not None  # a step with q is answered
    send = _result_buffer("results sent", cp_size, inputs, communicator, *result)
    received = _result_buffer("results received", cp_size, inputs, communicator)
    communicator.all_to_all(received, send).wait()
    yield _partials(received)


def _ring_steps(inputs: ExchangeInputs, meta: CPMetadata, communicator: Communicator) -> Steps:
    q, cp_size = inputs.q, meta.plan.cp_size
    k, v, paged = _keys_at_hand(inputs, meta, communicator)
    rows = source_rows(meta, inputs.window, paged)
    queries = [communicator.buffer(f"queries {n}", q.shape, q.dtype, q.device) for n in range(2)] if cp_size > 1 else []
    if queries:
        queries[0].copy_(q)
    returning = None
    for hop in range(cp_size):
        source = (meta.cp_rank - hop) % cp_size
        shift = communicator.shift(queries[(hop + 1) % 2], queries[hop % 2]) if hop + 1 < cp_size else None
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
                yield _partials(received)
            send = _result_buffer(f"results sent {hop % 2}", 1, inputs, communicator, *result)
            received = _result_buffer(f"results received {hop % 2}", 1, inputs, communicator)
            returning = communicator.shift(received, send, by=-hop), received
        if shift is not None:
            shift.wait()
    if returning is not None:
        work, received = returning
        work.wait()
        yield _partials(received)


def _keys_at_hand(inputs: ExchangeInputs, meta: CPMetadata, communicator: Communicator) -> tuple[Tensor, Tensor, bool]:
    """K and V that this rank holds, and whether they are pages."""
    cache, kv = inputs.cache, inputs.format
    if not (meta.plan.sharded and isinstance(cache, PagedKV)):
        return *own_rows(inputs, meta, communicator), False
    write_own(cache, inputs, meta)
    if inputs.reads_pages:
        return *kv.pair(cache.k_pages, cache.v_pages), True
    shard = message_buffer(communicator, "shard", kv, meta.plan.largest_shard)
    read_shard_(shard, cache, inputs, meta)
    return *kv.split(shard), False


def _over(inputs: ExchangeInputs, rows: list[RaggedRows], paged: bool) -> list[RaggedRows]:
    if not paged:
        return rows
    assert isinstance(inputs.cache, PagedKV)
    return [launch.with_pages(inputs.cache.page_table, inputs.cache.page_size) for launch in rows]


def _result_buffer(
    name: str, ranks: int, inputs: ExchangeInputs, communicator: Communicator, out: Tensor | None = None, lse: Tensor | None = None
) -> Tensor:
    """A message of results, ``[ranks, rows, Hq, Dv + 1]``: out, and LSE in the last column; with those given in it."""
    rows, heads = inputs.q.shape[:2]
    # Results stay fp32 until all are merged.
    dtype = torch.promote_types(inputs.q.dtype, torch.float32)
    message = communicator.buffer(name, (ranks, rows, heads, inputs.format.v_head_dim + 1), dtype, inputs.q.device)
    if out is not None and lse is not None:
        flat = message.flatten(0, 1)
        flat[..., :-1] = out
        flat[..., -1] = lse
    return message


def _partials(message: Tensor) -> Partials:
    return Partials(message[..., :-1], message[..., -1])


def _why_not(meta: CPMetadata, cache: PackedKV | PagedKV | None, window: int | None) -> str | None:
    if isinstance(cache, PagedKV) and not meta.plan.sharded:
        return "it moves no keys, and pages that every rank holds whole want all of them; shard the cache (prefix_shards)"
    return why_not_shards(meta, cache, window)


PASS_Q = Strategy(name="pass_q", steps=_gather_steps, num_steps=num_merges, alignments=shard_alignments, why_not=_why_not)
PASS_Q_RING = Strategy(name="pass_q_ring", steps=_ring_steps, num_steps=num_merges, alignments=shard_alignments, why_not=_why_not)
