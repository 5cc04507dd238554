"""What the tiles of the leading form take where a rank's queries see all of their keys at once: worked out once, kernel by kernel, for
bounds and for estimates."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpattn.costs.hop_spans import RankSpans
from cpattn.costs.last_tiles import until_last_of_form
from cpattn.costs.tile_costs import FloatArray, TileCosts
from cpattn.costs.tile_sums import growing_blocks
from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem
from cpattn.rounds import MOST_ROUNDS


class _Counts(NamedTuple):
    """Of each span: how many of its tiles are full, and the key blocks that these visit, together; the tokens of the span's last tile, and
    the key blocks that it visits."""

    full: IntArray
    blocks: IntArray
    last: IntArray
    last_blocks: IntArray


class TilesOfLaunch:
    """Those of a launch over all keys, without a window: what is the same by whatever kernel.

    Attributes:
        spans: by rank; begins: where those of each rank begin that has some.
    """

    def __init__(self, plan: Layout, problem: Problem, costs: TileCosts) -> None:
        self.problem, self.costs = problem, costs
        request, start, length, rank = (column.take(plan.by_rank.order) for column in plan.chunk_table)
        before = plan.prefix_lens.take(request) + start
        self.spans = RankSpans(rank, length, before + length, before + 1)
        self.begins = plan.by_rank.begins()
        self._rounds: dict[bool, FloatArray] = {}

    def rounds(self, over_pages: bool) -> FloatArray:
        """``[kernels, ranks]``: see :func:`cpattn.costs.last_tiles.until_last`."""
        found = self._rounds.get(over_pages)
        if found is None:
            costs = self.costs.of_leading
            found = self._rounds[over_pages] = until_last_of_form(
                self.spans, self.begins, self._tiles, self.has_few, 0, self.problem, costs, 1, over_pages
            )
        return found

    @cached_property
    def counts(self) -> _Counts:
        """Of each span."""
        tokens, block_n = self.costs.forms[self.costs.leading].tokens, self.costs.block_n
        _, length, keys, sees = self.spans
        full = (length - 1) // tokens
        return _Counts(full, growing_blocks(sees - 1, full, tokens, block_n), length - full * tokens, -(-keys // block_n))

    @cached_property
    def _tiles(self) -> IntArray:
        """How many each rank has, of those that have some."""
        return np.add.reduceat(self.counts.full + 1, self.begins)

    @cached_property
    def has_few(self) -> npt.NDArray[np.bool_]:
        """Of each of those ranks, whether they are so few that it counts when the last one ends."""
        costs = self.costs.of_leading
        items = self._tiles * (self.problem.q_heads // int(costs.pack[0, 0]))
        has_few: npt.NDArray[np.bool_] = (items > costs.multiprocessors) & (items <= MOST_ROUNDS * costs.multiprocessors)
        return has_few

    @cached_property
    def bytes_read(self) -> list[int]:
        """Of the K and V of a token, by each kernel."""
        found: list[int] = self.costs.bytes_read(self.problem, 1).ravel().tolist()
        return found


class TilesByKernel:
    """Seconds of them by one kernel, of each rank that has some; each is worked out when it is asked for.

    It is what :func:`cpattn.costs.launches.seconds_of` adds up of any spans, for all kernels and forms at once, to the last bit.
    """

    def __init__(self, tiles: TilesOfLaunch, number: int, over_pages: bool) -> None:
        self._tiles, self._number, self._over_pages = tiles, number, over_pages
        costs, counts = tiles.costs, tiles.counts
        self._kernel, self._full_cost = costs.kernels[number], costs.full_cost[number]
        rates = costs.of_leading.rates(tiles.problem, 1, over_pages)
        shared, self._alone = float(rates[0][number, 0, 0]), float(rates[1][number, 0, 0])
        self._last = (counts.last_blocks + self._kernel.tile) * costs.last_costs[number].take(counts.last)
        self._seconds = (self._full_cost * (counts.blocks + self._kernel.tile * counts.full) + self._last) * shared

    @cached_property
    def load(self) -> FloatArray:
        """Of all tiles together; of a span whose queries are few, of reading its keys."""
        reading = self._tiles.spans.k_len * self._tiles.bytes_read[self._number] / self._kernel.read
        # In ps, whose sums are exact, and so the same on every rank.
        load: FloatArray = np.add.reduceat(np.rint(np.maximum(self._seconds, reading) * 1e12), self._tiles.begins) * 1e-12
        return load

    @cached_property
    def most(self) -> float:
        """The same on the rank that takes longest."""
        return float(self.load.max())

    @cached_property
    def longest(self) -> FloatArray:
        """Of the longest of them."""
        tiles = self._tiles
        seen = tiles.spans.k_len - tiles.counts.last
        return self._longest(-(-seen // tiles.costs.block_n))

    def _longest(self, blocks: IntArray) -> FloatArray:
        """The same where the last full tile of each span visits so many key blocks."""
        of_full = (blocks + self._kernel.tile) * (self._full_cost * (self._tiles.counts.full > 0))
        longest: FloatArray = np.maximum.reduceat(np.maximum(of_full, self._last), self._tiles.begins) * self._alone
        return longest

    @cached_property
    def last(self) -> FloatArray:
        """Until the last of them ends, which is no less than the longest takes."""
        if not self._kernel.stays or not self._tiles.has_few.any():
            return self.longest
        last: FloatArray = np.maximum(self.longest, self._tiles.rounds(self._over_pages)[self._number])
        return last

    @property
    def no_later(self) -> FloatArray:
        """Than that it ends, which takes less time to work out: programs are done within an item's time, see
        :func:`cpattn.rounds.makespan`. A span's full tiles visit no more than its last one."""
        no_later = self._longest(self._tiles.counts.last_blocks)
        if self._kernel.stays and self._tiles.has_few.any():
            no_later = no_later + np.add.reduceat(self._seconds, self._tiles.begins) * self._tiles.has_few
        return no_later


class LeadingTiles:
    """What each kernel takes for them.

    Attributes:
        tiles: what is the same by all. Neither it nor what one takes refers to this: without a cycle it is freed with the last reference,
            also where an engine keeps Python from looking for cycles.
    """

    def __init__(self, plan: Layout, problem: Problem, costs: TileCosts) -> None:
        self.tiles, self._size = TilesOfLaunch(plan, problem, costs), plan.cp_size
        self._by_kernel: dict[tuple[int, bool], TilesByKernel] = {}

    def by(self, number: int, over_pages: bool) -> TilesByKernel:
        """By the kernel of that number, over keys that lie in pages, or not."""
        found = self._by_kernel.get((number, over_pages))
        if found is None:
            found = self._by_kernel[number, over_pages] = TilesByKernel(self.tiles, number, over_pages)
        return found

    def of_kernels(self, over_pages: bool) -> tuple[FloatArray, FloatArray]:
        """``[kernels, 1, cp_size]`` seconds of all tiles together, and until the last one ends; 0 on ranks that have none."""
        kernels = self.tiles.costs.kernels
        load, last = np.zeros((2, len(kernels), 1, self._size))
        ranks = self.tiles.spans.rank[self.tiles.begins]
        for number, kernel in enumerate(kernels):
            one = self.by(number, over_pages)
            load[number, 0, ranks] = one.load
            if not kernel.splits:
                last[number, 0, ranks] = one.last
        return load, last
