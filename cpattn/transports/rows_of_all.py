"""K and V rows of all ranks, as a strategy gathers them: what it sends, and where the others' go.

Over a transport whose ranks read each other's memory, rows go from where they lie straight to their places; over any other
they are gathered first, and put in their places from there.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cpattn.transports.transfer import Transfer


class RowsOfAll(Protocol):
    """One call's use: ``put``, then start the transfer and wait for it, then ``gather`` or ``write_pages``, one of them and once:
    after it the other ranks may write over what was read."""

    @property
    def transfer(self) -> Transfer:
        """That brings the rows, or makes them known."""

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        """Says what this rank sends, as :meth:`cpattn.moves.moves.Moves.pack`. K and V stay as they are until the transfer has begun."""

    def gather(self, out: Tensor, index: Tensor, slots: Tensor | None) -> None:
        """Puts all ranks' rows in order, as :meth:`cpattn.moves.moves.Moves.gather_rows` from ``[size * rows, Hkv, width]``."""

    def write_pages(
        self, k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor | None, request: Tensor | None, position: Tensor
    ) -> None:
        """Writes all ranks' rows, rank after rank, to pages, as :meth:`cpattn.moves.moves.Moves.write_pages`."""
