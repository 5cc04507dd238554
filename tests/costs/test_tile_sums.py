"""Sums over tiles in closed form, beside the tiles that the kernel's launch is made of."""

from __future__ import annotations

import numpy as np
import pytest

from cpattn.costs.hop_spans import RankSpans
from cpattn.costs.tile_sums import TileSums
from cpattn.kernels.tiles import TilesOfSpans
from cpattn.spans import HostSpans


@pytest.mark.parametrize("window", [None, 1, 100, 640])
@pytest.mark.parametrize(("tile", "block"), [(128, 128), (64, 128), (16, 128), (1, 128), (128, 64)])
def test_they_are_those_of_all_tiles(tile: int, block: int, window: int | None) -> None:
    """Of spans over all keys before and with their own, and without a window also over keys that all queries see, or over none."""
    rng = np.random.default_rng(tile)
    q_len, before = rng.integers(1, 700, 40), rng.integers(0, 900, 40)
    full = rng.random(40) < 0.4 if window is None else np.zeros(40, dtype=bool)
    before[:2] = 0
    k_len, diagonal = np.where(full, before, before + q_len), np.where(full, before, before + 1)
    zeros = np.zeros(40, dtype=np.int64)
    tiles = TilesOfSpans.of(HostSpans(zeros, q_len, zeros, k_len, diagonal, zeros), tile, block, window)
    sums = TileSums.of(RankSpans(zeros, q_len, k_len, diagonal), np.array([[tile]]), block, window)
    last_blocks = np.broadcast_to(sums.last_blocks, sums.full.shape)[0]
    for span in range(40):
        blocks = tiles.blocks[tiles.span == span]
        assert sums.full[0, span] == len(blocks) - 1
        assert sums.blocks[0, span] == blocks[:-1].sum()
        assert last_blocks[span] == blocks[-1]
        assert sums.last_tokens[0, span] == tiles.tokens[tiles.span == span][-1]
        assert abs(sums.longest[0, span] - blocks[:-1].max(initial=0)) <= (window is not None)


def test_tiles_that_no_block_is_a_multiple_of_are_within_half_a_block_each() -> None:
    """Five query heads share a tile of 128 rows, so that it has 25 tokens."""
    spans = RankSpans(*(np.array([x]) for x in (0, 5000, 8000, 3001)))
    host = HostSpans(*(np.array([x]) for x in (0, 5000, 0, 8000, 3001, 0)))
    sums, tiles = TileSums.of(spans, np.array([[25]]), 128, None), TilesOfSpans.of(host, 25, 128, None)
    assert abs(sums.blocks[0, 0] - tiles.blocks[:-1].sum()) <= len(tiles.blocks) / 2
