"""K and V rows of all ranks, as a strategy gathers them: what it sends, and where the others' go.

Over a transport whose ranks read each other's memory, rows go from where they lie straight to their places; over any other
they are gathered first, and put in their places from there.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cpattn.moves.late_rows import LateRows
from cpattn.transports.transfer import Transfer


class RowsOfAll(Protocol):
    """One call's use: ``put``, then start the transfer and wait for it, then ``gather``, ``write_pages`` or ``bring``, one of them and
    once: after it the other ranks may write over what was read."""

    can_bring: bool
    """Whether rows can come late: ``put`` takes them, and ``bring`` is there."""

    @property
    def transfer(self) -> Transfer:
        """That brings the rows, or makes them known."""

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, late: LateRows | None = None) -> None:
        """Says what this rank sends, as :meth:`cpattn.moves.moves.Moves.pack`, and where it goes in order if the others' come late.
        K and V stay as they are until the transfer has begun."""

    def gather(self, out: Tensor, index: Tensor, slots: Tensor | None) -> None:
        """Puts all ranks' rows in order, as :meth:`cpattn.moves.moves.Moves.gather_rows` from ``[size * rows, Hkv, width]``."""

    def write_pages(
        self, k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor | None, request: Tensor | None, position: Tensor
    ) -> None:
        """Writes all ranks' rows, rank after rank, to pages, as :meth:`cpattn.moves.moves.Moves.write_pages`."""

    def bring(self, late: LateRows) -> None:
        """Brings the others' rows. A kernel that is launched next, as a dependent, may begin at once, and waits for each piece; any other
        begins when all are there."""
