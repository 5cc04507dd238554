"""Attention over pages gives the bits of attention over the same keys side by side, whatever lies in other pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from inputs.paged_keys import in_pages, make_case
from inputs.ragged_inputs import check, compiled_only, launch_attention, make_qkv
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.ragged_rows import RaggedRows

pytest.importorskip("triton")
from cpattn.kernels.tile_shapes import TileShape, tile_shapes

SHAPES = (TileShape(32, 16, 4, 2), TileShape(16, 16, 4, 2))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 21},
    "softcap": {"softcap": 5.0},
    "window and sinks": {"window": 40, "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    "sinks and negative scale": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0]), "scale": -0.1},
}


# In the interpreter pages that lie across blocks of keys, with every option, and pages that are one, with most at once.
@pytest.mark.parametrize(
    ("page_size", "dtype", "options"),
    [
        pytest.param(
            page_size,
            dtype,
            options,
            id=f"{page_size}-{dtype}-{name}",
            marks=() if page_size == 3 or (page_size, name) == (16, "window and sinks") else compiled_only,
        )
        for page_size, dtype in [(1, torch.int32), (3, torch.int64), (16, torch.int32), (48, torch.int64)]
        for name, options in OPTIONS.items()
    ],
)
def test_bits_of_keys_side_by_side(page_size: int, dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    lens = [50, 0, 37, 70]
    rows = make_case(lens, [20, 3, 1, 10], [0, 2, 2, 3], [50, 20, 37, 70], device)
    q, k, v = make_qkv(rows, sum(lens), (4, 2), (32, 24), torch.bfloat16, device, 1)
    options = {"scale": 0.2} | {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    k_pages, v_pages, paged = in_pages(k, v, rows, lens, page_size, dtype, page_size)
    want, want_lse = launch_attention(q, k, v, rows, **options, shapes=SHAPES)
    out, lse = launch_attention(q, k_pages, v_pages, paged, **options, shapes=SHAPES)
    n = rows.num_queries
    check(q, k, v, rows, AttentionOptions(**options), want, want_lse)
    assert torch.equal(out[:n], want[:n])
    assert torch.equal(lse[:n], want_lse[:n])


def test_merging_into_an_earlier_result(device: str) -> None:
    lens = [50, 20]
    rows = make_case(lens, [10, 10], [0, 1], [50, 20], device)
    q, k, v = make_qkv(rows, sum(lens), (2, 1), (32, 32), torch.bfloat16, device, 2, padding=0)
    k_pages, v_pages, paged = in_pages(k, v, rows, lens, 16, torch.int32, 0)
    acc, acc_lse = torch.randn(20, 2, 32, device=device), torch.randn(20, 2, device=device)
    got, got_lse = acc.clone(), acc_lse.clone()
    launch_attention(q, k, v, rows, scale=0.2, into=(acc, acc_lse), shapes=SHAPES)
    launch_attention(q, k_pages, v_pages, paged, scale=0.2, into=(got, got_lse), shapes=SHAPES)
    assert torch.equal(got, acc)
    assert torch.equal(got_lse, acc_lse)


@pytest.mark.parametrize("window", [pytest.param(None, marks=compiled_only), 100])
@pytest.mark.parametrize(
    "page_size", [1, *(pytest.param(n, marks=compiled_only) for n in (3, 16, 48)), 64, pytest.param(128, marks=compiled_only), 256]
)
def test_default_shapes(page_size: int, window: int | None, device: str) -> None:
    """On Hopper, of the kernel for it."""
    lens = [300, 140]
    rows = make_case(lens, [40, 1, 30], [0, 1, 1], [300, 100, 140], device)
    capability = (9, 0) if device == "cpu" else torch.cuda.get_device_capability()
    for d, dv in [(128, 128)] if device == "cpu" else [(128, 128), (72, 96), (192, 128)]:
        q, k, v = make_qkv(rows, sum(lens), (2, 1), (d, dv), torch.bfloat16, device, 3, padding=0)
        k_pages, v_pages, paged = in_pages(k, v, rows, lens, page_size, torch.int32, page_size)
        for shape in tile_shapes(d, dv, torch.bfloat16, capability, specialized=device != "cpu")[: 1 if device == "cpu" else 2]:
            want, want_lse = launch_attention(q, k, v, rows, scale=d**-0.5, window=window, shapes=(shape,))
            out, lse = launch_attention(q, k_pages, v_pages, paged, scale=d**-0.5, window=window, shapes=(shape,))
            assert torch.equal(out, want), (d, dv, shape)
            assert torch.equal(lse, want_lse), (d, dv, shape)


def test_tiles_without_tokens_do_nothing(device: str) -> None:
    """Fixed rows have tiles to spare; their fields are 0, and the keys and pages that these name may be NaN."""
    lens = [40, 7]
    fixed = RaggedRows.build_all([_table(lens)], device, (40, 40))[0]
    q, k, v = make_qkv(fixed, sum(lens), (2, 1), (64, 64), torch.bfloat16, device, 4, padding=0)
    want, want_lse = launch_attention(q, k, v, RaggedRows.build_all([_table(lens)], device)[0], scale=0.2)
    out, lse = launch_attention(q, k, v, fixed, scale=0.2)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def _table(lens: list[int]) -> Any:
    from cpattn.spans import SpanTable

    k_len = np.array(lens)
    return SpanTable(k_len, np.cumsum(k_len) - k_len, k_len, np.ones(len(lens), int), np.arange(len(lens)), "bottom_right")
