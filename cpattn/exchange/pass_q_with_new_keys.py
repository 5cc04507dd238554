"""Strategy ``pass_q`` over a striped cache, and with a window over any sharded one: new keys and values go to all ranks with the
queries, in one message.

Each rank writes those that it is to hold. Over the prefix queries go to the ranks that have it, as over any sharded cache,
and see all that lies there; with a window, what each of them reaches of a copy. Over new tokens each rank attends with its
own queries, as everything is there: so no query needs a bound of its own within a stripe. That launch runs while results
travel.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpattn.byte_sizes import in_words
from cpattn.exchange.attend import Attend
from cpattn.exchange.keys_at_hand import PagedKeys
from cpattn.exchange.message import Message, message_buffer
from cpattn.exchange.new_keys_alone import nothing_is_cached
from cpattn.exchange.page_rows import Places, write_rows
from cpattn.exchange.queries_and_keys import QueriesAndKeys
from cpattn.exchange.results import Results
from cpattn.exchange.schedule import Hop, Schedule, sends
from cpattn.exchange.step_spans import cached_draft, cached_spans, new_token_draft, new_token_spans, reached_spans
from cpattn.exchange.strategy import IO, Setup
from cpattn.exchange.traveling_over_shards import explain_over_shards
from cpattn.kv_cache import PagedKV
from cpattn.metadata.draft import Draft
from cpattn.metadata.layout import Layout
from cpattn.metadata.striped_places import cached_places, owned_places, owned_places_draft
from cpattn.metadata.window_reach import reached_places, require_positions
from cpattn.moves.moves import Moves, moves_for
from cpattn.problem import Problem
from cpattn.spans import Alignment, Spans
from cpattn.transports.transfer import Transfer


def brings_new_keys(problem: Problem, plan: Layout) -> bool:
    """Whether calls are of this form: others write new tokens than those who compute them, or a window sees them through gaps."""
    return plan.owner is not None or (plan.sharded and problem.window is not None)


def explain_beside_keys(problem: Problem, plan: Layout, hop_by_hop: bool = False) -> str:
    """Which queries travel then, in words, with the bytes that a rank receives; also where they go around a ring (``hop_by_hop``)."""
    others = (plan.cp_size - 1) * problem.rows
    if plan.cp_size == 1:
        return "none travel: there is one rank"
    if nothing_is_cached(problem, plan) and not hop_by_hop:
        return f"none travel: nothing is cached; of keys and values {explain_over_shards(problem, plan)}"
    queries, keys = in_words(others * problem.query_bytes), in_words(others * problem.key_bytes)
    why = "each holds a part of almost every request" if problem.window is None else "it is not worked out which of them see keys elsewhere"
    return f"a rank receives all of them, {queries}, beside all new keys and values, {keys}: {why}"


def new_keys_schedule(problem: Problem, plan: Layout) -> Schedule:
    """The hops of a call."""
    others = plan.cp_size - 1
    rows = others * problem.rows
    alignment: Alignment = "full" if problem.window is None else "bottom_right"
    first = Hop(0, "cached", alignment, 1, sends(problem, plan, rows * problem.query_and_key_bytes))
    last = Hop(0, "new", "bottom_right", 1, sends(problem, plan, rows * problem.result_bytes))
    return (first, Hop("others", "cached", alignment, others, sends(problem, plan, 0)), last) if others else (first, last)


class PassQWithNewKeys(NamedTuple):
    """
    Attributes:
        everyone: queries and new keys of all ranks; own: this rank's part of it.
        places: where the new ones go that this rank holds.
        cached: what it holds of the prefixes; own_spans, other_spans: its own queries, and all other ranks', over that.
        ordered: memory for all new keys in order; restore_index: where each comes from; new_spans: this rank's queries over them.
    """

    transfers: tuple[Transfer, ...]
    everyone: QueriesAndKeys
    own: QueriesAndKeys
    places: Places
    cached: PagedKeys
    own_spans: Spans
    other_spans: Spans
    ordered: Message
    restore_index: Tensor
    new_spans: Spans
    sent: Results | None
    received: Results | None
    moves: Moves

    @classmethod
    def of(cls, setup: Setup) -> PassQWithNewKeys:
        """What one call needs."""
        problem, meta, transport, kv = setup.problem, setup.meta, setup.transport, setup.kv
        everyone = QueriesAndKeys.of(setup, "queries and keys", transport.size)
        own = everyone.of_rank(transport.rank, problem.rows)
        transfers: tuple[Transfer, ...] = ()
        sent = received = None
        if transport.size > 1:
            sent, received = (Results.of(setup, f"results {end}", transport.size) for end in ("sent", "received"))
            gather = transport.prepare_all_gather(everyone.whole, own.whole)._replace(fill_missing=own.fill_missing)
            back = transport.prepare_all_to_all(received.message, sent.message)
            transfers = gather, back._replace(fill_missing=partial(sent.message.fill_, torch.nan))
        drafts: list[Draft[Any]] = [meta.restore_index_draft, owned_places_draft(meta), new_token_draft(meta)]
        if problem.window is None:
            meta.derive_together(*drafts, cached_draft(meta, paged=setup.reads_pages))
            places = None if setup.reads_pages else cached_places(meta)
            own_spans, other_spans = cached_spans(meta, paged=setup.reads_pages)
        else:
            # A range of a window's keys begins anywhere, and ranges in pages do not.
            meta.on_copy(require_positions)
            meta.derive_together(*drafts)
            places = reached_places(meta, problem.window)
            own_spans, other_spans = reached_spans(meta, problem.window)
        cached = PagedKeys.as_they_are(kv)
        if places is not None:
            cached = PagedKeys.copied(kv, message_buffer(transport.arena, "shard", kv, len(places[0])), places)
        return cls(
            transfers=transfers,
            everyone=everyone,
            own=own,
            places=owned_places(meta),
            cached=cached,
            own_spans=own_spans,
            other_spans=other_spans,
            ordered=message_buffer(transport.arena, "ordered", kv, meta.restore_index.shape[0]),
            restore_index=meta.restore_index,
            new_spans=new_token_spans(meta),
            sent=sent,
            received=received,
            moves=moves_for(problem.device),
        )

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        cache, new = io.cache, self.everyone.new
        assert isinstance(cache, PagedKV)
        self.own.put(io)
        arriving = io.start() if self.transfers else None
        cached = self.cached.keys(cache)
        attend(cached, self.own_spans)
        if arriving is not None:
            arriving.wait()
        write_rows(self.own.kv, cache, self.places, *new.parts)
        returning = None
        if self.sent is not None:
            self.sent.put(*attend.others(self.everyone.q, cached, [self.other_spans]))
            returning = io.start()
        self.moves.gather_rows(self.ordered.whole, new.whole, self.restore_index)
        attend(self.ordered.keys, self.new_spans)
        if returning is not None and self.received is not None:
            returning.wait()
            attend.merge(*self.received.partials)
