"""K and V rows of all ranks, as a strategy gathers them: what it sends, and where the others' go.

Over a transport whose ranks read each other's memory, rows go from where they lie straight to their places; over any other
they are gathered first, and put in their places from there.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from cpattn.transports.posted import OwnMemory
from cpattn.transports.transfer import Transfer

Part: TypeAlias = Literal["only", "first", "last"]


class SentRows(Protocol):
    """One call's use: ``put``, then start the transfer and wait for it."""

    @property
    def transfer(self) -> Transfer | None:
        """That brings the rows, or makes them known; None where none travel, on no rank."""

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        """Says what this rank sends, as :meth:`cpattn.moves.moves.Moves.pack`. K and V stay as they are until the transfer has been waited
        for."""


class RowsInOrder(SentRows, Protocol):
    """Then ``gather``, once: after it the other ranks may write over what was read."""

    def gather(self, out: Tensor, index: Tensor, slots: Tensor | None) -> None:
        """Puts rows in order, as :meth:`cpattn.moves.moves.Moves.gather_rows`."""


class RowsOfAll(RowsInOrder, Protocol):
    """Of all ranks, rank after rank: ``gather`` is from ``[size * rows, Hkv, width]``. In its place, ``write_pages``."""

    @property
    def transfer(self) -> Transfer:
        """That brings the rows, or makes them known."""

    def write_pages(
        self, k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor | None, request: Tensor | None, position: Tensor
    ) -> None:
        """Writes all ranks' rows, rank after rank, to pages, as :meth:`cpattn.moves.moves.Moves.write_pages`."""


class RowsOfPeers(RowsOfAll, Protocol):
    """Where ranks read each other's memory ``write_pages`` can do it in two parts."""

    def write_pages(
        self,
        k_pages: Tensor,
        v_pages: Tensor | None,
        page_table: Tensor | None,
        request: Tensor | None,
        position: Tensor,
        part: Part = "only",
    ) -> None:
        """Those rows whose position is not negative are read; after the ``"first"`` part of them there comes a ``"last"`` one."""


class LateRowsOfPeers(SentRows, Protocol):
    """Where ranks read each other's memory, messages ``[rows, Hkv, width]`` whose rows each rank has in an order of its own. This rank's
    are in their places once the transfer has been waited for, and the others' come late. A kernel that is launched next, as a dependent,
    may begin at once, and waits for each piece; any other begins when all are there."""

    @property
    def transfer(self) -> Transfer:
        """That makes this rank's known, and brings the others'."""

    @property
    def memory(self) -> OwnMemory:
        """This rank's message, from the beginning of the call on until its next transfer."""
