"""Cached keys, and a rank's own, that are read where they lie, against the same keys in one piece: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cpattn.kernels.ragged_attention import ragged_attention, specialized_kernel
from cpattn.kernels.tile_shapes import tile_shapes
from cpattn.keys import NOT_HERE, PREFIX_UNIT, Keys, OwnRows, PrefixKeys
from cpattn.options import AttentionOptions
from cpattn.spans import Spans


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_no_block_has_keys_of_both(dims: tuple[int, int]) -> None:
    for shape in tile_shapes(*dims, torch.bfloat16, (9, 0), specialized=True):
        assert not shape.specialized or PREFIX_UNIT % shape.block_n == 0


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or specialized_kernel(torch.device("cuda")) is None,
    reason="needs a Hopper GPU, and a Triton that has what its kernel needs",
)


@needs_hopper
@pytest.mark.parametrize("window", [None, 333])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bits_are_those_of_keys_in_one_piece(head_dim: int, window: int | None) -> None:
    torch.manual_seed(0)
    prefixes, extends = np.array([1000, 0, 128, 255, 2048]), np.array([300, 70, 1, 512, 33])
    lengths = prefixes + extends
    begins = np.cumsum(lengths) - lengths
    whole = torch.randn(2, int(lengths.sum()), 4, head_dim, device="cuda", dtype=torch.bfloat16)
    stay = prefixes // PREFIX_UNIT * PREFIX_UNIT
    # Strided, as an engine may have them, and apart from each other.
    cache = torch.full((2, int(stay.sum()) + 64, 6, head_dim), torch.nan, device="cuda", dtype=torch.bfloat16)[:, :, 1:5]
    cached = np.cumsum(stay[::-1])[::-1] - stay
    near = torch.cat([whole[:, first + kept : first + length] for first, kept, length in zip(begins, stay, lengths, strict=True)], 1)
    for first, kept, to in zip(begins, stay, cached, strict=True):
        cache[:, to : to + kept] = whole[:, first : first + kept]
    near_begins = np.cumsum(lengths - stay) - (lengths - stay)
    q = torch.randn(int(extends.sum()), 16, head_dim, device="cuda", dtype=torch.bfloat16)
    options, request = AttentionOptions(scale=0.1, window=window), np.arange(5)
    in_one, apart = (
        Spans.build(extends, k_start, lengths, prefixes + 1, "cuda", request=request) for k_start in (begins, near_begins - stay)
    )
    places = torch.from_numpy(np.stack([stay, cached], 1).reshape(-1)).int().cuda()
    plain = tuple(shape for shape in tile_shapes(head_dim, head_dim, q.dtype, (9, 0), specialized=True) if shape.specialized)
    expected = ragged_attention(q, Keys(whole[0], whole[1]), in_one, options, shapes=plain)
    got = [*ragged_attention(q, Keys(near[0], near[1], prefix=PrefixKeys(cache[0], cache[1], places)), apart, options)]
    # Of a request's pages only the first are looked at, the last of them in part, whatever their size.
    for page_size in (16, 48, 128, 256):
        pages, table = _in_pages(whole, begins, stay, page_size)
        places[1::2] = -1
        prefix = PrefixKeys(pages[:, 0], pages[:, 1], places, table)
        got += ragged_attention(q, Keys(near[0], near[1], prefix=prefix), apart, options)
    for mine, theirs in zip(got, expected * 5, strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.isnan().any()


@needs_hopper
@pytest.mark.parametrize("cached", [True, False], ids=["beside a cache", "without one"])
@pytest.mark.parametrize("window", [None, 333])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bits_of_keys_in_own_rows_are_those_of_keys_in_one_piece(head_dim: int, window: int | None, cached: bool) -> None:
    """Of requests whose new keys are elsewhere from some block on, in rows that begin anywhere, the last of them with NaN behind."""
    torch.manual_seed(0)
    prefixes, extends = np.array([1000, 0, 128, 255, 2048, 0]) * cached, np.array([300, 70, 1, 512, 33, 700])
    lengths = prefixes + extends
    whole = torch.randn(2, int(lengths.sum()), 4, head_dim, device="cuda", dtype=torch.bfloat16)
    begins = np.cumsum(lengths) - lengths
    # The fourth is in order to its end.
    own = np.where(np.arange(6) == 3, NOT_HERE, -(-prefixes // PREFIX_UNIT) * PREFIX_UNIT)
    stay, near_end = prefixes // PREFIX_UNIT * PREFIX_UNIT, np.minimum(own, lengths)
    near = torch.cat([whole[:, b + s : b + e] for b, s, e in zip(begins, stay, near_end, strict=True)], 1)
    near_begins = np.cumsum(near_end - stay) - (near_end - stay)
    # Strided, as those of one projection for q, k and v; a row more before the first.
    rows = torch.full((2, int(extends.sum()) + 60, 6, head_dim), torch.nan, device="cuda", dtype=torch.bfloat16)[:, :, 1:5]
    first_rows = 1 + np.cumsum(extends) - extends
    for begin, prefix, extend, row in zip(begins, prefixes, extends, first_rows, strict=True):
        rows[:, row : row + extend] = whole[:, begin + prefix : begin + prefix + extend]
    q = torch.randn(int(extends.sum()), 16, head_dim, device="cuda", dtype=torch.bfloat16)
    options, request = AttentionOptions(scale=0.1, window=window), np.arange(6)
    in_one, apart = (
        Spans.build(extends, k_start, lengths, prefixes + 1, "cuda", request=request) for k_start in (begins, near_begins - stay)
    )

    def places(*columns: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack(columns, 1).reshape(-1)).int().cuda()

    own_rows = OwnRows(rows[0], rows[1], places(own, first_rows - prefixes))
    cache = None
    if cached:
        kept = torch.cat([whole[:, b : b + s] for b, s in zip(begins, stay, strict=True)], 1)
        cache = PrefixKeys(kept[0], kept[1], places(stay, np.cumsum(stay) - stay))
    plain = tuple(shape for shape in tile_shapes(head_dim, head_dim, q.dtype, (9, 0), specialized=True) if shape.specialized)
    expected = ragged_attention(q, Keys(whole[0], whole[1]), in_one, options, shapes=plain)
    got = ragged_attention(q, Keys(near[0], near[1], prefix=cache, own=own_rows), apart, options)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.isnan().any()


def _in_pages(whole: Tensor, begins: np.ndarray, stay: np.ndarray, page_size: int) -> tuple[Tensor, Tensor]:
    """The first keys of requests in shuffled pages ``[P, 2, page_size, heads, D]``, NaN beside them, and a table of garbage beyond."""
    counts = -(-stay // page_size)
    pages = torch.full((int(counts.sum()) + 3, 2, page_size, *whole.shape[2:]), torch.nan, device="cuda", dtype=whole.dtype)
    free = torch.randperm(len(pages)).tolist()
    table = torch.full((len(stay), int(counts.max()) + 2), 2**30, dtype=torch.int32)
    for request, (first, kept, count) in enumerate(zip(begins, stay, counts, strict=True)):
        for number in range(count):
            table[request, number] = free.pop()
            keys = whole[:, first + number * page_size : first + min(kept, (number + 1) * page_size)]
            pages[table[request, number], :, : keys.shape[1]] = keys
    return pages, table.cuda()
