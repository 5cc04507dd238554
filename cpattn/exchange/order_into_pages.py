"""New keys that are attended to in order, or in a rank's own rows, and written to pages that every rank holds whole after it.

Kernels are given keys in order faster than they read pages, or would be given a copy of the pages that were just written. It can be done
where all that a batch's queries see is new, as in the first chunk of a prefill: cached keys lie in pages alone. (With a kernel that reads
these beside keys in order, and waits for keys: :mod:`cpattn.exchange.late_pages`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cpattn.exchange.key_order import Ordered, RequestRows, key_order_drafts
from cpattn.exchange.keys_in_order import InOrder, OrderedKeys, OwnInPlace
from cpattn.exchange.message import KVFormat
from cpattn.exchange.page_places import places_in_order, places_in_order_draft
from cpattn.exchange.page_rows import write_rows
from cpattn.exchange.rows_into_pages import OneTransfer, RowsIntoPages, gathered_of, rows_into_pages, rows_sent_twice
from cpattn.exchange.rows_of_peers import rows_of_peers
from cpattn.exchange.seen_keys import exchanged_rows
from cpattn.exchange.step_spans import in_order_draft
from cpattn.exchange.strategy import Setup
from cpattn.exchange.traveling_keys import Traveling, traveling_keys
from cpattn.kv_cache import PagedKV
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem


def are_first_chunks(problem: Problem, plan: Layout) -> bool:
    """Whether all keys that a batch's queries see are new, which another batch of a bucket may have otherwise."""
    return not problem.fixed and not plan.prefix_lens[plan.extend_lens > 0].any()


def lie_in_order(problem: Problem, plan: Layout) -> bool:
    """Whether the first chunks that each rank's queries see are its own rows as they lie. Where nothing travels as queries see no more than
    a window, other ranks may have what comes between, and a rank's own rows do not follow each other."""
    without = problem if problem.window is None else replace(problem, window=None)
    return traveling_keys(without, plan).what == "nothing"


def rows_through_order(setup: Setup, kv: KVFormat, travels: Traveling) -> tuple[Sequence[RowsIntoPages], InOrder | OwnInPlace]:
    """What is brought of each group of KV heads, of one of which ``kv`` is, and what is attended to of it before it is written."""
    meta, window = setup.meta, setup.problem.window
    are_own = RequestRows.of(meta, Ordered.SEEN).are_own
    if travels.what == "nothing" and are_own:
        return rows_into_pages(setup, kv, travels), OwnInPlace.of(setup)
    peers = rows_of_peers(setup, kv)
    sent_twice = rows_sent_twice(setup, kv) if travels.what == "needed" and not peers else []
    if sent_twice and are_own:
        return sent_twice, OwnInPlace.of(setup)
    if sent_twice:
        return sent_twice, InOrder(OrderedKeys.of(setup, kv, Ordered.SEEN), exchanged_rows(meta, window).source)
    # Who reads others' memory reads it once: what no query here sees as well, as the pages want it.
    every = Ordered.ALL_NEW
    meta.derive_together(meta.restore_index_draft, places_in_order_draft(meta), in_order_draft(meta, every), *key_order_drafts(meta, every))
    ordered, places = OrderedKeys.of(setup, kv, every), places_in_order(meta).new

    def write(cache: PagedKV) -> None:
        write_rows(kv, cache, places, *ordered.memory().parts)

    return [OneTransfer(rows, write) for rows in peers or gathered_of(setup, kv)], InOrder(ordered, meta.restore_index)
