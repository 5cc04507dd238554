"""Numbers that are stored in other dtypes: the kernels that convert them, and attention over keys as they are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs.paged_keys import in_pages, make_case
from inputs.ragged_inputs import check, compiled_only, make_qkv
from inputs.stored_inputs import BF16, E4M3, E5M2, FP16, FP32, options_of, stored_keys
from torch import Tensor

from cpattn.keys import Keys
from cpattn.moves import torch_moves
from cpattn.moves.stored_rows import StoredRows
from cpattn.spans import Spans

pytest.importorskip("triton")
from cpattn.kernels.ragged_attention import ragged_attention
from cpattn.kernels.tile_shapes import TileShape
from cpattn.moves import triton_moves

SHAPES = (TileShape(32, 16, 4, 2), TileShape(16, 16, 4, 2))


def same(x: Tensor, y: Tensor) -> bool:
    return bool(((x == y) | (x.isnan() & y.isnan())).all())


def rounds_alike(dtype: torch.dtype, device: str) -> bool:
    """The interpreter rounds ties of bf16 otherwise than GPUs and torch do."""
    return dtype != BF16 or device != "cpu"


@pytest.mark.parametrize("scales", ["head", "token"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("stored", [E4M3, E5M2], ids=str)
def test_fp8_is_that_of_torch(stored: torch.dtype, dtype: torch.dtype, scales: str, device: str) -> None:
    """Numbers of all sizes, with infinities, NaN and rows of zeros, into views of a message and back."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(37, 2, n, generator=generator) * 10.0 ** torch.randint(-9, 5, (37, 2, 1), generator=generator) for n in (24, 16))
    k[0, 0, 0], k[1, 0, 0], k[2, 1], k[3, 1], v[4] = torch.nan, torch.inf, 0, torch.nan, -torch.inf
    k, v = k.to(device, dtype), v.to(device, dtype)
    of_heads = torch.tensor([0.37, 1.1], device=device), torch.tensor(0.01, device=device).expand(2)
    found: list[tuple[Tensor, ...]] = []
    for moves in (torch_moves, triton_moves):
        message = torch.zeros(37, 2, 48, dtype=torch.uint8, device=device)
        numbers = message[..., :24].view(stored), message[..., 24:40].view(stored)
        if scales == "token":
            out = StoredRows(*numbers, *message[..., 40:].view(FP32).unbind(2))
            moves.quantize(out, k, v, None, None)
        else:
            moves.quantize(StoredRows(*numbers), k, v, *of_heads)
            out = StoredRows(*numbers, *of_heads)
        back = torch.empty_like(k), torch.empty_like(v)
        moves.dequantize(*back, out)
        found.append((message, *back))
    (bits, *meant), (want_bits, *want) = found
    assert torch.equal(bits, want_bits)
    if rounds_alike(dtype, device):
        assert all(map(same, meant, want))
    # What is no NaN becomes none, and nothing is infinite.
    assert torch.equal(meant[0].isnan(), k.isnan())
    assert not meant[0].isinf().any()
    assert not meant[1].isinf().any()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("scale", [0.0, 1e-44, 2.0**-126, 3e38], ids=str)
@pytest.mark.parametrize("stored", [E4M3, E5M2], ids=str)
def test_scales_that_no_numbers_go_with(stored: torch.dtype, scale: float, device: str) -> None:
    """What overflows saturates; zeros stay zeros, with a scale of 0 as well; and nothing becomes NaN."""
    k = torch.tensor([0.0, -0.0, 1.0, -2e38, 1e-44, 3e-39, -7.0, torch.inf], device=device).view(2, 2, 2)
    scales = torch.full((2,), scale, device=device)
    found = []
    for moves in (torch_moves, triton_moves):
        out = StoredRows(torch.empty(2, 2, 2, dtype=stored, device=device), None, scales)
        moves.quantize(out._replace(k_scale=None), k, None, scales, None)
        back = torch.empty_like(k)
        moves.dequantize(back, None, out)
        found.append((out.k.view(torch.uint8), back))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    bits, back = found[0]
    assert not back.isnan().any()
    assert bits.flatten()[:2].tolist() == [0, 0x80]


