"""Strategy ``ring`` where few keys are needed: in each hop a rank receives from another one what its queries see of that one's shard.

Keys come straight from their owner, as who stands between would receive what it has no use for. A hop in which no rank needs anything is
left out. As in any ring, a hop's keys travel beside the attention to those of the hop before.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cpattn.device_tables import exclusive_cumsum, expand_all
from cpattn.exchange.attend import Attend
from cpattn.exchange.keys_at_hand import OwnKeys, OwnShard, Prefixes
from cpattn.exchange.message import Message, message_buffer
from cpattn.exchange.ring_keys import RingKeys
from cpattn.exchange.step_spans import needed_shard_spans, shard_spans, source_spans
from cpattn.exchange.strategy import IO, Setup
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import unseen_tokens
from cpattn.moves.moves import Moves, moves_for
from cpattn.spans import Spans
from cpattn.transports.transfer import Transfer, Work


class _Arriving(NamedTuple):
    """One hop.

    Attributes:
        message: to the rank that comes so many later; rows: which of this rank's shard it has first.
        keys: from the rank that came so many before; spans: this rank's queries over them.
    """

    message: Tensor
    rows: Tensor
    keys: Message
    spans: list[Spans]


class StraightRing(NamedTuple):
    """
    Attributes:
        shard: memory of what others receive of; None where nobody receives anything.
        held: this rank's part of a sharded cache, where there is one; own: else its new tokens.
    """

    transfers: tuple[Transfer, ...]
    hops: tuple[_Arriving, ...]
    shard: Message | None
    held: OwnShard | None
    own: OwnKeys
    own_spans: list[Spans]
    prefixes: Prefixes | None
    num_tokens: int | Tensor
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, travels: RingKeys) -> StraightRing | None:
        """None where the transport cannot send such messages."""
        problem, meta, transport, kv, plan = setup.problem, setup.meta, setup.transport, setup.kv, setup.meta.plan
        size, rank = plan.cp_size, meta.cp_rank
        hops, transfers = [], []
        for number, (hop, sent) in enumerate(zip(travels.hops, travels.sent, strict=True)):
            owner, viewer = (rank - hop) % size, (rank + hop) % size
            # Two of each take turns.
            message = message_buffer(transport.arena, f"needed of shards {number % 2}", kv, int(sent.max())).whole
            keys = message_buffer(transport.arena, f"needed shard {number % 2}", kv, int(sent[owner]))
            transfer = transport.prepare_rows_to(keys.whole, message, hop, int(sent[rank]), int(sent[owner]))
            if transfer is None:
                return None
            transfers.append(transfer._replace(fill_missing=partial(kv.fill_missing_, message)))
            hops.append(_Arriving(message, shard_rows(meta, problem.window, viewer), keys, needed_shard_spans(meta, problem.window, owner)))
        is_sharded = problem.cache == "paged" and plan.sharded
        # Without others to send to it attends to its pages as they are, where the backend can.
        in_pages = is_sharded and setup.reads_pages and not hops
        shard = None
        if hops or (is_sharded and not in_pages):
            shard = message_buffer(transport.arena, "shard", kv, plan.largest_shard if plan.sharded else meta.rows)
        spans = source_spans(meta, problem.window, paged=True) if in_pages else shard_spans(meta, problem.window)
        return cls(
            transfers=tuple(transfers),
            hops=tuple(hops),
            shard=shard,
            held=OwnShard.of(setup, shard) if is_sharded else None,
            own=OwnKeys.of(setup),
            own_spans=spans[rank],
            prefixes=Prefixes.of(setup),
            num_tokens=setup.num_tokens,
            moves=moves_for(problem.device),
        )

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        if self.held is not None:
            keys = self.held.keys(io)
        else:
            if self.shard is not None:
                self.moves.pack(self.shard.whole, io.k, io.v, self.num_tokens)
            keys = self.own.keys(io)
        arriving = self._send(io, 0)
        if self.prefixes is not None:
            self.prefixes.attend(io, attend)
        for spans in self.own_spans:
            attend(keys, spans)
        for number, hop in enumerate(self.hops):
            assert arriving is not None
            arriving.wait()
            arriving = self._send(io, number + 1)
            for spans in hop.spans:
                attend(hop.keys.keys, spans)

    def _send(self, io: IO, number: int) -> Work | None:
        """What others need in a hop; None behind the last."""
        if number == len(self.hops):
            return None
        assert self.shard is not None  # of which they need it
        message, rows, *_ = self.hops[number]
        if len(rows):
            self.moves.gather_rows(message[: len(rows)], self.shard.whole, rows)
        return io.start()


def shard_rows(meta: CPMetadata, window: int | None, viewer: int) -> Tensor:
    """int32 ``[n]`` on the device: which rows of this rank's shard another one's queries see, in their order."""

    def build() -> Tensor:
        plan: Layout = meta.plan
        cached, extends = plan.shard_lens[:, meta.cp_rank], plan.rank_extends[:, meta.cp_rank]
        begins, own = exclusive_cumsum(cached + extends), plan.by_rank.entries(meta.cp_rank)
        of_chunk, unseen = plan.chunk_table.request[own], unseen_tokens(plan, window, viewer)[own]
        first = (begins + cached - exclusive_cumsum(extends))[of_chunk] + plan.chunk_rows[own] + unseen
        seen = plan.rank_extends[:, viewer] > 0
        # Of each request the cached ones come first.
        request = np.concatenate([np.arange(len(plan.batch)), of_chunk])
        order = request.argsort(kind="stable")
        runs = np.concatenate([begins, first])[order], np.concatenate([cached * seen, plan.chunk_table.length[own] - unseen])[order]
        return expand_all({"rows": runs}, meta.device)["rows"]

    return meta.derive(("shard rows", window, viewer), build)
