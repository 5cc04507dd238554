"""The kernels that write and read pages give the bits of their torch twins, and these what a loop over the tokens gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cpattn.moves import torch_moves
from cpattn.moves.moves import Moves

pytest.importorskip("triton")
from cpattn.moves import triton_moves

PAGE_SIZES = (1, 3, 16, 64)
GARBAGE = (-1, 2**30)


def bits(x: Tensor) -> Tensor:
    """For comparison where NaN must equal NaN."""
    return x.contiguous().view(torch.uint8)


class Case:
    """Tokens of three requests and padding rows, in random order, over shuffled pages; unused table entries are garbage."""

    def __init__(
        self, page_size: int, device: str, dtype: torch.dtype = torch.bfloat16, dims: tuple[int, int] = (24, 16),
        tables: torch.dtype = torch.int32, seed: int = 0,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        lengths = [37, 0, 70]
        pages = [-(-length // page_size) for length in lengths]
        shuffled = rng.permutation(sum(pages) + 2)[: sum(pages)]
        table = np.full((3, max(pages) + 1), GARBAGE[seed % 2])
        for request, begin in enumerate(np.cumsum(pages) - pages):
            table[request, : pages[request]] = shuffled[begin : begin + pages[request]]
        tokens = [(request, position) for request, length in enumerate(lengths) for position in range(length)]
        picked = rng.permutation(len(tokens))[:60]
        rows = [tokens[i] for i in picked] + [(GARBAGE[seed % 2], -1), (0, -7)] * 4
        rows = [rows[i] for i in rng.permutation(len(rows))]
        self.rows, self.table, self.page_size = rows, table, page_size
        self.page_table = torch.from_numpy(table).to(device, tables)
        self.request = torch.tensor([request for request, _ in rows], dtype=torch.int32, device=device)
        self.position = torch.tensor([position for _, position in rows], dtype=tables, device=device)
        n, heads = len(rows), 2
        self.message = torch.randn(n + 1, heads, sum(dims), device=device).to(dtype)
        # One head of pages that hold more, K and V side by side as some engines have them.
        engine = torch.randn(sum(pages) + 2, 2, page_size, heads + 1, max(dims), device=device).to(dtype)
        if dtype.is_floating_point and dtype.itemsize > 1:
            self.message[self.position_is_padding()] = torch.nan
        self.engine, self.dims = engine, dims

    def position_is_padding(self) -> list[int]:
        return [i for i, (_, position) in enumerate(self.rows) if position < 0]

    def pages(self, engine: Tensor) -> tuple[Tensor, Tensor]:
        return engine[:, 0, :, 1:, : self.dims[0]], engine[:, 1, :, 1:, : self.dims[1]]

    def halves(self, message: Tensor) -> tuple[Tensor, Tensor]:
        return message[..., : self.dims[0]], message[..., self.dims[0] :]

    def place(self, i: int) -> tuple[int, int]:
        request, position = self.rows[i]
        return int(self.table[request, position // self.page_size]), position % self.page_size

    def where(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.page_table, self.request, self.position


@pytest.mark.parametrize("move", [torch_moves.write_pages, triton_moves.write_pages], ids=["torch", "triton"])
@pytest.mark.parametrize("tables", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_write(page_size: int, tables: torch.dtype, move: Any, device: str) -> None:
    case = Case(page_size, device, tables=tables, seed=page_size)
    got, want = case.engine.clone(), case.engine.clone()
    for part in range(2):
        for i, (_, position) in enumerate(case.rows):
            if position >= 0:
                case.pages(want)[part][case.place(i)] = case.halves(case.message)[part][i]
    move(*case.pages(got), *case.where(), *case.halves(case.message))
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("move", [torch_moves.read_pages, triton_moves.read_pages], ids=["torch", "triton"])
@pytest.mark.parametrize("scattered", [False, True], ids=["in order", "out_rows"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_read(page_size: int, scattered: bool, move: Any, device: str) -> None:
    case = Case(page_size, device, seed=page_size + 1)
    got, want = case.message.clone(), case.message.clone()
    out_rows = torch.randperm(len(case.message), device=device)[: len(case.rows)] if scattered else None
    for part in range(2):
        for i, (_, position) in enumerate(case.rows):
            values: Any = case.pages(case.engine)[part][case.place(i)] if position >= 0 else 0
            case.halves(want)[part][i if out_rows is None else out_rows[i]] = values
    move(*case.pages(case.engine), *case.where(), *case.halves(got), out_rows)
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.uint8], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
@pytest.mark.parametrize("dims", [(24, 16), (5, 3), (64, 64)], ids=str)
def test_any_dtype_and_width(dtype: torch.dtype, dims: tuple[int, int], device: str) -> None:
    case = Case(4, device, dtype, dims)
    written = case.engine.clone()
    (k_pages, v_pages), where = case.pages(written), case.where()
    triton_moves.write_pages(k_pages, v_pages, *where, *case.halves(case.message))
    read = torch.ones_like(case.message)
    triton_moves.read_pages(k_pages, v_pages, *where, *case.halves(read))
    want = case.message.clone()
    want[case.position_is_padding()] = torch.zeros((), dtype=dtype, device=device)
    want[-1:] = read[-1:]
    assert torch.equal(bits(read), bits(want))


@pytest.mark.parametrize("write", [triton_moves.write_pages, torch_moves.write_pages], ids=["triton", "torch"])
def test_slots_without_a_page_table(write: Any, device: str) -> None:
    pages = torch.randn(4, 3, 2, 8, device=device)
    want = pages.clone()
    slots = torch.tensor([11, -1, 0, 7], device=device)
    k = torch.randn(4, 2, 8, device=device)
    for i in (0, 2, 3):
        want[slots[i] // 3, slots[i] % 3] = k[i]
    write(pages, None, None, None, slots, k, None)
    assert torch.equal(pages, want)
    for read in (triton_moves.read_pages, torch_moves.read_pages):
        again = torch.full_like(k, torch.nan)
        read(pages, None, None, None, slots, again, None)
        assert torch.equal(again, torch.where(slots[:, None, None] >= 0, k, 0))


@pytest.mark.parametrize("moves", [triton_moves, torch_moves], ids=["triton", "torch"])
def test_nothing_to_move(moves: Moves, device: str) -> None:
    pages, none = torch.randn(2, 4, 1, 8, device=device), torch.empty(0, 1, 8, device=device)
    table, rows = torch.zeros(1, 1, dtype=torch.int32, device=device), torch.empty(0, dtype=torch.int32, device=device)
    before = pages.clone()
    moves.write_pages(pages, pages, table, rows, rows, none, none)
    moves.read_pages(pages, pages, table, rows, rows, none, none)
    assert torch.equal(pages, before)
    # Padding rows alone, beside an engine that has no page yet.
    k, padding = torch.full((2, 1, 8), torch.nan, device=device), torch.full((2,), -1, device=device)
    empty, no_table = pages[:0], table[:, :0]
    moves.write_pages(empty, None, no_table, padding, padding, k, None)
    moves.read_pages(empty, None, no_table, padding, padding, k, None)
    assert (k == 0).all()
