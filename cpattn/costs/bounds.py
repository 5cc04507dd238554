"""Between which times the launches of an all-gather and of a ring lie, by pairs, keys and the tiles of one form, added up.

Ways to make a call mostly differ by more than that, and are then compared in a part of the time of an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpattn.costs.hop_spans import RankSpans
from cpattn.costs.last_tiles import until_last
from cpattn.costs.tile_costs import FloatArray, TileCosts
from cpattn.costs.tile_sums import growing_blocks
from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem
from cpattn.rounds import MOST_ROUNDS

# Estimates round the time of each span, to a ps.
_ROUNDING = 1e-4


class _Tiles(NamedTuple):
    """Of each chunk, in tiles of the leading form: how many are full, and the key blocks that these visit; the tokens of the last one,
    and the key blocks that it visits."""

    full: IntArray
    blocks: IntArray
    last: IntArray
    last_blocks: IntArray


class _Loads(NamedTuple):
    """Seconds of the tiles of the leading form by one kernel, of each rank that has some.

    Attributes:
        all: of all of them together, as an estimate has it, which counts reading keys as well; most: on the rank that takes longest.
        computing: of computing alone.
        longest: no less than the longest takes.
    """

    all: FloatArray
    most: float
    computing: FloatArray
    longest: FloatArray


class Bounds:
    """Of launches without a window, by the number of a kernel among those that are compared.

    Args:
        over_pages: of each kernel, whether its keys lie in pages.
    """

    def __init__(self, plan: Layout, problem: Problem, costs: TileCosts, over_pages: Sequence[bool]) -> None:
        self._plan, self._problem, self._costs, self._over_pages = plan, problem, costs, over_pages
        request, start, length, rank = (column.take(plan.by_rank.order) for column in plan.chunk_table)
        before = plan.prefix_lens.take(request) + start
        # By rank.
        self._spans = RankSpans(rank, length, before + length, before + 1)
        # By kernel.
        self._made: dict[int, _Loads] = {}
        extends, tokens = plan.extend_lens, plan.num_tokens
        pairs = int(extends @ plan.prefix_lens) + (int(extends @ extends) + tokens) // 2
        self._blocks = pairs / costs.block_n

    def at_least(self, number: int) -> float:
        """Seconds of the launch over all keys on the slowest rank, no less than on an average one: of tiles that are full, or of reading
        the keys."""
        return self._at_least[number]

    def at_least_by_heads(self, number: int) -> float:
        """Seconds of a launch over whole requests with an even share of the heads."""
        return self._at_least_by_heads[number]

    @cached_property
    def _at_least(self) -> list[float]:
        return self._of_all(int(self._spans.k_len.sum()))

    @cached_property
    def _at_least_by_heads(self) -> list[float]:
        return self._of_all(int(self._plan.total_lens @ (self._plan.extend_lens > 0)))

    def _of_all(self, num_keys: int) -> list[float]:
        """By each kernel, of reading so many keys, or of all tiles, full ones; shared by the ranks."""
        plan, kernels = self._plan, self._costs.kernels
        if not plan.num_tokens:
            return [0.0] * len(kernels)
        # A key block takes no less for each row of a tile than in the largest tile that is full.
        found = []
        for kernel, of_block, read in zip(kernels, self._of_block, self._read, strict=True):
            computing = (self._blocks + kernel.tile * plan.num_tokens) * of_block
            found.append(kernel.overhead + max(computing, num_keys * read) / plan.cp_size * (1 - _ROUNDING))
        return found

    def at_least_by_tiles(self, number: int) -> float:
        """The same more closely, on the rank that takes longest: by tiles of the leading form."""
        if not self._costs.leads or not self._plan.num_tokens:
            return self.at_least(number)
        return self._costs.kernels[number].overhead + self._loads(number).most * (1 - _ROUNDING)

    def at_most(self, number: int) -> float:
        """Seconds of the launch with tiles of the leading form, whenever the last of them ends."""
        if not self._plan.num_tokens:
            return 0.0
        longest = self._loads(number).longest
        # Programs are done within an item's time: see makespan.
        return self._with_last(number, longest if self.is_sharp(number) else longest + self._loads(number).computing * self._has_few)

    def is_sharp(self, number: int) -> bool:
        """Whether :meth:`at_most_in_rounds` says no more than that."""
        kernel = self._costs.kernels[number]
        return not kernel.stays or kernel.splits or not self._plan.num_tokens or not self._has_few.any()

    def at_most_in_rounds(self, number: int) -> float:
        """The same more closely, by when the last of them ends."""
        if self.is_sharp(number):
            return self.at_most(number)
        costs, over_pages = self._costs.of_leading, self._over_pages[number]
        last = until_last(self._spans, self._begins, self._problem, costs, 1, over_pages)[number, 0]
        return self._with_last(number, np.maximum(self._loads(number).longest, last))

    def _with_last(self, number: int, last: FloatArray) -> float:
        """On the rank that takes longest, given until when the last tile of each ends."""
        kernel, (load, most, _, _) = self._costs.kernels[number], self._loads(number)
        return kernel.overhead + (most if kernel.splits else float(np.maximum(load, last).max())) * (1 + _ROUNDING)

    def ring_at_least(self, number: int) -> float:
        """Seconds of the launches of a ring: chunks see the shards of as many ranks as have earlier chunks of their request, and of each
        a key block at least."""
        plan, costs, kernel = self._plan, self._costs, self._costs.kernels[number]
        if not plan.num_tokens:
            return 0.0
        hops, blocks, ranges = self._of_ring
        visited = blocks + kernel.tile * ranges
        # Tokens that take as long in full tiles as a chunk's own do, however they are cut.
        tokens: FloatArray | IntArray = self._spans.q_len
        if costs.leads:
            last = costs.last_costs[number].take(self._tiles.last)
            tokens = costs.forms[costs.leading].tokens * (self._tiles.full + last / costs.full_cost[number])
        loads = np.add.reduceat(tokens * visited.take(plan.by_rank.order), self._begins)
        computing = float(loads.max()) * self._of_block[number]
        return kernel.overhead * hops + computing * (1 - _ROUNDING)

    def _loads(self, number: int) -> _Loads:
        """Worked out once."""
        if number not in self._made:
            costs, problem, tiles = self._costs.of_leading, self._problem, self._tiles
            full_cost, tile = costs.full_cost[number], costs.kernels[number].tile
            visited = tiles.last_blocks + tile
            last = visited * costs.last_costs[number].take(tiles.last)
            shared, alone = (float(rates[number, 0, 0]) for rates in costs.rates(problem, 1, self._over_pages[number]))
            seconds = (full_cost * (tiles.blocks + tile * tiles.full) + last) * shared
            load = np.add.reduceat(np.maximum(seconds, self._spans.k_len * self._read[number]), self._begins)
            computing = np.add.reduceat(seconds, self._begins)
            # The last of the full ones visits no more than the last of all.
            longest = np.maximum.reduceat(np.maximum(last, visited * (full_cost * (tiles.full > 0))), self._begins) * alone
            self._made[number] = _Loads(load, float(load.max()), computing, longest)
        return self._made[number]

    @cached_property
    def _tiles(self) -> _Tiles:
        tokens, block_n = self._costs.forms[self._costs.leading].tokens, self._costs.block_n
        _, length, keys, sees = self._spans
        full = (length - 1) // tokens
        blocks = growing_blocks(sees - 1, full, self._costs.of_leading.tokens[0], block_n)
        return _Tiles(full, blocks, length - full * tokens, -(-keys // block_n))

    @cached_property
    def _has_few(self) -> npt.NDArray[np.bool_]:
        """Of each rank that has some, whether its tiles are so few that it counts when the last one ends."""
        costs = self._costs.of_leading
        items = np.add.reduceat(self._tiles.full + 1, self._begins) * (self._problem.q_heads // int(costs.pack[0, 0]))
        has_few: npt.NDArray[np.bool_] = (items > costs.multiprocessors) & (items <= MOST_ROUNDS * costs.multiprocessors)
        return has_few

    @cached_property
    def _begins(self) -> IntArray:
        """Where the spans of each rank begin that has some."""
        bounds = self._plan.by_rank.bounds
        return bounds[:-1][bounds[1:] > bounds[:-1]]

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

    @cached_property
    def _of_block(self) -> list[float]:
        """Of each kernel the seconds of a token and a key block, of all heads, where it takes the least."""
        costs, problem = self._costs, self._problem
        # In pages a ring has its prefixes alone, which a kernel may read more slowly there.
        alone = costs.rates(problem, 1, False)[1]
        if problem.cache == "paged":
            alone = np.minimum(alone, costs.rates(problem, 1, True)[1])
        found: list[float] = (alone.ravel() * (costs.full_of_row * problem.q_heads / costs.multiprocessors)).tolist()
        return found

    @cached_property
    def _read(self) -> list[float]:
        """The same of reading a key."""
        found: list[float] = (self._costs.bytes_read(self._problem, 1) / self._costs.read).ravel().tolist()
        return found
