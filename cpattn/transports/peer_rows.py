"""Rows of all ranks that each rank reads where they lie: in the memory of the others' GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpattn.moves.late_rows import LateRows
from cpattn.moves.peer_moves import Board, Pages, post_rows, pull_pages, pull_pieces, pull_rows
from cpattn.transports.posted import Posted, Poster
from cpattn.transports.transfer import Transfer, Work


class PeerRows:
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
        self._message = message
        self._shape = shape
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._fill_missing = fill_missing
        self._given: tuple[Tensor, Tensor | None, int | Tensor, LateRows | None] | None = None
        self.transfer = Transfer(_post, nbytes, (self,), self._forget, posted=message)

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, late: LateRows | None = None) -> None:
        self._given = k, v, num_tokens, late

    def gather(self, out: Tensor, index: Tensor, slots: Tensor | None) -> None:
        pull_rows(self._board(), self._shape[0], out, index, slots)
        self._message.is_pulled = True

    def write_pages(
        self, k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor | None, request: Tensor | None, position: Tensor
    ) -> None:
        pull_pages(self._board(), self._shape[0], Pages(k_pages, v_pages, page_table, request, position))
        self._message.is_pulled = True

    def bring(self, late: LateRows) -> None:
        pull_pieces(self._board(), self._shape[0], late)
        self._message.is_pulled = True

    def _board(self) -> Board:
        assert self._message.board is not None  # it was placed as the call began
        return self._message.board

    def _forget(self) -> None:
        self._given = None

    def post(self, transport: Poster) -> Work:
        """Posts what was put, or, if that is nothing, what stands for it."""
        board, is_first = transport.begin_post(self._message)
        given, self._given = self._given, None
        rows, heads, width = self._shape
        with transport.on_device():
            if given is None:
                # One row for all: a rank may be here since it has no memory.
                missing = self._like.new_empty(1, heads, width)
                self._fill_missing(missing)
                given = missing.expand(self._shape), None, rows, None
            post_rows(board, rows, *given, first=is_first)
        return Work(_nothing)


def _post(transport: Poster, rows: PeerRows) -> Work:
    return rows.post(transport)


def _nothing() -> None:
    """Rows are waited for by the kernel that pulls them."""
