"""The K and V rows of all ranks where ranks read each other's memory."""

from __future__ import annotations

from cpattn.exchange.message import KVFormat
from cpattn.exchange.strategy import Setup
from cpattn.transports.rows_of_all import RowsOfPeers


def rows_of_peers(setup: Setup, kv: KVFormat) -> list[RowsOfPeers]:
    """Of each group of KV heads, of one of which ``kv`` is; none where they cannot."""
    if not kv.is_dense:
        # What is pulled into pages is K and V alone.
        return []
    shape = setup.meta.rows, kv.heads, kv.width
    found = [setup.transport.rows_of_all(shape, kv.wire_dtype, kv.device, kv.fill_missing_) for _ in range(setup.problem.overlap)]
    return [rows for rows in found if rows is not None]
