"""Keys in order of which those of other ranks come late: while the attention runs, which begins with those that are here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, int32

from cpattn.device_tables import Int32Array, IntArray, Table, Unsent, exclusive_cumsum, expand_runs_on_host
from cpattn.exchange.key_order import Ordered, RequestRows, RowsOfRanks, puts_cached_keys
from cpattn.exchange.keys_in_order import OrderedKeys
from cpattn.exchange.message import KVFormat, Message
from cpattn.exchange.seen_keys import seen_keys
from cpattn.exchange.strategy import IO, Setup
from cpattn.kernels.arrival_layout import PIECE_ROWS, flag_words
from cpattn.kernels.attention_config import MOST_DIM_WITH_ROOM
from cpattn.kernels.release import may_limit_registers
from cpattn.kernels.tiles import LENGTH_CLASSES
from cpattn.keys import Arrivals, Keys
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.draft import Draft
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import Pieces, SeenKeys
from cpattn.moves.late_rows import LateRows
from cpattn.spans import Spans
from cpattn.transports.rows_of_all import LateRowsOfPeers, SentRows
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport

# Of most shapes of tiles.
_BLOCK_KEYS = 128
# Pieces that are put in turn together.
_TOGETHER = 4
# Of a message whose rows come by programs that share multiprocessors with the attention. Between two H200 layers of 4 to 32 MiB took 1 to
# 8% less time so than with few large programs, and longer ones about as much.
_SHORT_BYTES = 32 << 20


class LateKeys(NamedTuple):
    """:class:`cpattn.transports.rows_of_all.SentRows` of messages that each rank has in the order of the keys that its queries see.

    Its own rows are put in their places, where the others read them, and theirs come while the attention runs.

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
        tables = late_tables(meta, setup.problem.window, setup.ordered)
        flags = _flags(meta, setup.transport, tables.late.shape[0])
        shape = RowsOfRanks.of(meta, setup.ordered).most, kv.heads, kv.width
        # All ranks launch once, or all of them twice.
        between = meta.bucket is None and puts_cached_keys(meta.plan, setup.ordered)
        beside = _go_side_by_side(kv, tables.late.shape[0])
        late = LateRows(meta.rows, tables.own_rows, tables.places, tables.source, tables.order, flags, setup.ordered, beside, between)
        like = torch.empty(1, kv.heads, kv.width, dtype=kv.dtype, device=device)
        peers = setup.transport.late_rows(shape[0], like, late, kv.fill_missing_)
        return None if peers is None else cls(peers, kv, shape, Arrivals(flags, tables.late, beside))

    @property
    def transfer(self) -> Transfer:
        """That puts this rank's in their places, and brings the others'."""
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
        return cls(OrderedKeys.within(setup, late.message, setup.ordered), late)

    @property
    def spans(self) -> Spans:
        """This rank's queries over the keys in order."""
        return self.ordered.spans

    def keys(self, io: IO, arrived: SentRows, heads: slice | None) -> Keys:
        """In order, with what says which are there."""
        return self.ordered.keys(io, heads, self.late.arrivals)


class LateTables(NamedTuple):
    """Of one rank; see :class:`LateRows` and :class:`Arrivals`."""

    own_rows: Tensor
    places: Tensor
    source: Tensor
    order: Tensor
    late: Tensor


def late_tables(meta: CPMetadata, window: int | None, ordered: Ordered) -> LateTables:
    """For keys in the order of :func:`cpattn.exchange.key_order.key_order`, and queries that see ``window`` of them, or all: what none
    of them sees is not waited for, and comes last, where it has a place at all."""
    return meta.derive_sent(late_draft(meta, window, ordered))


def late_draft(meta: CPMetadata, window: int | None, ordered: Ordered) -> Draft[LateTables]:
    """The same, to be sent with other tables."""
    return Draft(("late keys", window, ordered), lambda: Unsent(_on_host(meta, window, ordered), lambda sent: LateTables(**sent)))


def _go_side_by_side(kv: KVFormat, pieces: int) -> bool:
    """Whether others' rows come by programs that run on the multiprocessors of the attention; see :class:`LateRows`. By what all batches
    of a bucket have in common, as their graphs have."""
    nbytes = pieces * PIECE_ROWS * kv.heads * kv.width * kv.dtype.itemsize
    return nbytes <= _SHORT_BYTES and max(kv.head_dim, kv.v_head_dim) <= MOST_DIM_WITH_ROOM and may_limit_registers()


class _Flags(NamedTuple):
    """Which pieces are there; see :mod:`cpattn.kernels.arrivals`."""

    words: Tensor

    def copy_(self, other: _Flags) -> None:
        """Another batch of the bucket goes on with the same turns."""


def _flags(meta: CPMetadata, transport: Transport, pieces: int) -> Tensor:
    """For all calls over these metadata and this transport, which follow each other. They are made with the metadata's tables, and so never
    while a CUDA graph captures: before it replays, its memory would hold anything, a turn to come as well."""
    made: list[_Flags] = []

    def build() -> _Flags:
        if not made:
            made.append(_Flags(torch.zeros(flag_words(pieces), dtype=int32, device=meta.device)))
        return made[0]

    # By its number, as metadata of a bucket may outlive a group, and would keep its memory.
    flags: _Flags = meta.derive(("arrivals", int(transport.handle), pieces), build)
    return flags.words


