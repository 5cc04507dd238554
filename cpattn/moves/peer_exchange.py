"""Each rank's rows in order where the others read them, and theirs brought beside the attention: one launch for both."""

# mypy: allow-untyped-calls
from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor

from cpattn.kernels.arguments import Words
from cpattn.kernels.arrival_layout import PIECE_ROWS
from cpattn.kernels.attention_config import ROOM_REGISTERS
from cpattn.kernels.launch import Launcher, LaunchFunction
from cpattn.kernels.peer_exchange import exchange_rows_kernel
from cpattn.moves.late_rows import LateRows
from cpattn.moves.peer_moves import Board, arguments_of_rows, kind_of_rows, row_words


class _Programs(NamedTuple):
    """How a message is moved.

    Attributes:
        posting: programs at most that post; pulling: those of them that go on to wait and to pull, at most, and on how many of a GPU's
            multiprocessors, one of so many: while they wait, all that post have to find place.
        registers: of a thread, at most, or None.
        post_bytes: of K that a program posts at once.
        pull_words: that it pulls at a time, of 8 bytes for all aligned rows, from 2 ``stages`` on to shared memory, and with more for
            ``stages`` - 2 later times as well; part_words: of those that go through its registers at once.
    """

    posting: int
    pulling: int
    share: int
    warps: int
    registers: int | None
    post_bytes: int
    pull_words: int
    part_words: int
    stages: int

    def blocks(self, width: int) -> dict[str, Any]:
        """Of rows of ``width`` words: columns of a piece, and if there are not so many, more pieces, of which a part is as wide as 128
        bytes where they are. Of narrower ones no more, whose places would not fit shared memory beside them."""
        columns = min(self.pull_words // PIECE_ROWS, triton.next_power_of_2(width))
        together = min(self.pull_words // columns, self.part_words // 16) // PIECE_ROWS
        part = min(columns, self.part_words // (PIECE_ROWS * together))
        return {"TOGETHER": together, "COLUMNS": columns, "BLOCK_W": part, "STAGES": self.stages}


# On so few multiprocessors that others stay free for the attention and for what other groups do. Each has as many threads as a
# multiprocessor takes, so that few of them have enough bytes on their way, in their registers: through shared memory they took 92 us in
# place of 75 for 16 MiB of others' rows. Beside the attention on all multiprocessors it took longer, too.
LONG = _Programs(
    posting=132, pulling=24, share=4, warps=32, registers=None, post_bytes=16384, pull_words=16384, part_words=16384, stages=1
)  # fmt: skip
# Of a short message the attention has one tile for each multiprocessor, and would wait for those that others pull on. So these are small
# enough to run beside it, on the registers and in the shared memory that it leaves, and have twice as many bytes on their way as those
# registers hold. While one group's wait, half of the multiprocessors have no place for what takes one as a whole; half as many took 10 us
# longer for 8 MiB.
SHORT = _Programs(
    posting=1024, pulling=66, share=2, warps=4, registers=ROOM_REGISTERS, post_bytes=4096, pull_words=2048, part_words=512, stages=2
)  # fmt: skip

# What a launch does: all of it, or the first or the last part.
Part: TypeAlias = Literal["all", "post", "pull"]
# K, V and the number of tokens, as :meth:`cpattn.moves.moves.Moves.pack` takes them.
Given: TypeAlias = "tuple[Tensor, Tensor | None, int | Tensor]"

_exchange_rows = Launcher(exchange_rows_kernel)


def exchange_rows(board: Board, like: Tensor, rows: int, given: Given, late: LateRows, part: Part = "all", *, shares: bool = False) -> None:
    """Puts rows of K and V side by side in this rank's message ``[rows, Hkv, width]``, once everybody has read the last one, and brings
    what comes late of it from the others' messages, once those lie there. The kernel leaves most multiprocessors, or room on each, to
    one that is launched next as a dependent, which may begin as soon as they lie there.

    Args:
        like: of a row.
        late: says in which rows of the message this rank's go, and which ones of others'.
        shares: whether all ranks launch on one stream, one part after another.
    """
    k, v, _ = given
    key = *board[1:], part, shares, rows, like.shape, *kind_of_rows(k, v), late.places.shape, late.order.shape, late.side_by_side
    launch = _exchange_rows.prepared.get(key) or _exchange_rows.prepared.keep(key, _prepare(board, like, rows, given, late, part, shares))
    launch(board.table, k, k if v is None else v, like, late.own_rows, late.places, late.source, late.order, late.flags)


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; the interpreter stands in for a large GPU."""
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


_TENSORS = ("table", "k", "v", "like", "own_rows", "places", "source", "order", "flags")


def _prepare(board: Board, like: Tensor, rows: int, given: Given, late: LateRows, part: Part, shares: bool) -> LaunchFunction:
    how = SHORT if late.side_by_side else LONG
    own: dict[str, Any] = arguments_of_rows(given[0], given[1], how.post_bytes)
    word, width, _, unit = row_words(like)
    few = max(1, min(how.pulling, _processors(like.device) // how.share, late.order.shape[0] - 1))
    programs = few if part == "pull" else max(few, min(how.posting, triton.cdiv(late.places.shape[0] * own["HEADS"], own["BLOCK_R"])))
    options = {"num_warps": how.warps} | ({} if how.registers is None else {"maxnreg": how.registers})
    return _exchange_rows.prepare(
        (programs, 1), options, {name: i for i, name in enumerate(_TENSORS)},
        table=board.table, like=Words(like, word), own_rows=late.own_rows, places=late.places, source=late.source,
        order=late.order, flags=late.flags,
        offset=board.offset, size=board.size_word, num_rows=rows, few=few,
        WIDTH=width, UNIT=unit, PIECE=PIECE_ROWS, **how.blocks(width),
        POSTS=part != "pull", PULLS=part != "post", SHARES=shares, FLAGS=board.flags(how.warps, True), **own, **board.place(how.warps),
    )  # fmt: skip
