"""K and V rows that other ranks' queries see, sent to those ranks alone, and put where they belong from there."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from cpattn.exchange.message import KVFormat
from cpattn.exchange.seen_keys import ExchangedRows
from cpattn.moves.moves import moves_for
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport


class NeededRows:
    """:class:`cpattn.transports.rows_of_all.RowsInOrder` of what a rank's queries see. Rows are numbered as in
    :class:`ExchangedRows`: this rank's own, and then what it has received.

    Attributes:
        memory: of the rows; own: of this rank's among them.

    Args:
        kv: of one group of heads.
        memory: ``[own + received, heads, width]`` for those, or for what is received alone where a rank neither sends nor gathers
            its own; message: ``[sent, heads, width]`` for the others.
        transfer: that brings the rows; None where none travel, on no rank.
    """

    def __init__(self, kv: KVFormat, table: ExchangedRows, memory: Tensor, message: Tensor, transfer: Transfer | None) -> None:
        self.memory = memory
        self.own = memory[: len(memory) - sum(table.received)]
        self._message, self._outgoing, self._numbers = message, table.outgoing, table.numbers
        self._moves = moves_for(kv.device)
        self.transfer = transfer

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        """See :class:`RowsInOrder`, as for the others."""
        if len(self.own):
            self._moves.pack(self.own, k, v, num_tokens, self._numbers)
        if len(self._message):
            self._moves.gather_rows(self._message, self.own, self._outgoing)

    def gather(self, out: Tensor, index: Tensor, slots: Tensor | None) -> None:
        """Puts them in order."""
        self._moves.gather_rows(out, self.memory, index, slots)


def needed_rows(transport: Transport, kv: KVFormat, table: ExchangedRows, own: int, groups: int, travel: bool) -> list[NeededRows] | None:
    """Of ``groups`` groups of KV heads; ``kv`` is of one of them. None where the transport cannot send such messages.

    Args:
        own: rows of this rank that are sent or gathered: those of the table, or 0.
        travel: whether any rank lacks a row.
    """
    memory = group_buffers(transport, "needed", kv, groups, own + sum(table.received))
    messages = group_buffers(transport, "needed by others", kv, groups, sum(table.sent))
    made = []
    for rows, message in zip(memory, messages, strict=True):
        transfer = None
        if travel:
            transfer = transport.prepare_uneven_all_to_all(rows[own:], message, table.received, table.sent)
            if transfer is None:
                return None
            transfer = transfer._replace(fill_missing=partial(kv.fill_missing_, message))
        made.append(NeededRows(kv, table, rows, message, transfer))
    return made


def group_buffers(transport: Transport, name: str, kv: KVFormat, groups: int, rows: int) -> Tensor:
    """Memory for so many rows of each group of heads; group after group, so that each is one message."""
    return transport.arena.buffer(name, (groups, rows, kv.heads, kv.width), kv.wire_dtype, kv.device)
