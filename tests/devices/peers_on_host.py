"""Ranks in threads that read each other's rows as over peers' memory, and how many each of them has read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cpattn
from cpattn.moves import torch_moves
from cpattn.transports.transfer import Transfer


class HostRows:
    """:class:`cpattn.transports.rows_of_all.RowsOfPeers`, but for keys that come late. All rows are there, and those that are read
    are counted."""

    def __init__(self, transport: cpattn.Transport, memory: Tensor, fill_missing: Callable[[Tensor], None]) -> None:
        self._rows = len(memory) // transport.size
        self._all, self._own = memory, memory[transport.rank * self._rows :][: self._rows]
        self._rank = transport.rank
        gather = transport.prepare_all_gather(memory, self._own)
        self.transfer: Transfer = gather._replace(fill_missing=lambda: fill_missing(self._own), nbytes=0)
        self._read: list[int] = []

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        torch_moves.pack(self._own, k, v, num_tokens)

    def gather(self, out: Tensor, index: Tensor, slots: Tensor | None) -> None:
        self._note(index if slots is None else torch.where(slots >= 0, index, -1))
        torch_moves.gather_rows(out, self._all, index, slots)

    def write_pages(
        self, k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor | None, request: Any, position: Tensor, part: str = "only"
    ) -> None:
        self._note(torch.where(position >= 0, torch.arange(len(position)), -1))
        k, v = self._all[..., : k_pages.shape[3]], None if v_pages is None else self._all[..., k_pages.shape[3] :]
        torch_moves.write_pages(k_pages, v_pages, page_table, request, position, k, v)

    def _note(self, index: Tensor) -> None:
        self._read.append(int(((index >= 0) & (index // self._rows != self._rank)).sum()))

    def take_read(self) -> list[int]:
        """How many rows of others each read since the last time has brought."""
        read, self._read = self._read, []
        return read


def let_read(transport: cpattn.Transport) -> list[HostRows]:
    """Has a transport's ranks read each other's rows from now on; what is made for its calls."""
    made: list[HostRows] = []

    def rows_of_all(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, fill_missing: Any) -> HostRows:
        made.append(HostRows(transport, torch.empty(transport.size * shape[0], *shape[1:], dtype=dtype), fill_missing))
        return made[-1]

    setattr(transport, "rows_of_all", rows_of_all)  # noqa: B010 - it has another type
    return made
