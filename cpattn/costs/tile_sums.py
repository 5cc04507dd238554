"""What the tiles of spans add up to, in closed form: as :class:`cpattn.kernels.tiles.TilesOfSpans` would count them, one by one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.costs.hop_spans import RankSpans
from cpattn.device_tables import IntArray


class TileSums(NamedTuple):
    """Of each span, in tiles of a form: all but the last are full. Arrays ``[forms, n]``.

    Attributes:
        full: how many there are, and blocks: the key blocks that these visit, together.
        longest: of the full ones the key blocks of the one that has the most.
        last_tokens: of the last tile, and last_blocks: the key blocks that it visits, ``[n]`` where no window makes a difference.
    """

    full: IntArray
    blocks: IntArray
    longest: IntArray
    last_tokens: IntArray
    last_blocks: IntArray

    @classmethod
    def of(cls, spans: RankSpans, tokens_per_tile: IntArray, block_n: int, window: int | None) -> TileSums:
        """For tiles of so many tokens, ``[forms, 1]``. Their blocks are exact where a tile's tokens divide a key block or the other way
        round, and else within half a block a tile.

        >>> spans = RankSpans(*(np.array([x]) for x in (0, 300, 1000, 701)))
        >>> found = TileSums.of(spans, np.array([[128]]), 128, None)
        >>> [int(column.flat[0]) for column in found]  # tiles see 828, 956 and 1000 keys
        [2, 15, 8, 44, 8]
        """
        q_len, k_len, diagonal = spans.q_len, spans.k_len, spans.diagonal
        full = (q_len - 1) // tokens_per_tile
        last_tokens = q_len - full * tokens_per_tile
        # The first tiles see a tile's keys more each, others all that there are.
        growing = np.minimum((k_len - diagonal + 1) // tokens_per_tile, full)
        all_blocks = -(-k_len // block_n)
        blocks = growing_blocks(diagonal - 1, growing, tokens_per_tile, block_n) + (full - growing) * all_blocks
        longest = np.minimum(-(-(diagonal - 1 + full * tokens_per_tile) // block_n), all_blocks) * (full > 0)
        last_blocks = all_blocks
        if window is not None:
            behind = diagonal - window
            blocks = blocks - _blocks_behind(behind, full, tokens_per_tile, block_n)
            # Of the full ones the first that a window bounds, or the last, has about the most.
            longest = np.minimum(longest, -(-(window + tokens_per_tile) // block_n))
            last_blocks = last_blocks - np.maximum(behind + full * tokens_per_tile, 0) // block_n
        return cls(full, blocks, longest, last_tokens, last_blocks)


def growing_blocks(before: IntArray, many: IntArray, tile: IntArray | int, block_n: int) -> IntArray:
    """The sum of ``ceil((before + i * tile) / block_n)`` over i from 1 to ``many``."""
    if isinstance(tile, int) and block_n % tile == 0:
        return _growing_parts(before, many, tile, block_n // tile)
    parts = np.maximum(block_n // tile, 1)
    whole = _growing_parts(before, many, tile, parts)
    if (parts * tile == block_n).all():
        return whole
    sums = many * before + tile * (many * (many + 1) // 2)
    blocks = np.where(tile % block_n == 0, many * -(-before // block_n) + tile // block_n * (many * (many + 1) // 2),
                      (2 * sums + many * (block_n - 1)) // (2 * block_n))  # fmt: skip
    return np.where(parts * tile == block_n, whole, blocks)


def _growing_parts(before: IntArray, many: IntArray, tile: IntArray | int, parts: IntArray | int) -> IntArray:
    """The same in tiles' keys, of which so many make a block."""
    first = -(-before // tile)
    return _steps(first + many, parts) - _steps(first, parts)


def _steps(count: IntArray, parts: IntArray | int) -> IntArray:
    """The sum of ``ceil(j / parts)`` over j from 1 to ``count``."""
    blocks = count // parts
    total: IntArray = (blocks + 1) * (2 * count - parts * blocks) // 2
    return total


def _blocks_behind(behind: IntArray, full: IntArray, tile: IntArray, block_n: int) -> IntArray:
    """The sum of ``floor((behind + i * tile) / block_n)`` over i from 0 to ``full - 1``, without what is below 0."""
    begin = np.clip(-(behind // tile), 0, full)
    many = full - begin
    first = behind + begin * tile
    # A floor is the ceiling of what is a block less a token further back.
    return growing_blocks(first - tile - block_n + 1, many, tile, block_n)
