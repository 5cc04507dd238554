"""Between which times the launches of an all-gather and of a ring lie, by pairs, keys and tiles, without a look at each tile.

Ways to make a call mostly differ by more than that, and are then compared in a part of the time of an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cpattn.costs.hop_spans import RankSpans
from cpattn.costs.last_tiles import until_last
from cpattn.costs.tile_costs import FloatArray, TileCosts
from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem

# Estimates round the time of each span, to a ps.
_ROUNDING = 1e-4


class _Tiles(NamedTuple):
    """Of each chunk, in tiles of the leading form: how many are full, and the keys that these see, in blocks; the tokens of the last one,
    and the key blocks that it visits."""

    full: IntArray
    keys: FloatArray
    last: IntArray
    last_blocks: IntArray


class Bounds:
    """Of launches without a window, by the number of a kernel among those that are compared.

    Args:
        over_pages: of each kernel, whether its keys lie in pages.
    """

    def __init__(self, plan: Layout, problem: Problem, costs: TileCosts, over_pages: Sequence[bool]) -> None:
        self._plan, self._problem, self._costs, self._over_pages = plan, problem, costs, over_pages
        # Asked for of an all-gather, and then of a ring.
        self._by_tiles: dict[int, float] = {}
        request, start, self._length, self._rank = plan.chunk_table
        self._before = plan.prefix_lens[request] + start
        self._keys = self._before + self._length
        extends, tokens = plan.extend_lens, plan.num_tokens
        pairs = int(extends @ plan.prefix_lens) + (int(extends @ extends) + tokens) // 2
        self._blocks, self._bytes = pairs / costs.block_n, int(self._keys.sum()) * problem.key_bytes

    def at_least(self, number: int) -> float:
        """Seconds of the launch over all keys on the slowest rank, no less than on an average one: of tiles that are full, or of reading
        the keys."""
        kernel = self._costs.kernels[number]
        if not self._plan.num_tokens:
            return 0.0
        return kernel.overhead + max(self._computing(number), self._bytes / kernel.read) / self._plan.cp_size * (1 - _ROUNDING)

    def at_least_by_heads(self, number: int) -> float:
        """Seconds of a launch over whole requests with an even share of the heads."""
        kernel, plan = self._costs.kernels[number], self._plan
        if not plan.num_tokens:
            return 0.0
        read = int(plan.total_lens @ (plan.extend_lens > 0)) * self._problem.key_bytes / kernel.read
        return kernel.overhead + max(self._computing(number), read) / plan.cp_size * (1 - _ROUNDING)

    def _computing(self, number: int) -> float:
        """Seconds of all tiles, full ones."""
        # A key block takes no less for each row of a tile than in the largest tile that is full.
        return (self._blocks + self._costs.kernels[number].tile * self._plan.num_tokens) * self._of_block(number)

    def at_least_by_tiles(self, number: int) -> float:
        """The same more closely, on the rank that takes longest: full tiles visit no fewer keys than they see."""
        if not self._costs.leads or not self._plan.num_tokens:
            return self.at_least(number)
        if number not in self._by_tiles:
            self._by_tiles[number] = self._costs.kernels[number].overhead + self._load(number, 0.0) * (1 - _ROUNDING)
        return self._by_tiles[number]

    def at_most(self, number: int) -> float:
        """Seconds of the launch with tiles of the leading form, each full one of which visits a part of a block more than it sees."""
        costs, kernel = self._costs, self._costs.kernels[number]
        if not self._plan.num_tokens:
            return 0.0
        longest = 0.0
        if not kernel.splits:
            longest = (int(self._tiles.last_blocks.max()) + kernel.tile) * costs.full_cost[number] * self._of_row(number)
        # Where tiles and blocks do not divide each other, half a block more is counted.
        load = self._load(number, 1.0 if costs.are_even else 1.5)
        return kernel.overhead + max(load, longest, self._until_last[number]) * (1 + _ROUNDING)

    def ring_at_least(self, number: int) -> float:
        """Seconds of the launches of a ring: chunks see the shards of as many ranks as have earlier chunks of their request, and of each
        a key block at least."""
        plan, costs, kernel = self._plan, self._costs, self._costs.kernels[number]
        if not plan.num_tokens:
            return 0.0
        hops, blocks, ranges = self._of_ring
        visited = blocks + kernel.tile * ranges
        # Tokens that take as long in full tiles as a chunk's own do, however they are cut.
        tokens: FloatArray | IntArray = self._length
        if costs.leads:
            last = costs.last_costs[number].take(self._tiles.last)
            tokens = costs.forms[costs.leading].tokens * (self._tiles.full + last / costs.full_cost[number])
        computing = float(np.bincount(self._rank, tokens * visited).max()) * self._of_block(number)
        return kernel.overhead * hops + computing * (1 - _ROUNDING)

    def _load(self, number: int, more: float) -> float:
        """Seconds of all tiles of the leading form, on the rank that takes longest, where full tiles visit so much more of a key block than
        they have keys."""
        costs, kernel, tiles = self._costs, self._costs.kernels[number], self._tiles
        work = costs.full_cost[number] * (tiles.keys + (kernel.tile + more) * tiles.full)
        work += costs.last_costs[number].take(tiles.last) * (tiles.last_blocks + kernel.tile)
        heads = self._problem.q_heads // costs.forms[costs.leading].pack
        work *= self._of_row(number) * heads / costs.multiprocessors
        return float(np.bincount(self._rank, np.maximum(work, self._keys * (self._problem.key_bytes / kernel.read))).max())

    @cached_property
    def _tiles(self) -> _Tiles:
        tokens = self._costs.forms[self._costs.leading].tokens
        full = (self._length - 1) // tokens
        keys = full * (self._before + (full + 1) * (tokens / 2))
        return _Tiles(full, keys / self._costs.block_n, self._length - full * tokens, -(-self._keys // self._costs.block_n))

    @cached_property
    def _until_last(self) -> list[float]:
        """Of each kernel the seconds until the last tile of the leading form ends, where that is counted."""
        costs, problem, by_rank = self._costs, self._problem, self._plan.by_rank
        columns = self._rank, self._length, self._keys, self._before + 1
        spans = RankSpans._make([column.take(by_rank.order) for column in columns])
        begins = by_rank.bounds[:-1][by_rank.bounds[1:] > by_rank.bounds[:-1]]
        # Of a kernel over keys in order, beside one that pages slow down, no less than that.
        slowed = any(self._paged(number) > 1 for number in range(len(costs.kernels)))
        found: list[float] = until_last(spans, begins, problem, costs.of_leading, 1, slowed).max(axis=(1, 2)).tolist()
        return found

    @cached_property
    def _of_ring(self) -> tuple[int, FloatArray, IntArray]:
        """How many hops have something to attend to, at least; of each chunk the key blocks that it sees, and in how many hops."""
        request, start, length, rank = self._plan.chunk_table
        # A chunk that is its rank's first of a request brings one more, for itself and those behind it.
        order = self._plan.by_rank.order
        ranks, requests = rank.take(order), request.take(order)
        is_first = np.ones(len(order), dtype=bool)
        is_first[order[1:]] = (ranks[1:] != ranks[:-1]) | (requests[1:] != requests[:-1])
        shards = is_first.cumsum()
        begins = np.ones(len(order), dtype=bool)
        begins[1:] = request[1:] != request[:-1]
        shards -= (shards[begins] - 1).take(begins.cumsum() - 1)
        hops, blocks = int(shards.max()), np.maximum((start + length / 2) / self._costs.block_n, shards)
        if not self._plan.num_prefix_tokens:
            return hops, blocks, shards
        prefix = self._plan.prefix_lens[request]
        return hops + 1, blocks + prefix / self._costs.block_n, shards + (prefix > 0)

    def _of_block(self, number: int) -> float:
        """Seconds of a token and a key block, of all heads, where it takes the least."""
        costs = self._costs
        least = costs.unit / costs.kernels[number].flops * min(1.0, self._paged(number))
        return least * costs.full_of_row * self._problem.q_heads / costs.multiprocessors

    def _of_row(self, number: int) -> float:
        return self._costs.unit / self._costs.kernels[number].flops * self._paged(number)

    def _paged(self, number: int) -> float:
        kernel = self._costs.kernels[number]
        return kernel.paged if self._over_pages[number] and kernel.reads_pages(self._problem.page_size) else 1.0
