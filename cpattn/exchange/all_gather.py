"""Strategy ``all_gather``: every rank receives all K and V, puts them in order, and computes in one launch.

With pages their order is that of the pages: what is gathered is written to its slots, and attended to there.
With ``overlap`` above 1 this is done for so many groups of KV heads, one after another: all their transfers are started
at once, and the attention of the first group runs while the next is in flight.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, overload

from torch import Tensor

from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.exchange.own_keys import own_rows
from cpattn.exchange.step_rows import causal_spans
from cpattn.exchange.strategy import ExchangeInputs, ExchangeSizes, Step, Steps, Strategy
from cpattn.keys import Keys
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.plan import Plan
from cpattn.moves.moves import moves_for
from cpattn.spans import Alignment
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transport import Transfer, Transport, Work


def _is_alone(sizes: ExchangeSizes, meta: CPMetadata) -> bool:
    """Whether a rank's new keys are all that is missing, and no others have to be put in order with them."""
    return meta.plan.cp_size == 1 and (sizes.is_paged or not sizes.has_cache)


def _transfers(sizes: ExchangeSizes, meta: CPMetadata, communicator: Transport) -> list[Transfer]:
    if _is_alone(sizes, meta):
        return []
    return [gathered.transfer for gathered in gathered_buffers(communicator, sizes.group, meta, sizes.overlap)]


def _steps(inputs: ExchangeInputs, meta: CPMetadata, in_flight: InFlight) -> Steps:
    cache, communicator, moves = inputs.cache, in_flight.transport, moves_for(inputs.format.device)
    if _is_alone(inputs.sizes, meta):
        if isinstance(cache, PagedKV):
            moves.write_pages(cache.k_pages, cache.v_pages, cache.page_table, *meta.gathered_places, inputs.k, inputs.v)
            yield over_pages(cache, inputs.format, inputs.reads_pages, meta, communicator)
        else:
            yield Step(Keys(*own_rows(inputs, meta, communicator)), [causal_spans(meta, paged=False)])
        return
    groups, kv = inputs.sizes.overlap, inputs.sizes.group
    # None for all heads, which spares the slicing.
    group_heads = [None] if groups == 1 else [slice(group * kv.heads, (group + 1) * kv.heads) for group in range(groups)]
    all_gathered = gathered_buffers(communicator, kv, meta, groups)
    gathers = [
        start_gather(gathered, _heads_of(inputs.k, heads), _heads_of(inputs.v, heads), meta, in_flight)
        for gathered, heads in zip(all_gathered, group_heads, strict=True)
    ]
    for gathered, heads, gather in zip(all_gathered, group_heads, gathers, strict=True):
        if isinstance(cache, PackedKV):
            # One group's keys in order at a time: its attention has read them before the next group's take their place.
            ordered = message_buffer(communicator, "ordered", kv, meta.plan.num_tokens + meta.plan.num_prefix_tokens)
            moves.pack(ordered.whole, _heads_of(cache.k, heads), _heads_of(cache.v, heads), cache.k.shape[0], meta.prefix_key_rows)
        gather.wait()
        query_heads = None
        if heads is not None:
            queries_a_key = inputs.q.shape[1] // inputs.format.heads
            query_heads = slice(heads.start * queries_a_key, heads.stop * queries_a_key)
        if isinstance(cache, PagedKV):
            pages = cache
            if heads is not None:
                v_pages = None if cache.v_pages is None else cache.v_pages[:, :, heads]
                pages = PagedKV(cache.k_pages[:, :, heads], v_pages, cache.page_table)
            moves.write_pages(pages.k_pages, pages.v_pages, pages.page_table, *meta.gathered_places, *gathered.all.parts)
            yield over_pages(pages, kv, inputs.reads_pages, meta, communicator, query_heads)
            continue
        restore_index = meta.restore_index
        if cache is None:
            ordered = message_buffer(communicator, "ordered", kv, restore_index.shape[0])
        # From rank-major order to each request's prefix and extend in one piece, K and V at once.
        moves.gather_rows(ordered.whole, gathered.all.whole, restore_index, None if cache is None else meta.extend_key_rows)
        yield Step(Keys(*ordered.pair), [causal_spans(meta, paged=False)], query_heads)


@overload
def _heads_of(x: Tensor, heads: slice | None) -> Tensor: ...


@overload
def _heads_of(x: Tensor | None, heads: slice | None) -> Tensor | None: ...


def _heads_of(x: Tensor | None, heads: slice | None) -> Tensor | None:
    return x if x is None or heads is None else x[:, heads]


class Gathered(NamedTuple):
    """Memory for the K and V of all ranks, rank after rank, this rank's part of it, and the transfer that brings the others'."""

    all: Message
    own: Tensor
    transfer: Transfer


def gathered_buffers(communicator: Transport, kv: KVFormat, meta: CPMetadata, groups: int = 1) -> list[Gathered]:
    """Reused memory for ``groups`` groups of KV heads; ``kv`` is of one of them."""
    all_rows = communicator.size * meta.rows

    def make() -> list[Gathered]:
        # Group after group, so that each is one message: [groups, rows of all ranks, heads of a group, width].
        buffer = communicator.buffer("gathered", (groups, all_rows, kv.heads, kv.width), kv.dtype, kv.device)
        owns = [gathered.narrow(0, communicator.rank * meta.rows, meta.rows) for gathered in buffer]
        transfers = [communicator.prepare_all_gather(gathered, own) for gathered, own in zip(buffer, owns, strict=True)]
        return [
            Gathered(Message.of(gathered, kv), own, transfer._replace(fill_missing=partial(kv.fill_missing_, own)))
            for gathered, own, transfer in zip(buffer, owns, transfers, strict=True)
        ]

    return communicator.reuse("gathered", (kv, all_rows, groups), kv.device, make)


def start_gather(gathered: Gathered, k: Tensor, v: Tensor | None, meta: CPMetadata, in_flight: InFlight) -> Work:
    """Starts to bring every rank's K and V together, which is the transfer that comes next."""
    # The message is packed where the gather would put it, which spares a copy of it.
    moves_for(k.device).pack(gathered.own, k, v, meta.num_tokens if meta.bucket is None else meta.token_count)
    return in_flight.start()


def over_pages(
    pages: PagedKV, kv: KVFormat, reads_pages: bool, meta: CPMetadata, communicator: Transport, heads: slice | None = None
) -> Step:
    """All keys where they lie in the pages, or a copy of them in order for a backend that can not read those."""
    if reads_pages:
        return Step(Keys(*kv.pair(pages.k_pages, pages.v_pages), pages.page_table), [causal_spans(meta, paged=True)], heads)
    ordered = message_buffer(communicator, "ordered", kv, meta.plan.num_tokens + meta.plan.num_prefix_tokens)
    moves_for(kv.device).read_pages(pages.k_pages, pages.v_pages, pages.page_table, *meta.key_places, *ordered.parts)
    return Step(Keys(*ordered.pair), [causal_spans(meta, paged=False)], heads)


def _why_not(meta: CPMetadata, cache: PackedKV | PagedKV | None, window: int | None) -> str | None:
    if meta.plan.sharded:
        return "it would bring the whole of a sharded cache to every rank"
    return None


def _alignments(plan: Plan, window: int | None, fixed: bool = False) -> frozenset[Alignment]:
    return frozenset({"bottom_right"})


ALL_GATHER = Strategy(
    name="all_gather",
    transfers=_transfers,
    steps=_steps,
    num_steps=lambda plan, window, fixed=False: 1,
    alignments=_alignments,
    why_not=_why_not,
)
