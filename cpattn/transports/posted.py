"""A message that a rank posts in memory of its own, for the others to pull."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

from cpattn.memo import Memo
from cpattn.transports.transfer import Transfer

if TYPE_CHECKING:
    from cpattn.moves.peer_moves import Board

T = TypeVar("T")


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


class OwnMemory:
    """Where this rank's own message lies in memory that others read: uint8 ``[nbytes]``."""

    __slots__ = ("_views", "whole")

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self._views: Memo[Hashable, Any] = Memo(16)

    def seen_as(self, key: Hashable, make: Callable[[Tensor], T]) -> T:
        """What ``make`` makes of it: views, which would cost a call several microseconds. They are kept as long as the memory is."""
        found: T | None = self._views.get(key)
        return self._views.keep(key, make(self.whole)) if found is None else found


class Poster(Protocol):
    """A transport over which messages are posted."""

    def begin_post(self, message: Posted) -> tuple[Board, bool]:
        """Where a message is posted that is about to be, and whether it is the first of its call."""

    def own_memory(self, message: Posted) -> OwnMemory:
        """Where it lies in the call that is under way."""

    def on_device(self) -> AbstractContextManager[Any]:
        """Within which kernels are launched on the messages' device."""