def _on_host(meta: CPMetadata, window: int | None, ordered: Ordered) -> dict[str, Table]:
    plan = meta.plan
    seen, rows = seen_keys(meta, window), RequestRows.of(meta, ordered)
    num_rows = int((rows.put + rows.new).sum()) if meta.bucket is None else meta.whole_rows
    pieces = max(1, -(-num_rows // PIECE_ROWS))
    placed = Pieces.whole(plan) if ordered is Ordered.ALL_NEW else seen.pieces
    # What is read where it lies has no place, or none that is filled.
    put = rows.tokens_put(plan, placed)
    filled = put.nonzero()[0]
    placed, length = placed.take(filled), put[filled]
    request, owner, place = _where(plan, placed)
    begin, is_own = place + rows.new_starts[request], owner == meta.cp_rank
    theirs = RowsOfRanks.of(meta, ordered)
    there = owner * theirs.most + theirs.new_starts[owner, request] + place
    # All in order: before each piece what nobody brings, and its own rows, are runs that end at -1.
    between = begin.copy()
    between[1:] -= begin[:-1] + length[:-1]
    first = np.stack([-between, np.where(is_own, -length, there)], axis=1).ravel()
    brought_rows = _runs(first, np.stack([between, length], axis=1).ravel())
    num_own = int(length[is_own].sum())
    own_rows, places = np.full((2, num_own if meta.bucket is None else meta.rows), -1, dtype=np.int32)
    own_rows[:num_own] = _runs(placed.rows(plan)[is_own], length[is_own])
    places[:num_own] = _runs(begin[is_own], length[is_own])
    source = np.full(pieces * PIECE_ROWS, -1, dtype=np.int32)
    np.maximum(brought_rows, -1, out=source[: len(brought_rows)])
    awaited, late = _by_need(meta, seen, rows, pieces)
    # Row by row of all pieces at once: along the few rows of each it takes ten times as long.
    brought = np.maximum.reduce([source[row::PIECE_ROWS] for row in range(PIECE_ROWS)]) >= 0
    in_turn = np.concatenate([awaited, (brought & (late == 0)).nonzero()[0]])
    in_order = source.reshape(pieces, PIECE_ROWS)
    source = np.full_like(in_order, -1)
    source[: len(in_turn)] = in_order.take(in_turn, axis=0)
    order = np.full(1 + pieces, -1, dtype=np.int32)
    order[0] = len(in_turn)
    order[1 : 1 + len(in_turn)] = in_turn
    return {"own_rows": np.append(np.int32(num_own), own_rows), "places": places, "source": source.ravel(), "order": order, "late": late}


def _by_need(meta: CPMetadata, seen: SeenKeys, rows: RequestRows, pieces: int) -> tuple[IntArray, Int32Array]:
    """The pieces of others' rows that queries see, those first that are needed first: the attention takes requests of about the longest
    tiles first, one after the other, and each tile from its last key on. And 1 for each piece that is one of them, of so many."""
    request, owner, place = _where(meta.plan, seen.pieces)
    is_late = (owner != meta.cp_rank) & (seen.pieces.length > 0)
    request, begin, length = request[is_late], (place + rows.new_starts[request])[is_late], seen.pieces.length[is_late]
    last = begin + length - 1
    change = np.zeros(pieces + 1, dtype=np.int32)
    np.add.at(change, begin // PIECE_ROWS, 1)
    np.add.at(change, last // PIECE_ROWS + 1, -1)
    late = (np.cumsum(change[:-1], dtype=np.int32) > 0).astype(np.int32)
    # Some at a time, as there are many.
    blocks = (seen.prefix_len + seen.new_len) // _BLOCK_KEYS
    length_class = blocks * LENGTH_CLASSES // max(1, int(blocks.max(initial=0)))
    first = begin // (PIECE_ROWS * _TOGETHER)
    many = last // (PIECE_ROWS * _TOGETHER) - first + 1
    some, of = _runs(first, many).astype(np.int64), request.repeat(many)
    some = some[np.lexsort((-some, of, -length_class[of]))]
    _, where = np.unique(some, return_index=True)
    needed = (some[np.sort(where)][:, None] * _TOGETHER + np.arange(_TOGETHER)[::-1]).ravel()
    needed = needed[needed < pieces]
    return needed[late[needed] == 1], late


def _where(plan: Layout, pieces: Pieces) -> tuple[IntArray, IntArray, IntArray]:
    """Of each the request, the rank that has it, and its place among the new tokens of the request."""
    request = plan.chunk_table.request[pieces.entry]
    return request, plan.chunk_table.rank[pieces.entry], pieces.token - exclusive_cumsum(plan.extend_lens)[request]


def _runs(first: IntArray, lengths: IntArray) -> Int32Array:
    """One run of numbers after another."""
    return expand_runs_on_host(first, lengths, int(lengths.sum()))
