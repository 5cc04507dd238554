"""Strategy ``pass_q`` where new keys would travel beside the queries, and nothing is cached: no query has anything to see elsewhere.

So new keys and values go to all ranks alone. Each rank writes those that it is to hold, and attends to all of them in order.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.exchange.page_rows import Places, write_rows
from cpattn.exchange.schedule import Hop, Schedule, sends
from cpattn.exchange.step_spans import new_token_spans
from cpattn.exchange.strategy import IO, Setup
from cpattn.kv_cache import PagedKV
from cpattn.metadata.layout import Layout
from cpattn.metadata.striped_places import owned_places
from cpattn.moves.moves import Moves, moves_for
from cpattn.problem import Problem
from cpattn.spans import Spans
from cpattn.transports.transfer import Transfer


def nothing_is_cached(problem: Problem, plan: Layout) -> bool:
    """Whether no rank has a key for other ranks' queries, now or in another batch of a bucket."""
    return not plan.num_prefix_tokens and not problem.fixed


def new_keys_alone_schedule(problem: Problem, plan: Layout) -> Schedule:
    """The one hop of a call."""
    sent = (plan.cp_size - 1) * problem.rows * problem.key_bytes
    return (Hop(0, "new", "bottom_right", 1, sends(problem, plan, sent)),)


class NewKeysAlone(NamedTuple):
    """
    Attributes:
        all: new rows of all ranks; own: this rank's.
        places: where those go that this rank holds.
        ordered: memory for all of them in order; restore_index: where each comes from; spans: this rank's queries over them.
        num_tokens: this rank's rows that are tokens.
    """

    transfers: tuple[Transfer, ...]
    all: Message
    own: Tensor
    places: Places
    ordered: Message
    restore_index: Tensor
    spans: Spans
    num_tokens: int | Tensor
    kv: KVFormat
    moves: Moves

    @classmethod
    def of(cls, setup: Setup) -> NewKeysAlone:
        """What one call needs."""
        problem, meta, transport, kv = setup.problem, setup.meta, setup.transport, setup.kv
        everyone = message_buffer(transport.arena, "gathered", kv, transport.size * problem.rows)
        own = everyone.whole.narrow(0, transport.rank * problem.rows, problem.rows)
        transfers: tuple[Transfer, ...] = ()
        if transport.size > 1:
            gather = transport.prepare_all_gather(everyone.whole, own)
            transfers = (gather._replace(fill_missing=partial(kv.fill_missing_, own)),)
        return cls(
            transfers=transfers,
            all=everyone,
            own=own,
            places=owned_places(meta),
            ordered=message_buffer(transport.arena, "ordered", kv, meta.restore_index.shape[0]),
            restore_index=meta.restore_index,
            spans=new_token_spans(meta),
            num_tokens=setup.num_tokens,
            kv=kv,
            moves=moves_for(problem.device),
        )

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        assert isinstance(io.cache, PagedKV)
        self.moves.pack(self.own, io.k, io.v, self.num_tokens)
        if self.transfers:
            io.start().wait()
        write_rows(self.kv, io.cache, self.places, *self.all.parts)
        self.moves.gather_rows(self.ordered.whole, self.all.whole, self.restore_index)
        attend(self.ordered.keys, self.spans)