@pytest.mark.parametrize("stored", [E4M3, E5M2], ids=str)
def test_every_byte_means_what_torch_says(stored: torch.dtype, device: str) -> None:
    every = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 256).view(stored)
    for dtype in (BF16, FP16, FP32):
        out = torch.empty(1, 1, 256, dtype=dtype, device=device)
        triton_moves.dequantize(out, None, StoredRows(every, None))
        want = every.float().clamp(-65504, 65504) if dtype == FP16 else every.float()
        assert same(out.float(), want)


@pytest.mark.parametrize(("dtype", "stored"), [(FP32, BF16), (FP16, BF16), (FP32, FP16), (BF16, FP16)], ids=str)
def test_half_precision_saturates(dtype: torch.dtype, stored: torch.dtype, device: str) -> None:
    x = torch.tensor([1e-30, 1.0, -3e38, torch.inf, 7e4, torch.nan, -(2.0**-20), 3.4e38], device=device).view(2, 2, 2).to(dtype)
    out = torch.empty(2, 2, 2, dtype=stored, device=device)
    for moves in (torch_moves, triton_moves):
        moves.quantize(StoredRows(out, None), x, None, None, None)
        most = torch.finfo(stored).max
        want = x.float().clamp(-most, most).to(stored)
        assert same(out, want) or (not rounds_alike(stored, device) and moves is triton_moves)
        assert not out.isinf().any()


def attend(q: Tensor, keys: Keys, spans: Spans, options: dict[str, Any], **how: Any) -> tuple[Tensor, Tensor]:
    return ragged_attention(q, keys, spans, options_of(options, q.device), **how)


FORMS = [
    (E4M3, "token", FP16, 16, {}),
    (E4M3, "head", BF16, 3, {"window": 21}),
    pytest.param(E5M2, "token", BF16, 3, {"softcap": 5.0}, marks=compiled_only),
    (BF16, "none", FP16, 16, {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}),
    pytest.param(E5M2, "head", FP32, 1, {}, marks=compiled_only),
    pytest.param(E4M3, "token", BF16, 1, {"window": 21}, marks=compiled_only),
    pytest.param(BF16, "none", FP32, 48, {}, marks=compiled_only),
    pytest.param(FP16, "none", BF16, 3, {"softcap": 5.0}, marks=compiled_only),
]


@pytest.mark.parametrize(("stored", "scales", "dtype", "page_size", "options"), FORMS, ids=str)
def test_bits_of_a_copy_in_the_dtype_of_q(
    stored: torch.dtype, scales: str, dtype: torch.dtype, page_size: int, options: dict[str, Any], device: str
) -> None:
    """Side by side and in pages, all else in which is NaN, scales included."""
    lens = [36, 0, 20]
    rows = make_case(lens, [9, 1, 5], [0, 2, 2], [36, 8, 20], device)
    q, k, v = make_qkv(rows, sum(lens), (4, 2), (32, 24), dtype, device, 1)
    keys = stored_keys(k, v, stored, scales)
    copy = torch.empty_like(k), torch.empty_like(v)
    triton_moves.dequantize(*copy, StoredRows(keys.k, keys.v, keys.k_scale, keys.v_scale))
    want, want_lse = attend(q, Keys(*copy), rows, options, shapes=SHAPES)
    n = rows.num_queries
    check(q, *copy, rows, options_of(options, q.device), want, want_lse)
    k_pages, v_pages, paged = in_pages(keys.k, keys.v, rows, lens, page_size, torch.int32, 5)
    in_their_pages = Keys(k_pages, v_pages, paged.page_table, keys.k_scale, keys.v_scale)
    if scales == "token":
        assert keys.k_scale is not None
        assert keys.v_scale is not None
        of_tokens = in_pages(keys.k_scale[..., None], keys.v_scale[..., None], rows, lens, page_size, torch.int32, 5)
        in_their_pages = in_their_pages._replace(k_scale=of_tokens[0][..., 0], v_scale=of_tokens[1][..., 0])
    for given, spans in ((keys, rows), (in_their_pages, paged)):
        out, lse = attend(q, given, spans, options, shapes=SHAPES)
        if device == "cpu":
            assert torch.equal(out[:n], want[:n])
            assert torch.equal(lse[:n], want_lse[:n])
        else:
            # A compiler may have products of what was bytes sum up in another order.
            check(q, *copy, rows, options_of(options, q.device), out, lse)


