"""Strategy ``pass_q`` where new keys would travel beside the queries, and nothing is cached: no query has anything to see elsewhere.

So new keys and values travel alone: to the ranks that see them or are to hold them, or, where these are nearly all, to all of them. Each
rank writes those that it is to hold, and attends to what it has in order.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.gathered_rows import GatheredRows, gathered_rows, put_in_pages
from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.exchange.page_rows import Places
from cpattn.exchange.schedule import Hop, Schedule
from cpattn.exchange.step_spans import new_token_draft, new_token_spans
from cpattn.exchange.strategy import IO, Setup
from cpattn.exchange.traveling_over_shards import sent_over_shards, traveling_over_shards
from cpattn.exchange.wanted_rows import WantedRows
from cpattn.kv_cache import PagedKV
from cpattn.metadata.layout import Layout
from cpattn.metadata.striped_places import owned_places, owned_places_draft
from cpattn.problem import Problem
from cpattn.spans import Spans
from cpattn.transports.transfer import Transfer


def nothing_is_cached(problem: Problem, plan: Layout) -> bool:
    """Whether no rank has a key for other ranks' queries, now or in another batch of a bucket."""
    return not plan.num_prefix_tokens and not problem.fixed


def new_keys_alone_schedule(problem: Problem, plan: Layout) -> Schedule:
    """The one hop of a call."""
    return (Hop(0, "new", "bottom_right", 1, sent_over_shards(problem, plan)),)


def prepare_new_keys_alone(setup: Setup) -> WantedRows | NewKeysAlone:
    """What one call needs."""
    travels = traveling_over_shards(setup.problem, setup.meta.plan)
    return (None if travels.what == "all" else WantedRows.of(setup, travels)) or NewKeysAlone.of(setup)


class NewKeysAlone(NamedTuple):
    """All of them to all ranks.

    Attributes:
        rows: new rows of all ranks.
        places: where those go that this rank holds.
        ordered: memory for all of them in order; restore_index: where each comes from; spans: this rank's queries over them.
        num_tokens: this rank's rows that are tokens.
    """

    transfers: tuple[Transfer, ...]
    rows: GatheredRows
    places: Places
    ordered: Message
    restore_index: Tensor
    spans: Spans
    num_tokens: int | Tensor
    kv: KVFormat

    @classmethod
    def of(cls, setup: Setup) -> NewKeysAlone:
        """What one such call needs."""
        meta, transport, kv = setup.meta, setup.transport, setup.kv
        (rows,) = gathered_rows(transport, kv, setup.problem.rows)
        meta.derive_together(meta.restore_index_draft, owned_places_draft(meta), new_token_draft(meta))
        return cls(
            transfers=(rows.transfer,) if transport.size > 1 else (),
            rows=rows,
            places=owned_places(meta),
            ordered=message_buffer(transport.arena, "ordered", kv, meta.restore_index.shape[0]),
            restore_index=meta.restore_index,
            spans=new_token_spans(meta),
            num_tokens=setup.num_tokens,
            kv=kv,
        )

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        assert isinstance(io.cache, PagedKV)
        self.rows.put(io.k, io.v, self.num_tokens)
        if self.transfers:
            io.start().wait()
        put_in_pages(self.rows, self.kv, self.places, io.cache)
        self.rows.gather(self.ordered.whole, self.restore_index, None)
        attend(self.ordered.keys, self.spans)
