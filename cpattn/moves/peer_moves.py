"""Posting this rank's rows in its heap, and pulling all ranks' from theirs: one launch each, after one that waits. None waits on the
host. Rows that come late are of :mod:`cpattn.moves.peer_exchange`."""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor, int8, int16, int32, int64, uint8

from cpattn.kernels.arguments import Words
from cpattn.kernels.launch import Launcher, LaunchFunction
from cpattn.kernels.peer_layout import BOARDS
from cpattn.kernels.peer_rows import (
    await_messages_kernel,
    await_readers_kernel,
    end_copy_kernel,
    post_rows_kernel,
    post_words_kernel,
    pull_pages_kernel,
    pull_rows_kernel,
    pull_words_kernel,
)

# Programs of a pull: enough to fill the links between GPUs. Between two H200 132 took 0 to 6% less of a layer than 264, and leave room on
# each multiprocessor for what other streams run meanwhile.
_PROGRAMS = 132
# Of a post, whose programs have four warps; between two H100 132 and 396 took as long.
_POSTING_PROGRAMS = 264
_POSTING_WARPS = 4
_ROWS = 4
_WARPS = 8
_WORDS = 4096
# What one program posts at a time.
_BYTES = 16384

_post_rows = Launcher(post_rows_kernel)
_post_words = Launcher(post_words_kernel)
_pull_rows = Launcher(pull_rows_kernel)
_pull_pages = Launcher(pull_pages_kernel)
_pull_words = Launcher(pull_words_kernel)
_await_readers = Launcher(await_readers_kernel)
_await_messages = Launcher(await_messages_kernel)
_end_copy = Launcher(end_copy_kernel)


class Board(NamedTuple):
    """A place in every rank's heap where it posts a message, which the others pull.

    Attributes:
        table: int64 ``[size + 1]``: where this rank sees the others' heaps, and the word where its host reads of a fault.
        rank, size: of the group.
        number: of the board.
        offset: of the message in each heap, in bytes; nbytes: of the message.
        form: how it is laid out, 0 to 3; see :class:`cpattn.transports.posted.Posted`.
    """

    table: Tensor
    rank: int
    size: int
    number: int
    offset: int
    nbytes: int
    form: int = 0

    def place(self, warps: int) -> dict[str, Any]:
        """What every kernel takes of it whose programs have so many warps."""
        return {"rank": self.rank, "board": self.number, "WORLD": self.size, "THREADS": 32 * warps}

    @property
    def size_word(self) -> int:
        """By which ranks tell messages apart that are not of one call, or not laid out alike."""
        return (4 * self.nbytes + self.form) % 2**31

    def flags(self, warps: int, first: bool) -> int:
        """How many flags those look at that wait for readers; see :func:`cpattn.kernels.peer_flags.await_readers`."""
        return max(32 * warps, int(triton.next_power_of_2(BOARDS * self.size if first else 1)))


def await_readers(board: Board, first: bool) -> None:
    """Waits until everybody has read the last message; before the first one of a call, all messages of the last call."""
    key = *board[1:], first
    launch = _await_readers.prepared.get(key) or _await_readers.prepared.keep(
        key,
        _await_readers.prepare(
            (1, 1), {"num_warps": 1}, {"table": 0}, table=board.table, FIRST=first, FLAGS=board.flags(1, first), **board.place(1)
        ),
    )
    launch(board.table)


def await_messages(board: Board, first_rank: int, many: int) -> None:
    """Waits until the messages of ``many`` ranks lie there, from ``first_rank`` on, around the ring."""
    key = *board[1:], first_rank, many
    launch = _await_messages.prepared.get(key) or _await_messages.prepared.keep(
        key,
        _await_messages.prepare(
            (1, 1),
            {"num_warps": 1},
            {"table": 0},
            table=board.table,
            size=board.size_word,
            first_rank=first_rank,
            many=many,
            **board.place(1),
        ),
    )
    launch(board.table)