def test_values_that_are_a_part_of_keys(device: str) -> None:
    """With one scale for both; loaded once, where blocks of both are of one size."""
    lens = [20, 13]
    rows = make_case(lens, [3, 5], [0, 1], [20, 13], device)
    for head_dim, v_head_dim in ((32, 32), (32, 16), (72, 64)):
        q, k, _ = make_qkv(rows, sum(lens), (4, 1), (head_dim, 16), FP16, device, 3, padding=0)
        keys = stored_keys(k, k, E4M3, "token")
        keys = keys._replace(v=keys.k[..., :v_head_dim], v_scale=keys.k_scale)
        copy = torch.empty_like(k)
        triton_moves.dequantize(copy, None, StoredRows(keys.k, None, keys.k_scale))
        want = attend(q, Keys(copy, copy[..., :v_head_dim]), rows, {}, shapes=SHAPES)
        got = attend(q, keys, rows, {}, shapes=SHAPES)
        if device == "cpu":
            assert all(map(torch.equal, got, want))
        else:
            check(q, copy, copy[..., :v_head_dim], rows, options_of({}, q.device), *got)


def test_keys_and_values_in_one_memory_with_scales_of_their_own(device: str) -> None:
    """After a launch of the same layouts where scales were the same as well."""
    lens = [20]
    rows = make_case(lens, [3], [0], [20], device)
    q, k, _ = make_qkv(rows, sum(lens), (4, 2), (32, 32), FP16, device, 3, padding=0)
    keys = stored_keys(k, k, E4M3, "head")
    assert keys.k_scale is not None
    for v_scale in (keys.k_scale, 3 * keys.k_scale):
        copy = torch.empty_like(k), torch.empty_like(k)
        triton_moves.dequantize(*copy, StoredRows(keys.k, keys.k, keys.k_scale, v_scale))
        out, lse = attend(q, keys._replace(v=keys.k, v_scale=v_scale), rows, {}, shapes=SHAPES)
        check(q, *copy, rows, options_of({}, q.device), out, lse)


@compiled_only
@pytest.mark.parametrize("dims", [(64, 32), (64, 16), (48, 32), (128, 32), (256, 16), (32, 64), (16, 128)], ids=str)
def test_narrow_heads_with_the_shapes_of_the_gpu(dims: tuple[int, int], device: str) -> None:
    """One of K and V has rows of less than 128 bytes, which lie in shared memory in another way."""
    lens = [150, 20, 77]
    rows = make_case(lens, [10, 1, 70], [0, 1, 2], lens, device)
    for stored, scales, dtype in ((E4M3, "head", BF16), (BF16, "none", FP16)):
        q, k, v = make_qkv(rows, sum(lens), (12, 2), dims, dtype, device, 2)
        keys = stored_keys(k, v, stored, scales)
        copy = torch.empty_like(k), torch.empty_like(v)
        torch_moves.dequantize(*copy, StoredRows(keys.k, keys.v, keys.k_scale, keys.v_scale))
        k_pages, v_pages, paged = in_pages(keys.k, keys.v, rows, lens, 3, torch.int32, 5)
        in_their_pages = Keys(k_pages, v_pages, paged.page_table, keys.k_scale, keys.v_scale)
        for given, spans in ((keys, rows), (in_their_pages, paged)):
            check(q, *copy, rows, options_of({}, q.device), *attend(q, given, spans, {}))


def test_merging_into_an_earlier_result_with_the_shapes_of_the_gpu(device: str) -> None:
    lens = [150, 20]
    rows = make_case(lens, [10, 10], [0, 1], [150, 20], device)
    q, k, v = make_qkv(rows, sum(lens), (2, 1), (128, 128), BF16, device, 2, padding=0)
    keys = stored_keys(k, v, E4M3, "token")
    copy = torch.empty_like(k), torch.empty_like(v)
    torch_moves.dequantize(*copy, StoredRows(keys.k, keys.v, keys.k_scale, keys.v_scale))
    acc, acc_lse = torch.randn(20, 2, 128, device=device), torch.randn(20, 2, device=device)
    got, got_lse = acc.clone(), acc_lse.clone()
    attend(q, Keys(*copy), rows, {}, into=(acc, acc_lse))
    attend(q, keys, rows, {}, into=(got, got_lse))
    # The copy is attended to by another kernel on some GPUs; and the interpreter rounds bf16 otherwise.
    eps = 4 * torch.finfo(BF16).eps
    torch.testing.assert_close(got, acc, rtol=eps, atol=eps)
    torch.testing.assert_close(got_lse, acc_lse, rtol=eps, atol=eps)
