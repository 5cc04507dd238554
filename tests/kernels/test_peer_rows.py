"""Kernels that post and pull messages: all ranks in one process, one after another, with heaps that are plain tensors.

What ranks do side by side is tested on GPUs that read each other's memory (tests/gpu/test_peer_memory.py).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from programs.compiling import said_by_compiling
from torch import Tensor

from cpattn.kernels.peer_layout import ALL_READ, BOARDS, FAULT, LIMIT, OTHER_MESSAGE, READY, WAITING, WORD_BYTES, WORDS
from cpattn.moves import torch_moves

pytest.importorskip("triton")
import triton.language as tl

from cpattn.kernels import peer_exchange as exchange_kernel
from cpattn.kernels import peer_flags
from cpattn.kernels.arrival_layout import FIRST_FLAG, PIECE_ROWS, flag_words
from cpattn.moves import peer_exchange, peer_moves
from cpattn.moves.late_rows import LateRows
from cpattn.moves.peer_moves import Board, Pages
from cpattn.transports.peer_rows import PeerRows
from cpattn.transports.posted import Posted

pytestmark = pytest.mark.usefixtures("peer_kernels")
HEADER = -(-WORDS * WORD_BYTES // 256) * 256


class Ranks:
    """Heaps of so many ranks on one device."""

    def __init__(self, size: int, device: str, nbytes: int = 1 << 19) -> None:
        self.size = size
        self.heaps = [torch.zeros(HEADER + nbytes, dtype=torch.uint8, device=device) for _ in range(size)]
        self.fault = torch.zeros(1, dtype=torch.int32, device=device)
        for heap in self.heaps:
            heap.view(torch.int32)[LIMIT] = 1000
        self.table = torch.tensor([*(heap.data_ptr() for heap in self.heaps), self.fault.data_ptr()], device=device)

    def board(self, rank: int, number: int = 0, offset: int = 0, nbytes: int = 64) -> Board:
        return Board(self.table, rank, self.size, number, HEADER + offset, nbytes)

    def flags(self, rank: int, number: int) -> Tensor:
        """Of a rank's heap those for a board: int32 ``[2, size, 2]``, of each rank size and number of what is ready, and of what was
        read."""
        words = self.heaps[rank].view(torch.int32)[READY : READY + 4 * BOARDS * self.size].view(2, BOARDS, self.size, 2)
        return words[:, number]

    def ready(self, rank: int, number: int) -> list[int]:
        """Which messages of each rank lie there."""
        return [int(word) for word in self.flags(rank, number)[0, :, 1]]

    def read(self, rank: int, number: int) -> list[int]:
        """Which messages of this rank each has read."""
        return [int(word) for word in self.flags(rank, number)[1, :, 1]]


def message_of(rows: int, tensors: tuple[Tensor, Tensor | None], tokens: int) -> Tensor:
    """What should lie in a heap."""
    k, v = tensors
    width = k.shape[2] + (0 if v is None else v.shape[2])
    message = torch.empty(rows, k.shape[1], width, dtype=k.dtype, device=k.device)
    torch_moves.pack(message, k, v, tokens)
    return message


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("heads", "dims", "dtype"),
    [(2, (64, 64), torch.bfloat16), (1, (576, None), torch.bfloat16), (3, (40, 24), torch.float32), (1, (5, 3), torch.float16)],
    ids=str,
)
def test_rows_in_order(size: int, heads: int, dims: tuple[int, int | None], dtype: torch.dtype, device: str) -> None:
    """Twice over the same board, as two layers do; padding is NaN where it is not read."""
    torch.manual_seed(0)
    ranks, rows, count = Ranks(size, device), 11, 20
    width = dims[0] + (dims[1] or 0)
    index = torch.randperm(size * rows, device=device)[:count]
    index[[3, 5]] = -1
    slots = torch.randperm(40, device=device)[:count]
    slots[7] = -1
    for _ in range(2):
        gathered = []
        for rank in range(size):
            tokens = rows - rank
            k = torch.randn(rows, 2 * heads, dims[0], dtype=dtype, device=device)[:, heads:]
            v = None if dims[1] is None else torch.randn(rows, heads, dims[1], dtype=dtype, device=device)
            for x in (k, v):
                if x is not None:
                    x[tokens:] = torch.nan
            num_tokens: int | Tensor = tokens if rank % 2 else torch.tensor([tokens], dtype=torch.int32, device=device)
            peer_moves.post_rows(ranks.board(rank), rows, k, v, num_tokens, first=True)
            gathered.append(message_of(rows, (k, v), tokens))
        for rank in range(size):
            for places in (None, slots):
                got = torch.full((40 if places is not None else count, heads, width), 7.0, dtype=dtype, device=device)
                want = got.clone()
                peer_moves.pull_rows(ranks.board(rank), rows, got, index, places)
                torch_moves.gather_rows(want, torch.cat(gathered), index, places)
                assert torch.equal(got, want)


@contextmanager
def looking_at_what_is_announced(flags: Tensor, turn: int, message: Tensor, want: Tensor) -> Iterator[None]:
    """Whether each piece lies there when it is said to, and all of them when that is said; the interpreter can look."""
    announce = vars(exchange_kernel)["announce"]

    def announce_and_look(*given: Any) -> None:
        announce(*given)
        if flags[1] == turn:
            assert torch.equal(message, want)
        for piece in (flags[FIRST_FLAG:] == turn).nonzero().ravel().tolist():
            rows = slice(piece * PIECE_ROWS, (piece + 1) * PIECE_ROWS)
            assert torch.equal(message[rows], want[rows])

    with pytest.MonkeyPatch.context() as patch:
        if flags.device.type == "cpu":
            patch.setattr(exchange_kernel, "announce", announce_and_look)
        yield


@pytest.mark.parametrize("side_by_side", [True, False], ids=["small programs", "large programs"])
@pytest.mark.parametrize(
    ("heads", "dims", "dtype", "held"),
    [
        (2, (64, 64), torch.bfloat16, 8),
        (17, (128, 128), torch.bfloat16, 8),
        (1, (576, None), torch.bfloat16, 2),
        (1, (5, 3), torch.float16, 8),
    ],
    ids=str,
)
def test_rows_that_come_late(
    heads: int,
    dims: tuple[int, int | None],
    dtype: torch.dtype,
    held: int,
    side_by_side: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Own rows lie in order once a message is posted, those of others come piece by piece, and each says so: turn after turn. Of more
    ranks than are ``held`` addresses are looked up."""
    if device == "cpu":
        monkeypatch.setattr(exchange_kernel, "_HELD_HEAPS", tl.constexpr(held))
    torch.manual_seed(0)
    size, rows, pieces, width = 3, 20, 12, dims[0] + (dims[1] or 0)
    ranks, mine = Ranks(size, device), 1
    # The last piece has fewer rows, and what follows in memory is somebody else's.
    num_rows = pieces * PIECE_ROWS - 3
    # Each rank has its rows where it likes; the last one's last row has no place.
    places = [torch.randperm(num_rows, device=device)[:rows].int() for _ in range(size)]
    places[2][-1] = -1
    # Those that have one in any order; a bucket's table is as long as ever.
    own_rows = []
    for to in places:
        listed = torch.randperm(rows, device=device)
        listed = listed[to[listed] >= 0]
        more = torch.full((rows - len(listed),), -1, dtype=torch.int32, device=device)
        count = torch.tensor([len(listed)], dtype=torch.int32, device=device)
        own_rows.append((torch.cat([count, listed.int(), more]), torch.cat([to[listed], more])))
    # Of the others' rows some come, to where this rank has none of its own; none come to piece 2.
    free = torch.tensor([row for row in range(num_rows) if row not in places[mine].tolist() and row // PIECE_ROWS != 2], device=device)
    theirs = torch.cat([rank * num_rows + places[rank][:-1] for rank in (0, 2)])
    source = torch.full((pieces * PIECE_ROWS,), -1, dtype=torch.int32, device=device)
    source[free[: len(theirs)]] = theirs[torch.randperm(len(theirs), device=device)][: len(free)].int()
    order = torch.tensor([11, 3, 0, 1, *range(4, 12), -1], dtype=torch.int32, device=device)
    in_turn = torch.full((pieces, PIECE_ROWS), -1, dtype=torch.int32, device=device)
    in_turn[:11] = source.view(pieces, PIECE_ROWS)[order[1:12]]
    flags = torch.zeros(flag_words(pieces), dtype=torch.int32, device=device)
    shape, nbytes = (num_rows, heads, width), num_rows * heads * width * dtype.itemsize
    messages = [heap[HEADER : HEADER + nbytes].view(dtype).view(shape) for heap in ranks.heaps]
    after = ranks.heaps[mine][HEADER + nbytes :]
    # Two programs pull some pieces each. The last turn posts and pulls in one launch, of one program here, as others would wait for each
    # other.
    how = "SHORT" if side_by_side else "LONG"
    programs = getattr(peer_exchange, how)._replace(pulling=2)
    words = ranks.heaps[mine].view(torch.int32)
    for turn in (1, 2, 3):
        monkeypatch.setattr(peer_exchange, how, programs._replace(posting=1, pulling=1) if turn == 3 else programs)
        want, given = [], []
        for rank in range(size):
            k = torch.randn(rows, heads, dims[0], dtype=dtype, device=device)
            v = None if dims[1] is None else torch.randn(rows, heads, dims[1], dtype=dtype, device=device)
            given.append((k, v, rows))
            messages[rank].fill_(7.0)
            want.append(torch.full(shape, 7.0, dtype=dtype, device=device))
            has_place = places[rank] >= 0
            want[rank][places[rank][has_place].long()] = message_of(rows, (k, v), rows)[has_place]
        # Each has flags of its own.
        each_flags = [flags if rank == mine else torch.zeros_like(flags) for rank in range(size)]
        lates = [LateRows(rows, *own_rows[rank], in_turn.ravel(), order, each_flags[rank], 1, side_by_side) for rank in range(size)]

        def said(turn: int) -> list[int]:
            """By all pieces together, and by each."""
            return [turn, *(0 if piece == 2 else turn for piece in range(pieces))]

        def exchange(rank: int, part: peer_exchange.Part, *, shares: bool) -> None:
            board = ranks.board(rank, nbytes=nbytes)
            peer_exchange.exchange_rows(board, messages[rank][:1], num_rows, given[rank], lates[rank], part, shares=shares)  # noqa: B023

        for rank in range(size):
            if turn < 3 or rank != mine:
                exchange(rank, "post", shares=True)
                assert torch.equal(messages[rank], want[rank])
        comes = source[:num_rows] >= 0
        want[mine][comes] = torch.cat(want)[source[:num_rows][comes].long()]
        if turn < 3:
            assert flags.tolist() == [turn, *said(turn - 1)]
            with looking_at_what_is_announced(flags, turn, messages[mine], want[mine]):
                exchange(mine, "pull", shares=True)
            assert int(words[ALL_READ]) == 0
        else:
            # Ends once the others have read.
            ranks.flags(mine, 0)[1, :, 1] = turn
            with looking_at_what_is_announced(flags, turn, messages[mine], want[mine]):
                exchange(mine, "all", shares=False)
            assert int(words[ALL_READ]) == 1
        assert torch.equal(messages[mine], want[mine])
        assert flags.tolist() == [turn, *said(turn)]
        assert ranks.read(0, 0)[mine] == turn
        for rank in (0, 2):
            peer_moves.pull_nothing(ranks.board(rank, nbytes=nbytes))
    # Where a wait has found a fault, all is NaN, what this rank has itself as well.
    words[FAULT] = 1
    exchange(mine, "all", shares=False)
    assert messages[mine].isnan().all()
    assert ranks.ready(0, 0)[mine] == 3
    assert not after.any()


@pytest.mark.parametrize("has_v", [True, False], ids=["k and v", "k alone"])
@pytest.mark.parametrize("has_table", [True, False], ids=["table", "slots"])
def test_rows_into_pages(has_v: bool, has_table: bool, device: str) -> None:
    torch.manual_seed(0)
    ranks, rows, heads, dim, v_dim = Ranks(2, device), 9, 2, 24, 8
    gathered = []
    for rank in range(2):
        k = torch.randn(rows, heads, dim, device=device)
        v = torch.randn(rows, heads, v_dim, device=device) if has_v else None
        peer_moves.post_rows(ranks.board(rank, number=3, offset=512), rows, k, v, rows, first=False)
        gathered.append(message_of(rows, (k, v), rows))
    whole = torch.cat(gathered)
    table = torch.tensor([[4, 0, 2], [5, 1, 3]], dtype=torch.int32, device=device) if has_table else None
    position = torch.randperm(12 if has_table else 24, device=device)[: 2 * rows].int() if not has_table else None
    request = (torch.arange(2 * rows, device=device) % 2).int()
    if position is None:
        position = (torch.arange(2 * rows, device=device) // 2).int()
    position[[2, 7]] = -1
    pages = [torch.full((6, 4, heads, d), 7.0, device=device) for d in (dim, v_dim)]
    want = [x.clone() for x in pages]
    v_pages = pages[1] if has_v else None
    peer_moves.pull_pages(ranks.board(1, number=3, offset=512), rows, Pages(pages[0], v_pages, table, request, position))
    torch_moves.write_pages(
        want[0], want[1] if has_v else None, table, request, position, whole[..., :dim], whole[..., dim:] if has_v else None
    )
    assert torch.equal(pages[0], want[0])
    assert torch.equal(pages[1], want[1])
    # Again in two parts, of which the first leaves the messages to be read. The first rank reads as well, or rather has read.
    is_first = torch.arange(2 * rows, device=device) % 3 == 1
    again = [torch.full_like(x, 7.0) for x in pages]
    for part, is_read in (("first", is_first), ("last", ~is_first)):
        places = Pages(again[0], again[1] if has_v else None, table, request, torch.where(is_read, position, -1))
        peer_moves.pull_pages(ranks.board(0, number=3, offset=512), rows, places, part)
        assert ranks.read(1, 3) == [int(part == "last"), 1]
    assert torch.equal(again[0], want[0])
    assert torch.equal(again[1], want[1])


@pytest.mark.parametrize("nbytes", [1, 2, 12, 1024, 40_000])
def test_bytes(nbytes: int, device: str) -> None:
    """An all-gather, a shift, and an all-to-all of the same messages, on three boards."""
    torch.manual_seed(0)
    size = 3
    ranks = Ranks(size, device)
    messages = [torch.randint(256, (1, size * nbytes), dtype=torch.uint8, device=device) for _ in range(size)]
    for number in range(3):
        for rank, message in enumerate(messages):
            peer_moves.post_words(ranks.board(rank, number, number * 131_072), message, first=number == 0)
    for rank in range(size):
        boards = [ranks.board(rank, number, number * 131_072) for number in range(3)]
        everyone, one, parts = (torch.zeros(1, n * nbytes, dtype=torch.uint8, device=device) for n in (size * size, size, size))
        peer_moves.pull_words(boards[0], everyone, 0, size)
        assert torch.equal(everyone, torch.cat(messages, dim=1))
        source = (rank - 1) % size
        peer_moves.pull_words(boards[1], one, source, 1)
        assert torch.equal(one, messages[source])
        peer_moves.pull_words(boards[2], parts, 0, size, skip_bytes=rank * nbytes)
        assert torch.equal(parts, torch.cat([m[:, rank * nbytes : (rank + 1) * nbytes] for m in messages], dim=1))


def test_what_is_posted_and_read_is_said(device: str) -> None:
    ranks = Ranks(3, device)
    x, copied = torch.ones(1, 64, dtype=torch.uint8, device=device), torch.zeros(1, 64, dtype=torch.uint8, device=device)
    for layer in (1, 2):
        for rank in range(3):
            peer_moves.post_words(ranks.board(rank, 1), x, first=layer == 1)
        for rank in range(3):
            assert ranks.ready(rank, 1) == [layer] * 3
            assert ranks.flags(rank, 1)[0, :, 0].tolist() == [4 * 64] * 3
            assert ranks.read(rank, 1) == [layer - 1] * 3
        # Rank 0 reads nothing, rank 1 pulls, and rank 2 copies.
        peer_moves.pull_nothing(ranks.board(0, 1))
        peer_moves.pull_words(ranks.board(1, 1), torch.empty(1, 192, dtype=torch.uint8, device=device), 0, 3)
        peer_moves.await_messages(ranks.board(2, 1), 1, 1)
        peer_moves.end_copy(ranks.board(2, 1), copied)
        for rank in range(3):
            assert ranks.read(rank, 1) == [layer] * 3
            assert ranks.ready(rank, 0) == [0] * 3
    assert not copied.any()


def test_nobody_waits_any_more_after_a_fault(device: str) -> None:
    """Who should post does not, and who should read gets NaN: not what was posted before, which lies there still."""
    ranks, x = Ranks(2, device), torch.ones(1, 64, dtype=torch.uint8, device=device)
    for rank in range(2):
        peer_moves.post_words(ranks.board(rank), x, first=True)
    for rank in range(2):
        peer_moves.pull_words(ranks.board(rank), torch.zeros(1, 128, dtype=torch.uint8, device=device), 0, 2)
    posted = ranks.ready(1, 0)
    ranks.heaps[0].view(torch.int32)[FAULT] = 2
    peer_moves.post_words(ranks.board(0), x, first=True)
    assert ranks.ready(1, 0) == posted
    assert int(ranks.fault[0]) == 2
    for many in (1, 2):
        out = torch.zeros(1, 64 * many, dtype=torch.uint8, device=device)
        peer_moves.pull_words(ranks.board(0), out, 0, many)
        assert (out == 255).all()
    copied = torch.zeros(1, 64, dtype=torch.uint8, device=device)
    peer_moves.await_messages(ranks.board(0), 1, 1)
    peer_moves.end_copy(ranks.board(0), copied)
    assert (copied == 255).all()
    rows = torch.zeros(3, 2, 8, device=device)
    peer_moves.pull_rows(ranks.board(0), 4, rows, torch.arange(3, device=device), None)
    assert rows.isnan().all()
    pages = torch.zeros(2, 4, 2, 8, device=device)
    peer_moves.pull_pages(ranks.board(0), 1, Pages(pages, None, None, None, torch.tensor([0, 5], device=device)))
    assert pages.flatten(0, 1)[[0, 5]].isnan().all()
    assert pages.isnan().sum() == 2 * 16


@pytest.mark.parametrize(("waiting", "blamed"), [((), 2), ((2,), 1), ((1, 2), 2)], ids=str)
def test_who_waits_itself_is_blamed_last(waiting: tuple[int, ...], blamed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 1 and 2 post nothing; who of them waits for another has said so."""
    if device == "cpu":
        clock = count(step=100_000_000)
        monkeypatch.setattr(peer_flags, "_now", lambda: next(clock))
    ranks, x = Ranks(3, device), torch.ones(1, 64, dtype=torch.uint8, device=device)
    for rank in waiting:
        ranks.heaps[rank].view(torch.int32)[WAITING] = 1
    peer_moves.post_words(ranks.board(0), x, first=True)
    peer_moves.pull_words(ranks.board(0), torch.zeros(1, 192, dtype=torch.uint8, device=device), 0, 3)
    assert [int(heap.view(torch.int32)[FAULT]) for heap in ranks.heaps] == [1 + blamed] * 3
    # It has said so meanwhile, and does not wait any more.
    assert [int(heap.view(torch.int32)[WAITING]) for heap in ranks.heaps] == [0, 1 in waiting, 2 in waiting]


def test_a_message_of_another_size_is_a_fault(device: str) -> None:
    """A rank of another plan posts as many messages, and other ones."""
    ranks = Ranks(3, device)
    x = torch.ones(1, 64, dtype=torch.uint8, device=device)
    for rank in range(3):
        peer_moves.post_words(ranks.board(rank, nbytes=64 if rank != 1 else 32), x[:, : 64 if rank != 1 else 32], first=True)
    out = torch.zeros(1, 192, dtype=torch.uint8, device=device)
    peer_moves.pull_words(ranks.board(2), out, 0, 3)
    assert (out == 255).all()
    assert int(ranks.fault[0]) == OTHER_MESSAGE + 1
    for heap in ranks.heaps:
        assert int(heap.view(torch.int32)[FAULT]) == OTHER_MESSAGE + 1


def test_a_message_of_another_form_is_a_fault(device: str) -> None:
    """One as large, whose rows lie in another order: a rank has another kind of backend."""
    ranks = Ranks(2, device)
    x = torch.ones(1, 64, dtype=torch.uint8, device=device)
    boards = [ranks.board(rank)._replace(form=rank) for rank in range(2)]
    for board in boards:
        peer_moves.post_words(board, x, first=True)
    out = torch.zeros(1, 128, dtype=torch.uint8, device=device)
    peer_moves.pull_words(boards[1], out, 0, 2)
    assert (out == 255).all()
    assert int(ranks.fault[0]) == OTHER_MESSAGE


def test_launches_are_of_the_addresses_alignment(device: str) -> None:
    """Bytes that begin at 8 after a multiple of 16, and then at 2."""
    ranks = Ranks(2, device)
    memory = torch.arange(200, dtype=torch.uint8, device=device)
    for begin in (8, 2, 1, 0):
        x = memory[begin : begin + 64].view(1, -1)
        for rank in range(2):
            peer_moves.post_words(ranks.board(rank), x, first=True)
        for rank in range(2):
            out = torch.zeros(160, dtype=torch.uint8, device=device)[begin : begin + 128].view(1, -1)
            peer_moves.pull_words(ranks.board(rank), out, 0, 2)
            assert torch.equal(out, torch.cat([x, x], dim=1))


def test_what_is_posted_is_freed_without_the_collector() -> None:
    """With a batch's tables on the GPU."""
    gc.collect()
    gc.disable()
    try:
        rows = PeerRows(Posted(128), 0, (4, 1, 8), torch.float32, torch.device("cpu"), lambda message: None)
        transfers, alive = [rows.transfer], weakref.ref(rows)
        del rows, transfers
        assert alive() is None
    finally:
        gc.enable()


def test_they_compile_for_hopper() -> None:
    """The interpreter takes what the compiler does not; and a compiler that cannot see alignment makes accesses narrow."""
    said = said_by_compiling("programs.compile_peer_kernels")
    assert len(said.splitlines()) == 16
