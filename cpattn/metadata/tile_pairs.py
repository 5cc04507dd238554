"""What the tiles of a launch take on each rank, in query-key pairs: all of them together, the longest, and until the last one ends."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.laid_out import RankChunks
from cpattn.metadata.pair_costs import FULL, Form, PairCosts
from cpattn.rounds import MOST_ROUNDS, makespan


class Launch(NamedTuple):
    """What is attended to on ranks that have something to attend to, in whatever tiles.

    Attributes:
        length ``[c]``: the tokens of chunks, by rank; before: keys of their request before their own ones.
        begins: where the chunks of each of those ranks begin.
        reading ``[kernels, c]``: what a chunk takes at least, to read its keys.
        window: of the attention, or None.
    """

    length: IntArray
    before: IntArray
    begins: IntArray
    reading: IntArray
    window: int | None
    costs: PairCosts

    @classmethod
    def of(cls, chunks: RankChunks, window: int | None, costs: PairCosts) -> Launch:
        """Of chunks of all ranks."""
        length, before, bounds = chunks
        # Keys within the windows of a chunk's queries.
        seen = before if window is None else np.minimum(before, window)
        return cls(length, before, bounds[:-1][bounds[:-1] < bounds[1:]], (seen + length) * costs.read, window, costs)


class TilePairs:
    """Of tiles of one form. Arrays are ``[kernels, ranks]``, of ranks that have something to attend to.

    Attributes:
        loads: what the tiles of each rank take together.
        longest: what the longest of them takes, while the rest of the machine waits for it.
        least: what the launch takes at least, if all programs are done at the same time.
    """

    def __init__(self, launch: Launch, form: Form) -> None:
        self._launch, self._form, tile = launch, form, form.tokens
        length, before, begins, reading, window, costs = launch
        self._full = full = (length - 1) // tile
        seen = before + length
        if window is None:
            # Each of the full ones sees a tile's keys more than the one before it.
            keys = full * (before + (full + 1) * tile // 2 + costs.beside)
        else:
            # From some on a window bounds what they see.
            growing = np.clip((window + tile - before) // tile, 0, full)
            keys = growing * (before + (growing + 1) * tile // 2) + (full - growing) * (window + tile) + full * costs.beside
            seen = np.minimum(seen, window + tile)
        seen = seen + costs.beside
        of_half_full = seen * costs.half_full // FULL
        if form.is_half:
            keys = keys * costs.half_full // FULL
            longest = self._last = of_half_full
        else:
            is_half_full = 2 * (length - full * tile) <= tile
            self._last = np.where(is_half_full, of_half_full, seen)
            longest = np.where(full > 0, seen, self._last)
        self._pairs = (keys + self._last) * form.of_full
        self.loads = np.add.reduceat(np.maximum(self._pairs, reading), begins, axis=-1)
        self.longest = np.maximum.reduceat(longest, begins, axis=-1) * costs.tile_key
        self.least = np.maximum(self.loads, self.longest)

    def until_last(self, kernel: int, most: int, others: IntArray | None = None) -> IntArray:
        """``[ranks]`` pairs until the last tile ends, by a kernel whose programs take tiles in turn. It is ``least`` where there are
        fewer tiles than programs, or many times as many; where it is no later than ``most`` however they are taken; and where ``others``
        take no longer anyway."""
        _, before, begins, _, window, costs = self._launch
        tile, many, last = self._form.tokens, self._full + 1, self._last[kernel]
        tiles = np.add.reduceat(many, begins)
        items = tiles * self._form.each
        asked = (items > costs.programs) & (items <= MOST_ROUNDS * costs.programs)
        if others is not None:
            asked &= self.least[kernel] < others
        if asked.any():
            # No tile is taken later than all programs would be done at the same time.
            asked &= np.add.reduceat(self._pairs[kernel], begins) + self.longest[kernel] > most
        found: IntArray = self.least[kernel].copy()
        if not asked.any():
            return found
        if not asked.all():
            taken = asked.repeat(np.diff(begins, append=len(many)))
            before, many, last, tiles = before[taken], many[taken], last[taken], tiles[asked]
        ends = many.cumsum()
        sees = np.arange(tile, tile * (int(ends[-1]) + 1), tile)
        sees += (before - tile * (ends - many)).repeat(many)
        if window is not None:
            np.minimum(sees, window + tile, out=sees)
        sees += int(costs.beside[kernel, 0])
        if self._form.is_half:
            sees = sees * int(costs.half_full[kernel, 0]) // FULL
        sees[ends - 1] = last
        work = np.zeros((len(tiles), int(tiles.max())), dtype=np.int64)
        work[np.arange(work.shape[1]) < tiles[:, None]] = sees
        by_rounds = makespan(work, self._form.each, costs.programs).astype(np.int64) * int(costs.tile_key[kernel, 0])
        found[asked] = np.maximum(found[asked], by_rounds)
        return found
