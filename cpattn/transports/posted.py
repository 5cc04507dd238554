"""A message that a rank posts in memory of its own, for the others to pull."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from cpattn.transports.transfer import Transfer

if TYPE_CHECKING:
    from cpattn.moves.peer_moves import Board


class Posted:
    """A message of one rank, in memory that the others can read.

    Attributes:
        nbytes: of it.
        otherwise: the same transfer as a collective, for those who start it outside of a call.
        board: where it lies in the call that is under way.
        is_pulled: whether this rank has pulled the others' since it posted its own.
    """

    __slots__ = ("board", "is_pulled", "nbytes", "otherwise")

    def __init__(self, nbytes: int, otherwise: Transfer | None = None) -> None:
        self.nbytes = nbytes
        self.otherwise = otherwise
        self.board: Board | None = None
        self.is_pulled = True


class Poster(Protocol):
    """A transport over which messages are posted."""

    def begin_post(self, message: Posted) -> tuple[Board, bool]:
        """Where a message is posted that is about to be, and whether it is the first of its call."""

    def on_device(self) -> AbstractContextManager[Any]:
        """Within which kernels are launched on the messages' device."""
