"""K and V rows of all ranks, gathered into this rank's memory, and put where they belong from there."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from cpattn.exchange.message import KVFormat, Message
from cpattn.exchange.page_rows import Places, as_bytes, write_rows
from cpattn.kv_cache import PagedKV
from cpattn.moves.moves import moves_for
from cpattn.transports.rows_of_all import RowsOfAll
from cpattn.transports.transport import Transport


class GatheredRows:
    """:class:`cpattn.transports.rows_of_all.RowsOfAll` over any transport.

    Attributes:
        all: of all ranks, rank after rank.
        transfer: that brings the others'.
    """

    def __init__(self, transport: Transport, kv: KVFormat, memory: Tensor) -> None:
        rows = memory.shape[0] // transport.size
        self.all = Message.of(memory, kv)
        # The message is packed where the gather would put it, which spares a copy of it.
        self._own = memory.narrow(0, transport.rank * rows, rows)
        self._moves = moves_for(kv.device)
        self.transfer = transport.prepare_all_gather(memory, self._own)._replace(fill_missing=partial(kv.fill_missing_, self._own))

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        """See :class:`RowsOfAll`, as for the others."""
        self._moves.pack(self._own, k, v, num_tokens)

    def gather(self, out: Tensor, index: Tensor, slots: Tensor | None) -> None:
        """Puts them in order."""
        self._moves.gather_rows(out, self.all.whole, index, slots)

    def write_pages(
        self, k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor | None, request: Tensor | None, position: Tensor
    ) -> None:
        """Writes them to pages."""
        self._moves.write_pages(k_pages, v_pages, page_table, request, position, *self.all.parts)


def put_in_pages(rows: RowsOfAll, kv: KVFormat, places: Places, cache: PagedKV) -> None:
    """What has arrived, to its slots."""
    if isinstance(rows, GatheredRows):
        write_rows(kv, cache, places, *rows.all.parts)
    else:
        rows.write_pages(*as_bytes(kv, cache), cache.page_table, *places)


def gathered_rows(transport: Transport, kv: KVFormat, rows: int, groups: int = 1) -> list[GatheredRows]:
    """Memory for ``groups`` groups of KV heads, ``rows`` rows of each rank; ``kv`` is of one of them."""
    # Group after group, so that each is one message: [groups, rows of all ranks, heads of a group, width].
    shape = groups, transport.size * rows, kv.heads, kv.width
    return [GatheredRows(transport, kv, memory) for memory in transport.arena.buffer("gathered", shape, kv.wire_dtype, kv.device)]
