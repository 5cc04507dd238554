"""How an all-gather brings rows of keys, and what is attended to of them: by which of the ways that there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cpattn.exchange.gathered_rows import gathered_rows
from cpattn.exchange.key_order import RequestRows, key_order
from cpattn.exchange.keys_in_order import InOrder, OrderedKeys, OwnInOrder, OwnInPlace, drafts_in_order
from cpattn.exchange.late_keys import LateInOrder, LateKeys, late_draft
from cpattn.exchange.message import KVFormat
from cpattn.exchange.needed_rows import needed_rows
from cpattn.exchange.rows_of_peers import rows_of_peers
from cpattn.exchange.seen_keys import exchanged_rows, exchanged_rows_draft, gathered_rows_draft, gathered_rows_seen
from cpattn.exchange.strategy import Setup
from cpattn.exchange.traveling_keys import Traveling
from cpattn.metadata.draft import Draft
from cpattn.transports.rows_of_all import RowsInOrder, SentRows


def keys_in_order(
    setup: Setup, kv: KVFormat, travels: Traveling
) -> tuple[Sequence[SentRows], InOrder | LateInOrder | OwnInOrder | OwnInPlace]:
    """What is brought of each group of KV heads, and what is attended to of it. Others' rows come late where they can, and where what is
    attended to is one group in one launch."""
    problem, meta = setup.problem, setup.meta
    peers = rows_of_peers(setup, kv) if travels.what != "nothing" else []
    if peers and setup.waits_for_keys and problem.overlap == 1:
        # All ranks do the same: what one posts the others read.
        meta.derive_together(late_draft(meta, problem.window, setup.ordered), *drafts_in_order(setup))
        late = LateKeys.of(setup, kv)
        if late is not None:
            return [late], LateInOrder.of(setup, late)
    here = RequestRows.of(meta, setup.ordered)
    drafts = drafts_in_order(setup, as_they_lie=here.are_own)
    meta.derive_together(*drafts, *_source_drafts(setup, travels, here.all_own, reads_peers=bool(peers)))
    order = key_order(meta, setup.ordered)
    rows, source = (peers, None) if peers else _arriving(setup, kv, travels, order.new_are_own)
    if order.are_own:
        return rows, OwnInPlace.of(setup)
    ordered = OrderedKeys.of(setup, kv, setup.ordered)
    if order.new_are_own:
        return rows, OwnInOrder(ordered, meta.num_tokens)
    if source is None:
        # Who reads others' memory reads no more than is in the index. A bucket's gathered rows are all there, and have a table already.
        all_are_there = meta.bucket is not None and not peers
        source = meta.restore_index if all_are_there else gathered_rows_seen(meta, problem.window, setup.ordered.leaves_own)
    return rows, InOrder(ordered, source)


def _source_drafts(setup: Setup, travels: Traveling, new_are_own: bool, *, reads_peers: bool) -> list[Draft[Any]]:
    """Of the table by which what arrives is put in order, to be sent with others: mostly one of these is asked for."""
    meta, window, leaves_own = setup.meta, setup.problem.window, setup.ordered.leaves_own
    if not reads_peers and travels.what != "all":
        return [exchanged_rows_draft(meta, window, leaves_own)]
    return [] if new_are_own or (meta.bucket is not None and not reads_peers) else [gathered_rows_draft(meta, window, leaves_own)]


def _arriving(setup: Setup, kv: KVFormat, travels: Traveling, new_are_own: bool) -> tuple[Sequence[RowsInOrder], Tensor | None]:
    """Over collectives: those that are needed, and where they are among what arrives; or, without such a table, all."""
    problem, meta = setup.problem, setup.meta
    if travels.what != "all":
        table = exchanged_rows(meta, problem.window, setup.ordered.leaves_own)
        own = 0 if new_are_own and not any(table.sent) else table.own
        rows = needed_rows(setup.transport, kv, table, own, problem.overlap, travels.what == "needed")
        if rows is not None:
            return rows, table.source
    return gathered_rows(setup.transport, kv, meta.rows, problem.overlap), None
