"""Keys in order of which those of other ranks come late: while the attention runs, which begins with those that are here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor, int32

from cpattn.device_tables import DeviceTables, IntArray, exclusive_cumsum, expand_runs_on_host
from cpattn.exchange.key_order import RequestRows
from cpattn.exchange.message import Message
from cpattn.exchange.strategy import Setup
from cpattn.kernels.arrival_layout import FIRST_FLAG, PIECE_ROWS
from cpattn.kernels.tiles import LENGTH_CLASSES
from cpattn.keys import Arrivals
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.needed_keys import SeenKeys
from cpattn.moves.late_rows import LateRows
from cpattn.transports.rows_of_all import RowsOfPeers
from cpattn.transports.transfer import Transfer

# Of most shapes of tiles.
_BLOCK_KEYS = 128


class LateRowsOfPeers(NamedTuple):
    """:class:`cpattn.transports.rows_of_all.RowsInOrder` of which this rank's are in their places as soon as they are sent, and others'
    come while the attention runs.

    Attributes:
        arrivals: by which it waits for them.
    """

    peers: RowsOfPeers
    late: LateRows
    arrivals: Arrivals

    @classmethod
    def of(cls, setup: Setup, peers: RowsOfPeers, ordered: Message) -> LateRowsOfPeers:
        """In the memory of keys in order."""
        tables = late_tables(setup.meta, setup.problem.window, setup.reads_prefix)
        flags = setup.transport.arena.buffer("arrivals", (FIRST_FLAG + tables.late.shape[0],), int32, setup.problem.device)
        # No word may be a turn to come; the number of the turn goes on, as other calls in this memory count by it.
        flags[1:].copy_(flags[:1].expand(len(flags) - 1))
        late = LateRows(ordered.whole, tables.own_rows, tables.source, tables.order, flags)
        return cls(peers, late, Arrivals(flags, tables.late))

    @property
    def transfer(self) -> Transfer:
        """That makes this rank's known."""
        return self.peers.transfer

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        """See :class:`RowsInOrder`."""
        self.peers.put(k, v, num_tokens, self.late)

    def gather(self, out: Tensor, index: Tensor, slots: Tensor | None) -> None:
        """Has the others' come, to where ``out``, ``index`` and ``slots`` say as well: what nobody sees stays as it is."""
        self.peers.bring(self.late)


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
    begin = token + (rows.new_starts - exclusive_cumsum(plan.extend_lens))[request]
    own_rows, source = np.full(meta.rows, -1, dtype=np.int64), np.full(pieces * PIECE_ROWS, -1, dtype=np.int64)
    is_own = owner == meta.cp_rank
    own_rows[_runs(sent[is_own], length[is_own])] = _runs(begin[is_own], length[is_own])
    is_late = ~is_own & (length > 0)
    request, begin, length = request[is_late], begin[is_late], length[is_late]
    source[_runs(begin, length)] = _runs((owner * meta.rows + sent)[is_late], length)
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
