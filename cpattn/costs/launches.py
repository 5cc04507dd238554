"""How long attention launches take: by tiles, as :mod:`cpattn.kernels.tiles` cuts them, by the longest of them, and by the keys read."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpattn.costs.hop_spans import spans_of
from cpattn.device_tables import IntArray
from cpattn.exchange.schedule import Hop
from cpattn.kernels.tile_shapes import TileShape, packs_for, padded_dims, tile_shapes
from cpattn.kernels.tiles import TilesOfSpans, block_costs
from cpattn.machine import KernelCosts, Machine
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem
from cpattn.spans import HostSpans

FloatArray = npt.NDArray[np.float64]


class TileForm(NamedTuple):
    """How queries are cut into tiles: ``pack`` query heads of a KV head share one."""

    shape: TileShape
    pack: int


class Launches:
    """The attention launches of a plan and problem on a machine, each kind worked out once for all backends."""

    def __init__(self, plan: Layout, problem: Problem, machine: Machine) -> None:
        self._of = plan, problem, machine
        self._made: dict[tuple[Any, ...], FloatArray] = {}
        self._others: dict[tuple[Layout, Problem], Launches] = {}

    def of(self, plan: Layout, problem: Problem) -> Launches:
        """Those of another plan and problem on the machine, such as a group of ranks has; made once."""
        key = plan, problem
        if key not in self._others:
            self._others[key] = Launches(plan, problem, self._of[2])
        return self._others[key]

    def seconds(self, hop: Hop, kernel: KernelCosts, groups: int = 1, over_pages: bool = False) -> FloatArray:
        """``[cp_size]`` of a hop's launch on each rank, over one of so many groups of heads; 0 where there is nothing to see.
        ``over_pages`` if its keys lie in pages, for kernels that read them as they are."""
        key = hop.queries, hop.keys, groups, over_pages
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = launch_seconds(*self._of, hop, groups, over_pages)
        seconds: FloatArray = made[self._of[2].kernels.index(kernel)]
        return seconds


def launch_seconds(plan: Layout, problem: Problem, machine: Machine, hop: Hop, groups: int, over_pages: bool) -> FloatArray:
    """``[kernels, cp_size]`` seconds of a hop's launch by each kernel of the machine, as :meth:`Launches.seconds` has them.

    The multiprocessors share the tiles of a launch, and it is not over before its longest tile. A span takes the time of its tiles, or
    where its queries are few, of reading its keys.
    """
    kernels, forms = machine.kernels, _forms(problem, machine)
    heads, size = problem.q_heads // groups, plan.cp_size
    load, longest = np.zeros((2, len(kernels), len(forms), size))
    works = np.zeros(size, dtype=bool)
    for spans, count in spans_of(plan, hop):
        zeros, num_spans = np.zeros_like(spans.q_len), len(spans.rank)
        host = HostSpans(zeros, spans.q_len, zeros, spans.k_len, spans.diagonal, zeros)
        # Of a window's keys none are read before those of the first query.
        seen = spans.k_len if problem.window is None else np.minimum(spans.k_len, spans.q_len + (problem.window - 1))
        key_bytes = seen * (problem.key_bytes // groups)
        works[spans.rank[spans.k_len > 0]] = True
        for form, (shape, pack) in enumerate(forms):
            tiles = TilesOfSpans.of(host, shape.block_m // pack, shape.block_n, problem.window)
            rank = spans.rank[tiles.span]
            for number, kernel in enumerate(kernels):
                costs = _tile_costs(tiles, shape, pack, kernel)
                # Sums of integers are exact, so the same on every rank.
                shares = np.bincount(tiles.span, costs, minlength=num_spans) * (heads // pack) / machine.multiprocessors
                unit = _unit(problem, machine, kernel) * (kernel.paged if over_pages and kernel.reads_pages(problem.page_size) else 1.0)
                load[number, form] += count * np.bincount(spans.rank, np.maximum(shares * unit, key_bytes / kernel.read), minlength=size)
                np.maximum.at(longest[number, form], rank, costs * unit)
    splits = np.array([kernel.splits for kernel in kernels])[:, None, None]
    seconds = np.where(splits, load, np.maximum(load, longest)).min(axis=1)
    overhead = np.array([kernel.overhead for kernel in kernels])[:, None]
    launch: FloatArray = np.where(works, overhead + seconds, 0.0)
    return launch


def _tile_costs(tiles: TilesOfSpans, shape: TileShape, pack: int, kernel: KernelCosts) -> IntArray:
    """In rows times key blocks; a kernel without such small tiles computes as many rows as its smallest has."""
    rows = np.maximum(tiles.tokens * pack, kernel.least_rows)
    costs: IntArray = np.where(tiles.blocks > 0, (tiles.blocks + kernel.tile) * block_costs(rows, shape), 0)
    return costs


def _forms(problem: Problem, machine: Machine) -> list[TileForm]:
    """Those that kernels choose from."""
    shapes = _shapes(problem, machine)
    packs = packs_for(problem.q_heads // problem.kv_heads, shapes[0].block_m)
    return [TileForm(shape, pack) for pack in packs for shape in shapes if shape.block_m >= pack]


def _shapes(problem: Problem, machine: Machine) -> tuple[TileShape, ...]:
    specialized = machine.capability[0] == 9
    return tile_shapes(problem.head_dim, problem.v_head_dim, problem.dtype, machine.capability, specialized)


def _unit(problem: Problem, machine: Machine, kernel: KernelCosts) -> float:
    """Seconds that a multiprocessor takes for what :func:`cpattn.kernels.tiles.block_costs` counts: full tiles reach ``kernel.flops``."""
    shape, dims = _shapes(problem, machine)[0], padded_dims(problem.head_dim, problem.v_head_dim)
    flops = 2 * (dims.d + dims.dv) * shape.block_m * shape.block_n
    cost = int(block_costs(np.array([shape.block_m]), shape)[0])
    return flops * machine.multiprocessors / (kernel.flops * cost)
