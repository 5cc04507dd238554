"""Between which times the launches of an all-gather and of a ring lie, by pairs, keys and the tiles of one form, added up.

Ways to make a call mostly differ by more than that, and are then compared in a part of the time of an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from cpattn.costs.launches import Launches
from cpattn.costs.leading_tiles import TilesByKernel
from cpattn.costs.tile_costs import FloatArray
from cpattn.device_tables import IntArray
from cpattn.machine import KernelCosts

# Estimates round the time of each span, to a ps.
_ROUNDING = 1e-4


class Bounds:
    """Of launches without a window, by the backend whose kernel is launched.

    Args:
        over_pages: of each backend, whether its keys lie in pages.
    """

    def __init__(self, launches: Launches, over_pages: Mapping[str, bool]) -> None:
        self._plan, self._problem, self._costs = launches.plan, launches.problem, launches.costs
        self._numbers, self._over_pages, self._leading = launches.numbers, over_pages, launches.leading
        self._tiles = self._leading.tiles
        extends, tokens = self._plan.extend_lens, self._plan.num_tokens
        pairs = int(extends @ self._plan.prefix_lens) + (int(extends @ extends) + tokens) // 2
        self._blocks = pairs / self._costs.block_n

    def at_least(self, backend: str) -> float:
        """Seconds of the launch over all keys on the slowest rank, no less than on an average one: of tiles that are full, or of reading
        the keys."""
        return self._at_least[self._numbers[backend]]

    def at_least_by_heads(self, backend: str) -> float:
        """Seconds of a launch over whole requests with an even share of the heads."""
        return self._at_least_by_heads[self._numbers[backend]]

    @cached_property
    def _at_least(self) -> list[float]:
        return self._of_all(int(self._tiles.spans.k_len.sum()))

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

    def at_least_by_tiles(self, backend: str) -> float:
        """The same more closely, on the rank that takes longest: by tiles of the leading form."""
        if not self._costs.leads or not self._plan.num_tokens:
            return self.at_least(backend)
        return self._kernel(backend).overhead + self._by(backend).most * (1 - _ROUNDING)

    def at_most(self, backend: str) -> float:
        """Seconds of the launch with tiles of the leading form, whenever the last of them ends."""
        return self._at_most(backend, in_rounds=False)

    def at_most_in_rounds(self, backend: str) -> float:
        """The same more closely, by when the last of them ends."""
        return self._at_most(backend, in_rounds=True)

    def has_rounds(self, backend: str) -> bool:
        """Whether that says more."""
        kernel = self._kernel(backend)
        return kernel.stays and not kernel.splits and self._plan.num_tokens > 0 and bool(self._tiles.has_few.any())

    def _at_most(self, backend: str, in_rounds: bool) -> float:
        if not self._plan.num_tokens:
            return 0.0
        kernel, tiles = self._kernel(backend), self._by(backend)
        seconds = tiles.most
        if not kernel.splits:
            seconds = float(np.maximum(tiles.load, tiles.last if in_rounds else tiles.no_later).max())
        return kernel.overhead + seconds * (1 + _ROUNDING)

    def _kernel(self, backend: str) -> KernelCosts:
        return self._costs.kernels[self._numbers[backend]]

    def _by(self, backend: str) -> TilesByKernel:
        return self._leading.by(self._numbers[backend], self._over_pages[backend])

    def ring_at_least(self, backend: str) -> float:
        """Seconds of the launches of a ring: chunks see the shards of as many ranks as have earlier chunks of their request, and of each
        a key block at least."""
        plan, costs, number = self._plan, self._costs, self._numbers[backend]
        kernel = costs.kernels[number]
        if not plan.num_tokens:
            return 0.0
        hops, blocks, ranges = self._of_ring
        visited = blocks + kernel.tile * ranges
        # Tokens that take as long in full tiles as a chunk's own do, however they are cut.
        tokens: FloatArray | IntArray = self._tiles.spans.q_len
        if costs.leads:
            counts = self._tiles.counts
            last = costs.last_costs[number].take(counts.last)
            tokens = costs.forms[costs.leading].tokens * (counts.full + last / costs.full_cost[number])
        loads = np.add.reduceat(tokens * visited.take(plan.by_rank.order), self._tiles.begins)
        computing = float(loads.max()) * self._of_block[number]
        return kernel.overhead * hops + computing * (1 - _ROUNDING)

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
        return [nbytes / kernel.read for nbytes, kernel in zip(self._tiles.bytes_read, self._costs.kernels, strict=True)]
