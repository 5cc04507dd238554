"""Keys in order of which those of other ranks come late: while the attention runs, which begins with those that are here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor, int32

from cpattn.device_tables import DeviceTables, IntArray
from cpattn.exchange.key_order import KeyOrder, runs
from cpattn.exchange.message import Message
from cpattn.exchange.strategy import Setup
from cpattn.kernels.arrival_layout import FIRST_FLAG, PIECE_ROWS
from cpattn.kernels.tiles import LENGTH_CLASSES
from cpattn.keys import Arrivals, Keys
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.moves.late_rows import LateRows

# Of most shapes of tiles.
_BLOCK_KEYS = 128


class LateKeys(NamedTuple):
    """How they come, and what to attend to."""

    rows: LateRows
    keys: Keys

    @classmethod
    def of(cls, setup: Setup, ordered: Message, order: KeyOrder) -> LateKeys:
        """Of the memory of keys in order."""
        tables = late_tables(setup.meta, order)
        flags = setup.transport.arena.buffer("arrivals", (FIRST_FLAG + tables.late.shape[0],), int32, setup.problem.device)
        # No word may be a turn to come; the number of the turn goes on, as other calls in this memory count by it.
        flags[1:].copy_(flags[:1].expand(len(flags) - 1))
        return cls(
            LateRows(ordered.whole, tables.own_rows, tables.source, tables.order, flags),
            ordered.keys._replace(arrivals=Arrivals(flags, tables.late)),
        )


class LateTables(NamedTuple):
    """Of one rank; see :class:`LateRows` and :class:`Arrivals`."""

    own_rows: Tensor
    source: Tensor
    order: Tensor
    late: Tensor


def late_tables(meta: CPMetadata, order: KeyOrder) -> LateTables:
    """For keys in that order. What no query of this rank sees does not come at all."""
    pieces, in_place = max(1, -(-order.rows // PIECE_ROWS)), order.prefix_places is not None

    def build() -> LateTables:
        # A bucket's next batch has an order of its own; it has no packed cache.
        k_starts = order.k_starts if in_place else meta.k_starts
        tables = DeviceTables(_on_host(meta, k_starts + meta.plan.prefix_lens, pieces), meta.device)
        return LateTables(*(tables[name] for name in LateTables._fields))

    tables: LateTables = meta.derive(("late keys", pieces, in_place), build)
    return tables


def _on_host(meta: CPMetadata, first_key: IntArray, pieces: int) -> dict[str, IntArray]:
    """Given the row of each request's first new token."""
    plan, own, table = meta.plan, meta.chunk_host, meta.plan.chunk_table
    own_rows = runs(first_key[own.request] + own.start, own.q_len, meta.rows)
    # How many of each request's new tokens this rank's queries see.
    seen = np.zeros(len(plan.batch), dtype=np.int64)
    np.maximum.at(seen, own.request, own.start + own.q_len)
    is_late = (table.rank != meta.cp_rank) & (table.start < seen[table.request]) & (table.length > 0)
    request, start, length = table.request[is_late], table.start[is_late], table.length[is_late]
    begin = first_key[request] + start
    source = np.full(pieces * PIECE_ROWS, -1, dtype=np.int64)
    sent = (table.rank * meta.rows + plan.chunk_rows)[is_late]
    source[runs(begin, length)] = runs(sent, length)
    # The attention takes requests of about the longest tiles first, one after the other, and each tile from its last key on.
    blocks = (plan.prefix_lens + seen) // _BLOCK_KEYS
    length_class = blocks * LENGTH_CLASSES // max(1, int(blocks.max(initial=0)))
    first = begin // PIECE_ROWS
    many = (begin + length - 1) // PIECE_ROWS - first + 1
    piece, of = runs(first, many), request.repeat(many)
    piece = piece[np.lexsort((-piece, of, -length_class[of]))]
    _, where = np.unique(piece, return_index=True)
    order = np.full(1 + pieces, -1, dtype=np.int64)
    order[0] = len(where)
    order[1 : 1 + len(where)] = piece[np.sort(where)]
    late = np.zeros(pieces, dtype=np.int64)
    late[piece] = 1
    return {"own_rows": own_rows, "source": source, "order": order, "late": late}
