"""Strategy ``ring``: K and V travel from rank to rank; each hop is computed while the next is in flight (pass-KV).

Liu et al., Ring Attention with Blockwise Transformers, arXiv:2310.01889. Memory for keys stays at two messages.
Prefixes that every rank has are a step of their own. Of a sharded cache each rank's shard travels with its new tokens.
"""

from __future__ import annotations

from functools import partial

from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.exchange.own_keys import own_rows, prefix_step, read_shard_, write_own
from cpattn.exchange.step_rows import launches_per_shard, shard_spans
from cpattn.exchange.strategy import ExchangeInputs, ExchangeSizes, Step, Steps, Strategy
from cpattn.keys import Keys
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.plan import Plan
from cpattn.moves.moves import moves_for
from cpattn.spans import Alignment
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transport import Transfer, Transport


def _transfers(sizes: ExchangeSizes, meta: CPMetadata, communicator: Transport) -> list[Transfer]:
    return _hop_buffers(communicator, sizes.format, meta)[1]


def _steps(inputs: ExchangeInputs, meta: CPMetadata, in_flight: InFlight) -> Steps:
    communicator, cp_size, rank = in_flight.transport, int(meta.plan.cp_size), meta.cp_rank
    pages = inputs.cache if isinstance(inputs.cache, PagedKV) else None
    sharded = pages if meta.plan.sharded else None
    spans, moves = shard_spans(meta, inputs.window), moves_for(inputs.format.device)
    messages, _ = _hop_buffers(communicator, inputs.format, meta)
    if sharded:
        write_own(sharded, inputs, meta)
        read_shard_(messages[0], sharded, meta)
        hop_keys = messages[0].pair
    else:
        if cp_size > 1:
            moves.pack(messages[0].whole, inputs.k, inputs.v, meta.num_tokens if meta.bucket is None else meta.token_count)
        hop_keys = own_rows(inputs, meta, communicator)
    places = [] if pages is None or sharded else meta.gathered_places_by_rank
    for hop in range(cp_size):
        owner = (rank - hop) % cp_size
        shift = in_flight.start() if hop + 1 < cp_size else None
        if hop == 0:
            prefix = prefix_step(inputs, meta, communicator)
            if prefix is not None:
                yield prefix
        if pages is not None and not sharded:
            # Every rank holds every token: what passes by is written, too.
            k, v = (inputs.k, inputs.v) if hop == 0 else messages[hop % 2].parts
            moves.write_pages(pages.k_pages, pages.v_pages, pages.page_table, *places[owner], k, v)
        yield Step(Keys(*hop_keys), spans[owner])
        if shift is not None:
            shift.wait()
        hop_keys = messages[(hop + 1) % 2].pair


def _hop_buffers(communicator: Transport, kv: KVFormat, meta: CPMetadata) -> tuple[list[Message], list[Transfer]]:
    """The two messages that take turns: what is there, and what is on its way; and each hop's transfer from one to the other."""
    cp_size = meta.plan.cp_size
    rows = meta.plan.largest_shard if meta.plan.sharded else meta.rows if cp_size > 1 else 0

    def make() -> tuple[list[Message], list[Transfer]]:
        messages = [message_buffer(communicator, f"ring {n}", kv, rows) for n in range(2)]
        turns = [communicator.prepare_shift(messages[1 - n].whole, messages[n].whole) for n in range(2)]
        transfers = [turns[hop % 2] for hop in range(cp_size - 1)]
        if transfers:
            # All that comes later was received.
            transfers[0] = transfers[0]._replace(fill_missing=partial(kv.fill_missing_, messages[0].whole))
        return messages, transfers

    return communicator.reuse("ring", (kv, rows), kv.device, make)


def num_merges(plan: Plan, window: int | None, fixed: bool = False) -> int:
    """Results that are merged for a query where each shard gives one (with a window several), and whole prefixes another.
    Where the batch is to change under a captured graph, one without a prefix may be followed by one that has some."""
    whole_prefixes = not plan.sharded and (fixed or bool(plan.prefix_lens.any()))
    return plan.cp_size * launches_per_shard(plan, window) + whole_prefixes


def shard_alignments(plan: Plan, window: int | None, fixed: bool = False) -> frozenset[Alignment]:
    """Of the rows over all shards and whole prefixes."""
    if window is not None:
        return frozenset({"any"})
    return frozenset({"bottom_right"} if num_merges(plan, window, fixed) == 1 else {"bottom_right", "full"})


def why_not_shards(meta: CPMetadata, cache: PackedKV | PagedKV | None, window: int | None) -> str | None:
    """What no strategy can serve that takes one rank's shard at a time."""
    if meta.plan.sharded and window is not None:
        return "a sharded cache does not know its tokens' positions, which a window needs"
    if meta.plan.is_callers and meta.bucket is not None and window is not None:
        # A launch for each chunk that an owner has of a request.
        return "with a window its launches over a partition of your own change in number from batch to batch, and a bucket's graph can not"
    return None


def _why_not(meta: CPMetadata, cache: PackedKV | PagedKV | None, window: int | None) -> str | None:
    if meta.plan.sharded and meta.bucket is not None:
        return "the shards that travel change in size from batch to batch, and a bucket's graph can not"
    return why_not_shards(meta, cache, window)


RING = Strategy(name="ring", transfers=_transfers, steps=_steps, num_steps=num_merges, alignments=shard_alignments, why_not=_why_not)
