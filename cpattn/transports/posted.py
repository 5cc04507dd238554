"""A message that a rank posts in memory of its own, for the others to pull."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from cpattn.memo import Memo
from cpattn.transports.transfer import Transfer

if TYPE_CHECKING:
    from cpattn.moves.peer_moves import Board

T = TypeVar("T")


class OwnMemory:
    """Where this rank's own message lies in memory that others read: uint8 ``[nbytes]``."""

    __slots__ = ("_views", "whole")

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self._views: Memo[Hashable, Any] = Memo(16)

    def seen_as(self, key: Hashable, make: Callable[[Tensor], T]) -> T:
        """What ``make`` makes of it: views, which would cost a call several microseconds. They are kept as long as the memory is."""
        found: T | None = self._views.get(key)
        if found is None:
            # Views made under inference_mode could not be written outside of it.
            with torch.inference_mode(False):
                found = self._views.keep(key, make(self.whole))
        return found


class HostTurns(Protocol):
    """Where the hosts of ranks wait for each other before they launch, so that no kernel has to wait."""

    def await_readers(self, board: Board, first: bool) -> None:
        """Until all ranks have launched what reads this rank's last message on this board; with ``first`` on all boards."""

    def await_posts(self, board: Board, first_rank: int, many: int) -> None:
        """Until ``many`` ranks from ``first_rank`` on, around the ring, have launched what posts their messages on this board."""

    def note_post(self, board: Board) -> None:
        """What posts this rank's message has been launched."""

    def note_read(self, board: Board) -> None:
        """What reads the others' messages has been launched."""


class Posted:
    """A message of one rank, in memory that the others can read. Who launches what posts it, or what pulls the others', does so
    between a begin and an end.

    Attributes:
        nbytes: of it.
        otherwise: the same transfer as a collective, for those who start it outside of a call.
        form: how it is laid out: 0 for this rank's rows or bytes in turn, 1 to 3 for keys in an order
            (:class:`cpattn.exchange.key_order.Ordered`). Ranks whose forms differ would read each other's wrongly.
        board: where it lies in the call that is under way; memory: the same as this rank's memory.
        turns: what hosts wait by; None where devices wait.
        is_pulled: whether this rank has pulled the others' since it posted its own.
    """

    __slots__ = ("board", "form", "is_pulled", "memory", "nbytes", "otherwise", "turns")

    def __init__(self, nbytes: int, otherwise: Transfer | None = None, form: int = 0) -> None:
        self.nbytes = nbytes
        self.otherwise = otherwise
        self.form = form
        self.board: Board | None = None
        self.memory: OwnMemory | None = None
        self.turns: HostTurns | None = None
        self.is_pulled = True

    def begin_post(self, first: bool) -> Board:
        """Where it goes; ``first`` says whether it is the first of its call."""
        board = self.board
        if board is None:
            raise AssertionError("a transfer was started that its call has not announced")
        if self.turns is not None:
            self.turns.await_readers(board, first)
        self.is_pulled = False
        return board

    def end_post(self) -> None:
        """It has been posted."""
        if self.turns is not None:
            assert self.board is not None
            self.turns.note_post(self.board)

    def begin_pull(self, first_rank: int = 0, many: int | None = None) -> Board:
        """Where those of so many ranks lie, of all by default."""
        board = self.board
        assert board is not None  # it has been posted
        if self.turns is not None:
            self.turns.await_posts(board, first_rank, board.size if many is None else many)
        return board

    def end_pull(self) -> None:
        """Whatever this rank reads of the others' has been read."""
        self.is_pulled = True
        if self.turns is not None:
            assert self.board is not None
            self.turns.note_read(self.board)


class Poster(Protocol):
    """A transport over which messages are posted."""

    def begin_post(self, message: Posted) -> tuple[Board, bool]:
        """Where a message is posted that is about to be, and whether it is the first of its call."""

    def on_device(self) -> AbstractContextManager[Any]:
        """Within which kernels are launched on the messages' device."""
