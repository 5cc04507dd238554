"""The row movers give the bits of their torch twins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cpattn.moves import torch_moves

pytest.importorskip("triton")
from cpattn.moves import triton_moves

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def bits(x: torch.Tensor) -> torch.Tensor:
    """For comparison where NaN must equal NaN."""
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (96, 96), (192, 128), (5, 3)], ids=str)
@pytest.mark.parametrize(("rows", "num_tokens"), [(7, 7), (20, 13), (9, 0), (0, 0), (300, 290)])
def test_pack_kv(rows: int, num_tokens: int, dims: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    heads = 3
    # K and V are parts of one projection, as an engine may pass them.
    qkv = torch.randn(rows, 4 * heads, max(dims), dtype=dtype, device=device)
    qkv[num_tokens:] = torch.nan
    k, v = qkv[:, heads : 2 * heads, : dims[0]], qkv[:, 2 * heads : 3 * heads, : dims[1]]
    got = torch.full((rows + 2, heads, sum(dims)), torch.nan, dtype=dtype, device=device)
    want = got.clone()
    triton_moves.pack(got[1 : rows + 1], k, v, num_tokens)
    torch_moves.pack(want[1 : rows + 1], k, v, num_tokens)
    assert torch.equal(bits(got), bits(want))


def test_pack_kv_into_more_rows_than_it_is_given(device: str) -> None:
    k, v = torch.randn(4, 2, 8, device=device), torch.randn(4, 2, 16, device=device)
    got, want = torch.empty(2, 6, 2, 24, device=device)
    triton_moves.pack(got, k, v, 4)
    torch_moves.pack(want, k, v, 4)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.uint8], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("trailing", [(8, 64), (3, 5), (1,), (2, 2048), (3000,), ()], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_gather_rows(trailing: tuple[int, ...], dtype: torch.dtype, index_dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(0, 255, (50, *trailing), generator=generator).to(dtype).to(device)
    if dtype.is_floating_point:
        source[7] = torch.nan
    for n in (0, 1, 37):
        index = torch.randint(0, 50, (n,), generator=generator).to(index_dtype).to(device)
        out = torch.zeros(n, *trailing, dtype=dtype, device=device)
        triton_moves.gather_rows(out, source, index)
        assert torch.equal(bits(out), bits(torch.index_select(source, 0, index)))


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_gather_rows_between_strided_views(offset: int, device: str) -> None:
    """Columns of a wider buffer: rows are contiguous, but neither next to each other nor aligned."""
    source = torch.randn(20, 64, device=device).bfloat16()[:, offset : offset + 33]
    wide = torch.zeros(12, 100, dtype=torch.bfloat16, device=device)
    out = wide[:, 3:36]
    index = torch.arange(19, 7, -1, device=device)
    triton_moves.gather_rows(out, source, index)
    assert torch.equal(out, source[index])
    assert (wide[:, :3] == 0).all()
    assert (wide[:, 36:] == 0).all()


def test_gather_rows_refuses_rows_in_pieces(device: str) -> None:
    source = torch.zeros(4, 2, 8, device=device)[..., :4]
    with pytest.raises(ValueError, match="not contiguous"):
        triton_moves.gather_rows(torch.zeros(1, 2, 4, device=device), source, torch.zeros(1, dtype=torch.int64, device=device))


@pytest.mark.parametrize("dims", [(64, 64), (5, 3)], ids=str)
def test_pack_kv_into_slots(dims: tuple[int, int], device: str) -> None:
    k, v = torch.randn(9, 2, dims[0], device=device), torch.randn(9, 2, dims[1], device=device)
    slots = torch.tensor([4, 0, 11, 7, 2, 3, 1], dtype=torch.int32, device=device)
    got = torch.full((12, 2, sum(dims)), torch.nan, device=device)
    want = got.clone()
    triton_moves.pack(got, k, v, 7, slots)
    torch_moves.pack(want, k, v, 7, slots)
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("pack", [triton_moves.pack, torch_moves.pack], ids=["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("on_device", [False, True], ids=["count", "count on the device"])
def test_pack_kv_of_some_rows_into_slots(on_device: bool, dtype: torch.dtype, pack: Callable[..., None], device: str) -> None:
    """Also of more rows than there are, as some are taken twice."""
    k, v = torch.randn(5, 2, 8, device=device), torch.randn(5, 2, 3, device=device)
    slots = torch.tensor([4, 0, 11, -1, 2, 3, 1], dtype=dtype, device=device)
    rows = torch.tensor([4, 1, 1, 0, 3, 4, 2], dtype=dtype, device=device)
    for num_tokens in (7, 3):
        got = torch.full((12, 2, 11), 7.0, device=device)
        want = got.clone()
        for slot, row in list(zip(slots.tolist(), rows.tolist(), strict=True))[:num_tokens]:
            if slot >= 0:
                want[slot] = torch.cat([k[row], v[row]], -1)
        count = torch.tensor([num_tokens], dtype=torch.int32, device=device) if on_device else num_tokens
        pack(got, k, v, count, slots, rows)
        assert torch.equal(got, want)


@pytest.mark.parametrize("trailing", [(2, 64), (3,), ()], ids=str)
def test_gather_rows_into_slots(trailing: tuple[int, ...], device: str) -> None:
    source = torch.randn(20, *trailing, device=device)
    index = torch.tensor([3, 3, 19, 0, 7], dtype=torch.int32, device=device)
    slots = torch.tensor([4, 0, 11, 7, 2], dtype=torch.int32, device=device)
    got = torch.full((12, *trailing), torch.nan, device=device)
    want = got.clone()
    triton_moves.gather_rows(got, source, index, slots)
    torch_moves.gather_rows(want, source, index, slots)
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("with_slots", [False, True], ids=["in order", "slots"])
@pytest.mark.parametrize("num_tokens", [0, 5, 9])
def test_pack_kv_takes_its_count_from_the_device(num_tokens: int, with_slots: bool, device: str) -> None:
    k, v = torch.randn(9, 2, 8, device=device), torch.randn(9, 2, 16, device=device)
    k[num_tokens:], v[num_tokens:] = torch.nan, torch.nan
    slots = torch.tensor([4, 0, 11, -1, 2, 3, 1, 10, 7], dtype=torch.int32, device=device) if with_slots else None
    count = torch.tensor([num_tokens], dtype=torch.int32, device=device)
    want = torch.full((12, 2, 24), 7.0, device=device)
    kernel, twin, twin_of_count = (want.clone() for _ in range(3))
    if slots is None:
        want.zero_()
    for i in range(num_tokens):
        row = i if slots is None else int(slots[i])
        if row >= 0:
            want[row] = torch.cat([k[i], v[i]], -1)
    triton_moves.pack(kernel, k, v, count, slots)
    torch_moves.pack(twin, k, v, count, slots)
    torch_moves.pack(twin_of_count, k, v, num_tokens, slots)
    for got in (kernel, twin, twin_of_count):
        assert torch.equal(got, want)


@pytest.mark.parametrize("pack", [triton_moves.pack, torch_moves.pack], ids=["triton", "torch"])
def test_pack_kv_without_v(pack: Callable[..., None], device: str) -> None:
    k = torch.randn(7, 1, 24, device=device)
    message = torch.full((9, 1, 24), torch.nan, device=device)
    pack(message, k, None, 5)
    assert torch.equal(message[:5], k[:5])
    assert (message[5:] == 0).all()


@pytest.mark.parametrize("gather", [triton_moves.gather_rows, torch_moves.gather_rows], ids=["triton", "torch"])
@pytest.mark.parametrize("trailing", [(2, 64), (3,), ()], ids=str)
def test_gather_rows_of_negative_index_are_zeros(trailing: tuple[int, ...], gather: Callable[..., None], device: str) -> None:
    source = torch.randn(6, *trailing, device=device)
    index = torch.tensor([3, -1, 5, 0, -9], dtype=torch.int32, device=device)
    want = source[index.clamp(min=0)]
    want[index < 0] = 0
    out = torch.full_like(want, torch.nan)
    gather(out, source, index)
    assert torch.equal(out, want)
    gather(out, source[:0], torch.full_like(index, -1))
    assert (out == 0).all()
    slots = torch.tensor([4, 0, -1, 2, 6], device=device)
    slotted = torch.full((8, *trailing), 7.0, device=device)
    expected = slotted.clone()
    expected[slots[[0, 1, 3, 4]]] = want[[0, 1, 3, 4]]
    gather(slotted, source, index, slots)
    assert torch.equal(slotted, expected)
