"""Strategy ``ring``: keys and values go around, and each rank computes on what it has while the next is in flight.

Liu et al., Ring Attention, arXiv:2310.01889; with zigzag chunks every hop is about as much work on every rank. Of a
sharded cache each rank's shard travels; whole prefixes stay where they are, and are computed first. Where few keys are needed they come
straight from their owners: :mod:`cpattn.exchange.straight_ring`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.keys_at_hand import OwnKeys, OwnShard, Prefixes
from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.exchange.page_rows import Places, write_rows
from cpattn.exchange.ring_keys import message_rows, ring_keys
from cpattn.exchange.schedule import Hop, Schedule, sends
from cpattn.exchange.step_spans import launches_per_shard, shard_spans
from cpattn.exchange.straight_ring import StraightRing
from cpattn.exchange.strategy import IO, Setup, Strategy
from cpattn.exchange.striped_shard import StripedShard
from cpattn.kv_cache import PagedKV
from cpattn.metadata.batch import IntArray
from cpattn.metadata.layout import Layout
from cpattn.metadata.striped_places import new_rows_in_shards, owned_places_by_rank
from cpattn.moves.moves import Moves, moves_for
from cpattn.problem import Problem
from cpattn.spans import Alignment, Spans
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport

GAPS = "between its neighbours in a shard a token's positions have gaps, so that no window is a range of keys there"
UNKNOWN_POSITIONS = (
    "prefix_shards say how many tokens each rank holds, but not which, and a window needs their positions: pass prefix_ranks in their place"
)


def _schedule(problem: Problem, plan: Layout) -> Schedule:
    travels = ring_keys(problem, plan)
    # A hop's keys set out before the one before it; without any row, nothing does.
    sent = [*(travels.sent * problem.key_bytes * bool(problem.rows)), sends(problem, plan, 0)]
    hops = [shard_hop(problem, plan, 0, hop, of_next) for hop, of_next in zip((0, *travels.hops), sent, strict=True)]
    return (*prefix_hop(problem, plan), *hops)


def prefix_hop(problem: Problem, plan: Layout) -> Schedule:
    """Over whole prefixes, where there are any. Where the batch is to change under a captured graph, one without a prefix may
    be followed by one that has some."""
    if plan.sharded or not (problem.fixed or plan.num_prefix_tokens):
        return ()
    alignment: Alignment = "full" if problem.window is None else "any"
    return (Hop(queries=0, keys="prefix", alignment=alignment, results=1, sent=sends(problem, plan, 0)),)


def shard_hop(problem: Problem, plan: Layout, queries: int, keys: int, sent: IntArray) -> Hop:
    """Over the shard of one rank; with a window it may take several launches."""
    own = queries == keys
    alignment: Alignment = "any" if problem.window is not None else "bottom_right" if own else "full"
    return Hop(queries, keys, alignment, launches_per_shard(plan, problem.window, problem.fixed), sent)


class _Ring(NamedTuple):
    """
    Attributes:
        transfers: of each hop but the last, from one message to the other.
        messages: two that take turns: what is there, and what is on its way.
        prefixes: that stay where they are, if there are any.
        shard: what this rank holds of a sharded cache, which is what travels then; None if its new tokens travel.
        own: this rank's new tokens.
        spans: of each hop its launches.
        places: of each hop where the new keys at hand go in pages that every rank has whole, or in those of a striped cache that
            this rank holds; None without such pages.
        new_rows: of a striped cache, which rows of each hop's message they are; new: memory for them.
    """

    transfers: tuple[Transfer, ...]
    messages: tuple[Message, Message]
    prefixes: Prefixes | None
    shard: OwnShard | StripedShard | None
    own: OwnKeys
    spans: list[list[Spans]]
    places: list[Places] | None
    new_rows: list[Tensor]
    new: Message | None
    num_tokens: int | Tensor
    moves: Moves


def _prepare(setup: Setup) -> _Ring | StraightRing:
    problem, meta, plan = setup.problem, setup.meta, setup.meta.plan
    travels = ring_keys(problem, plan)
    straight = StraightRing.of(setup, travels) if travels.straight else None
    if straight is not None:
        return straight
    messages, transfers = _turns(setup.transport, setup.kv, message_rows(problem, plan) if plan.sharded or plan.cp_size > 1 else 0)
    is_sharded = problem.cache == "paged" and plan.sharded
    owners = [(meta.cp_rank - hop) % plan.cp_size for hop in range(plan.cp_size)]
    spans = shard_spans(meta, problem.window)
    is_striped = is_sharded and plan.owner is not None
    # Pages that every rank has whole get all new keys that pass by, and striped ones their own.
    places = None
    if is_striped:
        places = owned_places_by_rank(meta)
    elif problem.cache == "paged" and not is_sharded:
        places = meta.gathered_places_by_rank
    new_rows = new_rows_in_shards(meta) if is_striped else []
    shard: OwnShard | StripedShard | None = None
    if is_sharded:
        shard = (StripedShard if is_striped else OwnShard).of(setup, messages[0])
    return _Ring(
        transfers=transfers,
        messages=messages,
        prefixes=Prefixes.of(setup),
        shard=shard,
        own=OwnKeys.of(setup),
        spans=[spans[owner] for owner in owners],
        places=None if places is None else [places[owner] for owner in owners],
        new_rows=[new_rows[owner] for owner in owners] if is_striped else [],
        new=message_buffer(setup.transport.arena, "new rows", setup.kv, meta.rows) if is_striped else None,
        num_tokens=setup.num_tokens,
        moves=moves_for(problem.device),
    )


def _forward(ring: _Ring | StraightRing, io: IO, attend: Attend) -> None:
    if isinstance(ring, StraightRing):
        ring.forward(io, attend)
        return
    if ring.shard is not None:
        keys = ring.shard.keys(io)
    else:
        if ring.transfers:
            ring.moves.pack(ring.messages[0].whole, io.k, io.v, ring.num_tokens)
        keys = ring.own.keys(io)
    for hop, launches in enumerate(ring.spans):
        arriving = io.start() if hop < len(ring.transfers) else None
        if hop == 0 and ring.prefixes is not None:
            ring.prefixes.attend(io, attend)
        if ring.places is not None:
            # What passes by is written, too.
            assert isinstance(io.cache, PagedKV)
            passing = ring.messages[hop % 2]
            if hop and ring.new is not None:
                ring.moves.gather_rows(ring.new.whole, passing.whole, ring.new_rows[hop])
                passing = ring.new
            k, v = passing.parts if hop else (io.k, io.v)
            write_rows(ring.own.kv, io.cache, ring.places[hop], k, v)
        for spans in launches:
            attend(keys, spans)
        if arriving is not None:
            arriving.wait()
        keys = ring.messages[(hop + 1) % 2].keys


def _turns(transport: Transport, kv: KVFormat, rows: int) -> tuple[tuple[Message, Message], tuple[Transfer, ...]]:
    messages = message_buffer(transport.arena, "ring 0", kv, rows), message_buffer(transport.arena, "ring 1", kv, rows)
    turns = [transport.prepare_shift(messages[1 - n].whole, messages[n].whole) for n in range(2)]
    transfers = [turns[hop % 2] for hop in range(transport.size - 1)]
    if transfers:
        # All that comes later was received.
        transfers[0] = transfers[0]._replace(fill_missing=partial(kv.fill_missing_, messages[0].whole))
    return messages, tuple(transfers)


def why_not_shards(problem: Problem, plan: Layout) -> str | None:
    """What no strategy can serve that takes one rank's shard at a time."""
    if plan.sharded and problem.window is not None:
        return GAPS if plan.knows_positions else UNKNOWN_POSITIONS
    if plan.is_callers and problem.fixed and problem.window is not None:
        # A launch for each chunk that an owner has of a request.
        return "with a window its launches over a partition of your own change in number from batch to batch, and a bucket's graph cannot"
    return None


def _why_not(problem: Problem, plan: Layout) -> str | None:
    if plan.sharded and problem.fixed:
        return "the shards that travel change in size from batch to batch, and a bucket's graph cannot"
    return why_not_shards(problem, plan)


RING = Strategy("ring", _schedule, _prepare, _forward, _why_not, "keys and values", stored=True, expands=True)
