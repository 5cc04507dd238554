"""How long attention launches take: by tiles, as :mod:`cpattn.kernels.tiles` cuts them, by when the last of them ends, and by the keys
read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from cpattn.costs.hop_spans import RankSpans, over_shards, spans_of
from cpattn.costs.last_tiles import until_last
from cpattn.costs.leading_tiles import LeadingTiles
from cpattn.costs.tile_costs import FloatArray, TileCosts
from cpattn.costs.tile_sums import TileSums
from cpattn.device_tables import IntArray
from cpattn.exchange.schedule import Hop
from cpattn.kernels.tiles import MARGIN
from cpattn.machine import KernelCosts, Machine
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem


class Launches:
    """The attention launches of a plan and problem on a machine, each kind worked out once for all backends, or for some of them."""

    def __init__(self, plan: Layout, problem: Problem, machine: Machine, kernels: Sequence[KernelCosts] | None = None) -> None:
        self.plan, self.problem, self._machine = plan, problem, machine
        self.kernels = machine.kernels if kernels is None else tuple(kernels)
        self.costs = TileCosts.of(problem, machine, self.kernels)
        self.numbers = {kernel.backend: number for number, kernel in enumerate(self.kernels)}
        self._made: dict[tuple[Any, ...], FloatArray] = {}
        self._others: dict[tuple[Layout, Problem], Launches] = {}

    def of(self, plan: Layout, problem: Problem) -> Launches:
        """Those of another plan and problem on the machine, such as a group of ranks has; made once."""
        key = plan, problem
        if key not in self._others:
            self._others[key] = Launches(plan, problem, self._machine)
        return self._others[key]

    @cached_property
    def leading(self) -> LeadingTiles:
        """The tiles of the leading form of the launch over all keys, where there is no window."""
        return LeadingTiles(self.plan, self.problem, self.costs)

    def seconds(self, hop: Hop, kernel: KernelCosts, groups: int = 1, over_pages: bool = False) -> FloatArray:
        """``[cp_size]`` of a hop's launch on each rank, over one of so many groups of heads; 0 where there is nothing to see.
        ``over_pages`` if its keys lie in pages, for kernels that read them as they are."""
        key = hop.queries, hop.keys, groups, over_pages
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._seconds(hop, groups, over_pages)
        seconds: FloatArray = made[self.numbers[kernel.backend]]
        return seconds

    def _seconds(self, hop: Hop, groups: int, over_pages: bool) -> FloatArray:
        """``[kernels, cp_size]`` of that launch by each kernel."""
        plan, problem = self.plan, self.problem
        if hop.keys == "all" and hop.united == groups == 1 and problem.window is None:
            tiles = self.leading.tiles
            return seconds_of([(tiles.spans, tiles.begins, 1)], plan.cp_size, problem, self.costs, groups, over_pages, self.leading)
        parts = []
        for spans, count in spans_of(plan, hop):
            if spans.rank is plan.chunk_table.rank:
                order = plan.by_rank.order
                parts.append((RankSpans._make([column.take(order) for column in spans]), plan.by_rank.begins(), count))
            else:
                parts.append((*_by_rank(spans, plan.cp_size), count))
        return seconds_of(parts, plan.cp_size, problem, self.costs, groups, over_pages)

    def look_at(self, hops: Sequence[Hop]) -> None:
        """Works out several hops over shards without pages at once, which takes less time than one after another."""
        hops = [hop for hop in hops if (hop.queries, hop.keys, 1, False) not in self._made]
        if len(hops) > 1:
            size, spans = self.plan.cp_size, over_shards(self.plan, hops)
            seconds = seconds_of([(*_by_rank(spans, size * len(hops)), 1)], size * len(hops), self.problem, self.costs, 1, False)
            for number, hop in enumerate(hops):
                self._made[hop.queries, hop.keys, 1, False] = seconds[:, number * size : (number + 1) * size]

    def slowest(self, hop: Hop, kernel: KernelCosts, groups: int = 1, over_pages: bool = False) -> float:
        """The same on the rank that takes longest."""
        return float(self.seconds(hop, kernel, groups, over_pages).max(initial=0))


class Given(Launches):
    """Launches that take so many seconds each."""

    def __init__(self, seconds: float) -> None:
        self._given = seconds

    def of(self, plan: Layout, problem: Problem) -> Launches:
        """As many of any."""
        return self

    def seconds(self, hop: Hop, kernel: KernelCosts, groups: int = 1, over_pages: bool = False) -> FloatArray:
        """As many for every hop."""
        return np.array([self._given])

    def look_at(self, hops: Sequence[Hop]) -> None:
        """There is nothing to work out."""

    def slowest(self, hop: Hop, kernel: KernelCosts, groups: int = 1, over_pages: bool = False) -> float:
        """The same."""
        return self._given


def seconds_of(
    parts: list[tuple[RankSpans, IntArray, int]],
    size: int,
    problem: Problem,
    costs: TileCosts,
    groups: int,
    over_pages: bool,
    leading: LeadingTiles | None = None,
) -> FloatArray:
    """``[kernels, size]`` seconds of launches on so many ranks: of spans by rank, where each rank's begin, and how often they count; with
    their tiles of the leading form, where those are known.

    The multiprocessors share the tiles of a launch, and it is not over before its last tile. A span takes the time of its tiles, or
    where its queries are few, of reading its keys.
    """
    parts = [part for part in parts if len(part[0].rank)]
    works = np.zeros(size, dtype=bool)
    for spans, begins, _ in parts:
        works[spans.rank[begins]] |= np.maximum.reduceat(spans.k_len, begins) > 0
    if not works.any():
        return np.zeros((len(costs.kernels), size))
    least = None
    for forms in costs.parts if problem.window is None else [costs]:
        if leading is not None and forms is costs.of_leading:
            load, last = leading.of_kernels(over_pages)
        else:
            load, last = _load_and_last(parts, size, problem, forms, groups, over_pages, least)
        seconds = np.where(costs.splits, load, np.maximum(load, last)).min(axis=1)
        least = seconds if least is None else np.minimum(least, seconds)
        # Others are not taken for less than that, nor are they less work.
        if (least * (1 - MARGIN) <= load.min(axis=1)).all():
            break
    launch: FloatArray = np.where(works, costs.overhead + least, 0.0)
    return launch


def _load_and_last(
    parts: list[tuple[RankSpans, IntArray, int]],
    size: int,
    problem: Problem,
    costs: TileCosts,
    groups: int,
    over_pages: bool,
    least: FloatArray | None,
) -> tuple[FloatArray, FloatArray]:
    """``[kernels, forms, size]`` seconds of all tiles together, and until the last one ends, which is no less than the longest takes.

    Where other forms take ``least``, ``[kernels, size]``, what takes no less before that is looked at has none of its last tile.
    """
    load, longest = np.zeros((2, len(costs.kernels), len(costs.forms), size))
    for spans, begins, count in parts:
        # Of a window's keys none are read before those of the first query.
        seen = spans.k_len if problem.window is None else np.minimum(spans.k_len, spans.q_len + (problem.window - 1))
        reading = seen * costs.bytes_read(problem, groups) / costs.read
        computing, of_longest = _seconds_of_spans(spans, problem, costs, groups, over_pages)
        # In ps, whose sums are exact, and so the same on every rank.
        each = np.rint(np.maximum(computing, reading) * 1e12)
        sums, most = count * np.add.reduceat(each, begins, axis=-1), np.maximum.reduceat(of_longest, begins, axis=-1)
        ranks = spans.rank[begins]
        if len(parts) == 1 and count == 1:
            # To look at takes longer than all else.
            asked = None if least is None else np.maximum(sums * 1e-12, most) < least[:, None, ranks]
            most = np.maximum(most, until_last(spans, begins, problem, costs, groups, over_pages, asked))
            if len(begins) == size:
                return sums * 1e-12, most
        load[..., ranks] += sums
        longest[..., ranks] = np.maximum(longest[..., ranks], most)
    return load * 1e-12, longest


def _by_rank(spans: RankSpans, size: int) -> tuple[RankSpans, IntArray]:
    """Sorted, and where each rank's begin."""
    # numpy sorts numbers of 8 and of 16 bits in linear time, and a rank is one.
    order = spans.rank.astype(np.min_scalar_type(size - 1)).argsort(kind="stable")
    spans = RankSpans._make([column.take(order) for column in spans])
    return spans, np.append(0, np.flatnonzero(spans.rank[1:] != spans.rank[:-1]) + 1) if len(order) else order


def _seconds_of_spans(spans: RankSpans, problem: Problem, costs: TileCosts, groups: int, over_pages: bool) -> tuple[FloatArray, FloatArray]:
    """``[kernels, forms, spans]``: of each span's tiles, shared by all multiprocessors; and of the longest of them alone."""
    sums = TileSums.of(spans, costs.tokens, costs.block_n, problem.window)
    # In rows times key blocks.
    last = (sums.last_blocks + costs.tile) * costs.last[:, costs.numbers, sums.last_tokens]
    all_tiles = (sums.blocks + sums.full * costs.tile) * costs.full + last
    longest = np.maximum((sums.longest + costs.tile * (sums.full > 0)) * costs.full, last)
    sees = spans.k_len > 0
    if not sees.all():
        all_tiles, longest = all_tiles * sees, longest * sees
    shared, alone = costs.rates(problem, groups, over_pages)
    return all_tiles * shared, longest * alone
