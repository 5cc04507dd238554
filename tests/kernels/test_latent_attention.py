"""The head dims of multi-head latent attention, absorbed (V is a view of K's first columns) and up-projected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inputs.ragged_inputs import check, compiled_only, launch_attention, make_qkv, make_rows

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.triton import triton_attend_into

pytest.importorskip("triton")
from cpattn.kernels.tile_shapes import packs_for, padded_dims
from cpattn.keys import Keys


@pytest.mark.parametrize(
    "options",
    [pytest.param(AttentionOptions(0.04), marks=compiled_only), AttentionOptions(-0.04, window=50, softcap=20.0)],
    ids=["plain", "options"],
)
@pytest.mark.parametrize("dims", [(576, 512), pytest.param((300, 256), marks=compiled_only)], ids=str)
@pytest.mark.parametrize("v_in_k", [True, pytest.param(False, marks=compiled_only)], ids=["v in k", "v apart"])
def test_wide_heads(dims: tuple[int, int], v_in_k: bool, options: AttentionOptions, device: str) -> None:
    heads = (16, 1)
    rows = make_rows([5, 1, 2], [0, 3, 30], [90, 80, 60], [86, 80, 20], device)
    q, k, v = make_qkv(rows, 100, heads, dims, torch.bfloat16, device, 0)
    if v_in_k:
        k = k.contiguous()
        v = k[..., : dims[1]]
    out, lse = launch_attention(q, k, v, rows, scale=options.scale, window=options.window, softcap=options.softcap)
    check(q, k, v, rows, options, out, lse)


@pytest.mark.parametrize("page_size", [pytest.param(1, marks=compiled_only), 16, pytest.param(64, marks=compiled_only)])
def test_absorbed_over_pages(page_size: int, device: str) -> None:
    """The same bits as with keys side by side; heads packed as many as fit a tile, though the group is wider."""
    rows = make_rows([3, 1], [0, 0], [100, 90], [98, 90], device)
    q, k, _ = make_qkv(rows, 100, (128, 1), (576, 8), torch.bfloat16, device, 1, padding=0)
    k = k.contiguous()
    num_pages = -(-100 // page_size)
    order = torch.randperm(num_pages)
    pages = torch.full((num_pages, page_size, 1, 576), torch.nan, dtype=k.dtype, device=device)
    for s in range(100):
        pages[order[s // page_size], s % page_size] = k[s]
    paged = rows.with_pages(order[None].int().to(device), page_size)
    want, want_lse = launch_attention(q, k, k[..., :512], rows, scale=0.04)
    out, lse = launch_attention(q, pages, pages[..., :512], paged, scale=0.04)
    check(q, k, k[..., :512], rows, AttentionOptions(0.04), want, want_lse)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_up_projected(device: str) -> None:
    rows = make_rows([150], [0], [200], [51], device)
    q, k, v = make_qkv(rows, 200, (4, 4), (192, 128), torch.bfloat16, device, 2)
    out, lse = launch_attention(q, k, v, rows, scale=192**-0.5)
    check(q, k, v, rows, AttentionOptions(192**-0.5), out, lse)


def test_groups_of_heads_into_their_places(device: str) -> None:
    """The same bits, whatever else the result holds."""
    rows = make_rows([20], [0], [40], [21], device)
    q, k, v = make_qkv(rows, 40, (3, 3), (192, 128), torch.bfloat16, device, 2)
    want, want_lse = launch_attention(q, k, v, rows, scale=192**-0.5)
    out, lse = torch.full_like(want, 7), torch.full_like(want_lse, 7)
    for heads in (slice(0, 2), slice(2, 3)):
        place = out[:, heads], lse[:, heads]
        triton_attend_into(q[:, heads], Keys(k[:, heads], v[:, heads]), rows, AttentionOptions(192**-0.5), *place)
    num_queries = rows.num_queries
    assert torch.equal(out[:num_queries], want[:num_queries])
    assert torch.equal(lse[:num_queries], want_lse[:num_queries])


def test_padded_dims() -> None:
    assert padded_dims(576, 512) == (512, 512, 64, 64)
    assert padded_dims(192, 128) == (256, 128, 0, 0)
    assert padded_dims(512, 512) == (512, 512, 0, 0)
    assert padded_dims(300, 256) == (256, 256, 44, 64)
    assert [padded_dims(*dims)[:2] for dims in ((64, 32), (16, 128), (24, 16), (128, 8))] == [(64, 64), (64, 128), (32, 32), (128, 64)]
    for d in range(1, 577):
        main, _, tail, tail_padded = padded_dims(d, 8)
        assert main + tail >= d
        assert tail_padded == 0 or tail_padded >= max(16, tail)


def test_packs() -> None:
    assert packs_for(128, 64) == (1, 64)
    assert packs_for(4, 128) == (1, 4)
    assert packs_for(1, 64) == (1,)
    assert packs_for(67, 64) == (1,)
    assert all(group % pack == 0 for group in range(1, 200) for pack in packs_for(group, 64))
    assert np.all([max(packs_for(group, 64)) <= 64 for group in range(1, 200)])