def post_rows(board: Board, rows: int, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, *, first: bool) -> None:
    """Posts K and V side by side as a message ``[rows, Hkv, D + Dv]``, zeros after the tokens, once everybody has read the last one.

    Args:
        k, v, num_tokens: as for :meth:`cpattn.moves.moves.Moves.pack`.
        first: whether it is the first message of its call.
    """
    await_readers(board, first)
    values = k if v is None else v
    counted = (num_tokens,) if isinstance(num_tokens, Tensor) else ()
    key = *board[1:], rows, *kind_of_rows(k, v), None if counted else num_tokens
    launch = _post_rows.prepared.get(key) or _post_rows.prepared.keep(key, _prepare_post_rows(board, rows, k, v, num_tokens))
    launch(board.table, k, values, *counted)


def kind_of_rows(k: Tensor, v: Tensor | None) -> tuple[Any, ...]:
    """What of rows that are posted decides a launch."""
    values = k if v is None else v
    return k.shape, k.stride(), k.dtype, values.shape, values.stride(), v is None


def arguments_of_rows(k: Tensor, v: Tensor | None, at_once: int = _BYTES) -> dict[str, Any]:
    """What a kernel takes of rows that it posts, so many bytes of K at once."""
    _, heads, dim = k.shape
    values, v_dim = k if v is None else v, 0 if v is None else v.shape[2]
    block = max(1, at_once // (k.element_size() * triton.next_power_of_2(max(dim, v_dim))))
    return {
        "k": k, "v": values,
        "k_stride_row": k.stride(0), "k_stride_head": k.stride(1), "v_stride_row": values.stride(0), "v_stride_head": values.stride(1),
        "HEADS": heads, "D": dim, "DV": v_dim, "D_PADDED": triton.next_power_of_2(dim),
        "DV_PADDED": triton.next_power_of_2(max(1, v_dim)), "BLOCK_R": block,
    }  # fmt: skip


def _prepare_post_rows(board: Board, rows: int, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> LaunchFunction:
    given: dict[str, Any] = arguments_of_rows(k, v)
    is_counted = isinstance(num_tokens, Tensor)
    tensors = {"table": 0, "k": 1, "v": 2} | ({"num_tokens": 3} if is_counted else {})
    return _post_rows.prepare(
        (min(_POSTING_PROGRAMS, max(1, triton.cdiv(rows * given["HEADS"], given["BLOCK_R"]))), 1), {"num_warps": _POSTING_WARPS}, tensors,
        table=board.table, offset=board.offset, size=board.size_word, num_rows=rows, num_tokens=num_tokens, COUNT_ON_DEVICE=is_counted,
        **given, **board.place(_POSTING_WARPS),
    )  # fmt: skip


def row_words(out: Tensor) -> tuple[Any, int, int, int]:
    """By which words rows are moved, how many they have, how many they are apart, and how many of them at once."""
    flat = out.flatten(1)
    nbytes = flat.shape[1] * flat.element_size()
    word = _word(out, nbytes, flat.stride(0) * flat.element_size())
    width = nbytes // word.itemsize
    stride = flat.stride(0) * flat.element_size() // word.itemsize
    unit = 16 // word.itemsize
    if width % unit or stride % unit or out.data_ptr() % 16:
        unit = 1
    return word, width, stride, unit


def pull_rows(board: Board, rows: int, out: Tensor, index: Tensor, slots: Tensor | None) -> None:
    """:meth:`cpattn.moves.moves.Moves.gather_rows` from the ``rows`` rows of each rank's message, rank after rank, once they lie there."""
    await_messages(board, 0, board.size)
    key = (
        *board[1:],
        rows,
        out.shape,
        out.stride(),
        out.dtype,
        out.data_ptr() % 16,
        index.shape,
        index.dtype,
        None if slots is None else slots.dtype,
    )
    launch = _pull_rows.prepared.get(key) or _pull_rows.prepared.keep(key, _prepare_pull_rows(board, rows, out, index, slots))
    launch(board.table, out, index, index if slots is None else slots)


def _prepare_pull_rows(board: Board, rows: int, out: Tensor, index: Tensor, slots: Tensor | None) -> LaunchFunction:
    word, width, stride, unit = row_words(out)
    return _pull_rows.prepare(
        (min(_PROGRAMS, max(1, triton.cdiv(index.shape[0], _ROWS))), 1), {"num_warps": _WARPS},
        {"table": 0, "out": 1, "index": 2, "slots": 3},
        table=board.table, out=Words(out, word), index=index, slots=index if slots is None else slots, offset=board.offset,
        num_rows=index.shape[0], rows_of_rank=rows, out_stride=stride // unit, WIDTH=width, UNIT=unit, BLOCK_R=_ROWS,
        BLOCK_W=min(1024, triton.next_power_of_2(width)), SLOTS=slots is not None, **board.place(_WARPS),
    )  # fmt: skip


class Pages(NamedTuple):
    """Where rows go in pages; see :meth:`cpattn.moves.moves.Moves.write_pages`."""

    k_pages: Tensor
    v_pages: Tensor | None
    page_table: Tensor | None
    request: Tensor | None
    position: Tensor


def pull_pages(board: Board, rows: int, pages: Pages, part: str = "only") -> None:
    """:meth:`cpattn.moves.moves.Moves.write_pages` of the rows of all ranks' messages, rank after rank, once they lie there.

    Args:
        part: ``"first"`` leaves the messages to be read again, which the ``"last"`` one does, or ``"only"``.
    """
    if part != "last":
        await_messages(board, 0, board.size)
    k_pages, v_pages, page_table, request, position = pages
    values = k_pages if v_pages is None else v_pages
    key = (
        *board[1:], rows, k_pages.shape, k_pages.stride(), k_pages.dtype, v_pages is None, values.shape, values.stride(),
        None if page_table is None else (page_table.stride(), page_table.dtype),
        None if request is None else request.dtype, position.shape, position.dtype, part == "first",
    )  # fmt: skip
    launch = _pull_pages.prepared.get(key) or _pull_pages.prepared.keep(key, _prepare_pull_pages(board, rows, pages, part != "first"))
    launch(board.table, k_pages, values, position if page_table is None else page_table, position if request is None else request, position)


def _prepare_pull_pages(board: Board, rows: int, pages: Pages, ends: bool) -> LaunchFunction:
    k_pages, v_pages, page_table, request, position = pages
    values = k_pages if v_pages is None else v_pages
    heads, dim, v_dim = k_pages.shape[2], k_pages.shape[3], 0 if v_pages is None else v_pages.shape[3]
    block = max(1, _BYTES // (k_pages.element_size() * triton.next_power_of_2(max(dim, v_dim))))
    return _pull_pages.prepare(
        (min(4 * _PROGRAMS, max(1, triton.cdiv(position.shape[0] * heads, block))), 1), {"num_warps": _WARPS},
        {"table": 0, "k_pages": 1, "v_pages": 2, "page_table": 3, "request": 4, "position": 5},
        table=board.table, k_pages=k_pages, v_pages=values, page_table=position if page_table is None else page_table,
        request=position if request is None else request, position=position, offset=board.offset,
        num_rows=position.shape[0], rows_of_rank=rows,
        page_size=k_pages.shape[1], table_stride_request=0 if page_table is None else page_table.stride(0),
        table_stride_page=0 if page_table is None else page_table.stride(1),
        k_page_stride=k_pages.stride(0), k_page_stride_token=k_pages.stride(1), k_page_stride_head=k_pages.stride(2),
        v_page_stride=values.stride(0), v_page_stride_token=values.stride(1), v_page_stride_head=values.stride(2),
        HEADS=heads, D=dim, DV=v_dim, D_PADDED=triton.next_power_of_2(dim), DV_PADDED=triton.next_power_of_2(max(1, v_dim)),
        BLOCK_R=block, TABLE=page_table is not None, ENDS=ends, **board.place(_WARPS),
    )  # fmt: skip


def post_words(board: Board, x: Tensor, first: bool) -> None:
    """Posts bytes ``[1, n]`` as they are, once everybody has read the last message."""
    await_readers(board, first)
    key = *board[1:], x.nbytes, x.dtype, x.data_ptr() % 16
    launch = _post_words.prepared.get(key)
    if launch is None:
        words = Words(x, _word(x, x.nbytes))
        count = x.nbytes // words.dtype.itemsize
        unit = _unit(words, count, 0)
        launch = _post_words.prepared.keep(key, _post_words.prepare(
            (min(_POSTING_PROGRAMS, max(1, triton.cdiv(count, _WORDS))), 1), {"num_warps": _WARPS}, {"table": 0, "x": 1},
            table=board.table, x=words, offset=board.offset, size=board.size_word, num_units=count // unit, UNIT=unit,
            BLOCK_W=_WORDS, **board.place(_WARPS),
        ))  # fmt: skip
    launch(board.table, x)


def pull_words(board: Board, out: Tensor, first_rank: int, many: int, skip_bytes: int = 0) -> None:
    """Pulls the messages of ``many`` ranks from ``first_rank`` on, around the ring, each from ``skip_bytes`` on: into the
    bytes ``[1, n]`` one rank's, or into their equal parts all ranks'."""
    await_messages(board, first_rank, many)
    key = *board[1:], out.nbytes, out.dtype, out.data_ptr() % 16, first_rank, many, skip_bytes
    launch = _pull_words.prepared.get(key)
    if launch is None:
        words = Words(out, _word(out, out.nbytes // many, skip_bytes))
        count = out.nbytes // many // words.dtype.itemsize
        unit = _unit(words, count, skip_bytes)
        launch = _pull_words.prepared.keep(key, _pull_words.prepare(
            (min(_PROGRAMS, max(1, triton.cdiv(count, _WORDS) * many)), 1), {"num_warps": _WARPS}, {"table": 0, "out": 1},
            table=board.table, out=words, offset=board.offset + skip_bytes, num_units=count // unit, UNIT=unit,
            first_rank=first_rank, many=many, BLOCK_W=_WORDS, **board.place(_WARPS),
        ))  # fmt: skip
    launch(board.table, out)


def end_copy(board: Board, out: Tensor) -> None:
    """Says that a message has been copied to the bytes ``out``, which become NaN where the wait before it has found a fault."""
    key = *board[1:], out.nbytes, out.data_ptr() % 16
    launch = _end_copy.prepared.get(key)
    if launch is None:
        words = Words(out, _word(out, out.nbytes))
        launch = _end_copy.prepared.keep(key, _end_copy.prepare(
            (1, 1), {"num_warps": 1}, {"table": 0, "out": 1}, table=board.table, out=words, num_words=out.nbytes // words.dtype.itemsize,
            BLOCK_W=1024, **board.place(1),
        ))  # fmt: skip
    launch(board.table, out)


def pull_nothing(board: Board) -> None:
    """Waits for all ranks' messages, and has them know that this rank has read them."""
    pull_words(board, board.table.view(1, -1).view(uint8)[:, :0], 0, board.size)


def _unit(words: Words, count: int, skip_bytes: int) -> int:
    """How many words are moved at once: those of 16 bytes, where so many begin and end there."""
    unit = 16 // words.dtype.itemsize
    return unit if count % unit == 0 and skip_bytes % 16 == 0 and words.source.data_ptr() % 16 == 0 else 1


def _word(x: Tensor, *multiples: int) -> Any:
    """The widest word at multiples of which the tensor begins, and of which these numbers of bytes are multiples."""
    sizes = (x.data_ptr(), *multiples)
    return next(word for word in (int64, int32, int16, int8) if all(size % word.itemsize == 0 for size in sizes))
