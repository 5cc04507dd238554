"""Keys in order of which those of other ranks come late: while the attention runs, which begins with those that are here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, int32

from cpattn.device_tables import DeviceTables, IntArray, exclusive_cumsum, expand_runs_on_host
from cpattn.exchange.key_order import RequestRows, RowsOfRanks
from cpattn.exchange.keys_in_order import OrderedKeys
from cpattn.exchange.message import KVFormat, Message
from cpattn.exchange.strategy import IO, Setup
from cpattn.kernels.arrival_layout import FIRST_FLAG, PIECE_ROWS
from cpattn.kernels.tiles import LENGTH_CLASSES
from cpattn.keys import Arrivals, Keys
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.needed_keys import SeenKeys
from cpattn.moves.late_rows import LateRows
from cpattn.spans import Spans
from cpattn.transports.rows_of_all import LateRowsOfPeers, SentRows
from cpattn.transports.transfer import Transfer

# Of most shapes of tiles.
_BLOCK_KEYS = 128


class LateKeys(NamedTuple):
    """:class:`cpattn.transports.rows_of_all.SentRows` of messages that each rank has in the order of the keys that its queries see.

    Its own rows are in their places as soon as they are sent, where the others read them, and theirs come while the attention runs.

    Attributes:
        arrivals: by which it waits for them.
    """

    peers: LateRowsOfPeers
    kv: KVFormat
    shape: tuple[int, int, int]
    arrivals: Arrivals

    @classmethod
    def of(cls, setup: Setup, kv: KVFormat) -> LateKeys | None:
        """None where they cannot come late."""
        meta, device = setup.meta, setup.problem.device
        tables = late_tables(meta, setup.problem.window, setup.reads_prefix)
        flags = setup.transport.arena.buffer("arrivals", (FIRST_FLAG + tables.late.shape[0],), int32, device)
        # No word may be a turn to come; the number of the turn goes on, as other calls in this memory count by it.
        flags[1:].copy_(flags[:1].expand(len(flags) - 1))
        shape = RowsOfRanks.of(meta, setup.reads_prefix).most, kv.heads, kv.width
        late = LateRows(tables.own_rows, tables.source, tables.order, flags, setup.reads_prefix)
        like = torch.empty(1, kv.heads, kv.width, dtype=kv.dtype, device=device)
        peers = setup.transport.late_rows(shape[0], like, late, kv.fill_missing_)
        return None if peers is None else cls(peers, kv, shape, Arrivals(flags, tables.late))

    @property
    def transfer(self) -> Transfer:
        """That makes this rank's known."""
        return self.peers.transfer

    def message(self) -> Message:
        """Where they are in this call."""
        return self.peers.memory.seen_as((self.shape, self.kv), self._seen_in)

    def _seen_in(self, memory: Tensor) -> Message:
        return Message.of(memory.view(self.kv.dtype).view(self.shape), self.kv)

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        """See :class:`SentRows`."""
        self.peers.put(k, v, num_tokens)


class LateInOrder(NamedTuple):
    """Keys that come late, in order."""

    ordered: OrderedKeys
    late: LateKeys

    @classmethod
    def of(cls, setup: Setup, late: LateKeys) -> LateInOrder:
        return cls(OrderedKeys.within(setup, late.message), late)

    @property
    def spans(self) -> Spans:
        """This rank's queries over the keys in order."""
        return self.ordered.spans

    def keys(self, io: IO, arrived: SentRows, heads: slice | None) -> Keys:
        """In order, with what says which are there."""
        keys = self.ordered.keys(io, heads)._replace(arrivals=self.late.arrivals)
        self.late.peers.bring(self.late.message().whole)
        return keys


class LateTables(NamedTuple):
    """Of one rank; see :class:`LateRows` and :class:`Arrivals`."""

    own_rows: Tensor
    source: Tensor
    order: Tensor
    late: Tensor


def late_tables(meta: CPMetadata, window: int | None, in_place: bool) -> LateTables:
    """For keys in the order of :func:`cpattn.exchange.key_order.key_order`, and queries that see ``window`` of them, or all: what none
    of them sees does not come at all."""

    def build() -> LateTables:
        tables = DeviceTables(_on_host(meta, window, in_place), meta.device)
        return LateTables(*(tables[name] for name in LateTables._fields))

    tables: LateTables = meta.derive(("late keys", window, in_place), build)
    return tables


def _on_host(meta: CPMetadata, window: int | None, in_place: bool) -> dict[str, IntArray]:
    plan = meta.plan
    seen, rows = SeenKeys.of(plan, meta.cp_rank, window), RequestRows.of(meta, in_place)
    num_rows = int((rows.put + rows.new).sum()) if meta.bucket is None else meta.whole_rows
    pieces = max(1, -(-num_rows // PIECE_ROWS))
    _, entry, token, length = seen.pieces
    request, owner, sent = plan.chunk_table.request[entry], plan.chunk_table.rank[entry], seen.pieces.rows(plan)
    theirs = RowsOfRanks.of(meta, in_place)
    place = token - exclusive_cumsum(plan.extend_lens)[request]
    begin = place + rows.new_starts[request]
    own_rows, source = np.full(meta.rows, -1, dtype=np.int64), np.full(pieces * PIECE_ROWS, -1, dtype=np.int64)
    is_own = owner == meta.cp_rank
    own_rows[_runs(sent[is_own], length[is_own])] = _runs(begin[is_own], length[is_own])
    is_late = ~is_own & (length > 0)
    there = (owner * theirs.most + theirs.new_starts[owner, request] + place)[is_late]
    request, begin, length = request[is_late], begin[is_late], length[is_late]
    source[_runs(begin, length)] = _runs(there, length)
    # The attention takes requests of about the longest tiles first, one after the other, and each tile from its last key on.
    blocks = (seen.prefix_len + seen.new_len) // _BLOCK_KEYS
    length_class = blocks * LENGTH_CLASSES // max(1, int(blocks.max(initial=0)))
    first = begin // PIECE_ROWS
    many = (begin + length - 1) // PIECE_ROWS - first + 1
    piece, of = _runs(first, many), request.repeat(many)
    piece = piece[np.lexsort((-piece, of, -length_class[of]))]
    _, where = np.unique(piece, return_index=True)
    order = np.full(1 + pieces, -1, dtype=np.int64)
    order[0] = len(where)
    order[1 : 1 + len(where)] = piece[np.sort(where)]
    late = np.zeros(pieces, dtype=np.int64)
    late[piece] = 1
    return {"own_rows": own_rows, "source": source, "order": order, "late": late}


def _runs(first: IntArray, lengths: IntArray) -> IntArray:
    """One run of numbers after another."""
    found: IntArray = expand_runs_on_host(first, lengths, int(lengths.sum())).numpy()
    return found
