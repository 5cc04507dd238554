"""Rows of all ranks that each rank reads where they lie: in the memory of the others' GPUs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cpattn.errors import GroupError
from cpattn.moves.late_rows import LateRows
from cpattn.moves.peer_exchange import Given, exchange_rows
from cpattn.moves.peer_exchange import Part as ExchangePart
from cpattn.moves.peer_moves import Board, Pages, post_rows, pull_pages, pull_rows
from cpattn.transports.posted import OwnMemory, Posted, Poster
from cpattn.transports.rows_of_all import Part
from cpattn.transports.transfer import Transfer, Work


class _PostedRows:
    """What this rank posts of K and V."""

    def __init__(self, message: Posted, nbytes: int, rows: int, like: Tensor, fill_missing: Callable[[Tensor], None]) -> None:
        """``rows``: this rank's; ``like``: of one; ``nbytes``: that count as sent. For the others see :class:`PeerRows`."""
        self._message = message
        self._rows = rows
        self._like = like
        self._fill_missing = fill_missing
        self._nbytes = nbytes
        self._given: Given | None = None

    @property
    def transfer(self) -> Transfer:
        """That posts it. It is not kept: without the cycle the tables of a batch are freed with it."""
        return Transfer(_post, self._nbytes, (self,), self._forget, posted=self._message)

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        self._given = k, v, num_tokens

    def _forget(self) -> None:
        self._given = None

    def _take_given(self) -> Given:
        """What was put, or, if that is nothing, what stands for it."""
        given, self._given = self._given, None
        if given is None:
            # One row for all: a rank may be here since it has no memory.
            missing = torch.empty_like(self._like)
            self._fill_missing(missing)
            given = missing.expand(self._rows, -1, -1), None, self._rows
        return given

    @abstractmethod
    def post(self, transport: Poster) -> Work:
        """Posts it."""


class PeerRows(_PostedRows):
    """:class:`cpattn.transports.rows_of_all.RowsOfPeers` of messages ``[rows, Hkv, width]`` that are posted.

    Args:
        message: that this rank posts; nbytes: that count as sent for it.
        fill_missing: writes into a message what stands for rows that this rank could not make.
    """

    def __init__(
        self,
        message: Posted,
        nbytes: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        fill_missing: Callable[[Tensor], None],
    ) -> None:
        super().__init__(message, nbytes, shape[0], torch.empty(1, *shape[1:], dtype=dtype, device=device), fill_missing)

    def post(self, transport: Poster) -> Work:
        """Posts it; the kernel that pulls waits for the others' rows."""
        board, is_first = transport.begin_post(self._message)
        with transport.on_device():
            post_rows(board, self._rows, *self._take_given(), first=is_first)
        self._message.end_post()
        return Work(_nothing)

    def gather(self, out: Tensor, index: Tensor, slots: Tensor | None) -> None:
        pull_rows(self._message.begin_pull(), self._rows, out, index, slots)
        self._message.end_pull()

    def write_pages(
        self,
        k_pages: Tensor,
        v_pages: Tensor | None,
        page_table: Tensor | None,
        request: Tensor | None,
        position: Tensor,
        part: Part = "only",
    ) -> None:
        pull_pages(self._message.begin_pull(), self._rows, Pages(k_pages, v_pages, page_table, request, position), part)
        if part != "first":
            self._message.end_pull()


class PeerRowsInOrder(_PostedRows):
    """:class:`cpattn.transports.rows_of_all.LateRowsOfPeers`.

    Args:
        rows: of the message.
        like: ``[1, Hkv, width]``.
        late: where rows go. For the others see :class:`PeerRows`.
    """

    def __init__(
        self, message: Posted, nbytes: int, rows: int, like: Tensor, fill_missing: Callable[[Tensor], None], late: LateRows
    ) -> None:
        super().__init__(message, nbytes, late.rows, like, fill_missing)
        self._rows_in_order = rows
        self._late = late
        # What stands for K and V where nobody looks at them, as nothing is posted.
        self._nothing: Given = like.expand(late.rows, -1, -1), None, late.rows

    @property
    def memory(self) -> OwnMemory:
        memory = self._message.memory
        assert memory is not None  # it was placed as the call began
        return memory

    def post(self, transport: Poster) -> Work:
        """Posts it at once where ranks share a stream, or where more is put beside it. As a rule whoever waits does both in one launch."""
        if self._message.turns is None and not self._late.between:
            return _Once(partial(self._post_and_pull, transport))
        board, _ = transport.begin_post(self._message)
        self._exchange(transport, board, self._take_given(), "post")
        self._message.end_post()
        return Work(partial(self._pull, transport))

    def _post_and_pull(self, transport: Poster) -> None:
        board, _ = transport.begin_post(self._message)
        self._exchange(transport, board, self._take_given(), "all")
        self._message.end_pull()

    def _pull(self, transport: Poster) -> None:
        self._exchange(transport, self._message.begin_pull(), self._nothing, "pull")
        self._message.end_pull()

    def _exchange(self, transport: Poster, board: Board, given: Given, part: ExchangePart) -> None:
        with transport.on_device():
            exchange_rows(board, self._like, self._rows_in_order, given, self._late, part, shares=self._message.turns is not None)


class _Once(Work):
    """What must not be done twice: who posts again is one message ahead of the others from then on."""

    def __init__(self, wait: Callable[[], None]) -> None:
        super().__init__(wait)
        self._has_begun = False

    def wait(self) -> None:
        """Raises GroupError where an earlier wait was interrupted, and may have posted."""
        if self._has_begun:
            raise GroupError("a wait was interrupted as it posted this rank's keys, so that nobody knows whether they were sent")
        self._has_begun = True
        super().wait()


def _post(transport: Poster, rows: _PostedRows) -> Work:
    return rows.post(transport)


def _nothing() -> None:
    """Rows are waited for by the kernel that pulls them."""
