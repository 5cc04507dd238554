"""How long attention launches take: by tiles, as :mod:`cpattn.kernels.tiles` cuts them, by the longest of them, and by the keys read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpattn.costs.hop_spans import RankSpans, spans_of
from cpattn.costs.tile_sums import TileSums
from cpattn.device_tables import IntArray
from cpattn.exchange.schedule import Hop
from cpattn.kernels.tile_shapes import TileShape, packs_for, padded_dims, tile_shapes
from cpattn.kernels.tiles import block_costs
from cpattn.machine import KernelCosts, Machine
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem

FloatArray = npt.NDArray[np.float64]


class TileForm(NamedTuple):
    """How queries are cut into tiles: ``pack`` query heads of a KV head share one."""

    shape: TileShape
    pack: int


class Launches:
    """The attention launches of a plan and problem on a machine, each kind worked out once for all backends, or for some of them."""

    def __init__(self, plan: Layout, problem: Problem, machine: Machine, kernels: Sequence[KernelCosts] | None = None) -> None:
        self._of = plan, problem, machine
        self._kernels = machine.kernels if kernels is None else tuple(kernels)
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
            made = self._made[key] = launch_seconds(*self._of, self._kernels, hop, groups, over_pages)
        seconds: FloatArray = made[self._kernels.index(kernel)]
        return seconds


def launch_seconds(
    plan: Layout, problem: Problem, machine: Machine, kernels: tuple[KernelCosts, ...], hop: Hop, groups: int, over_pages: bool
) -> FloatArray:
    """``[kernels, cp_size]`` seconds of a hop's launch by each kernel, as :meth:`Launches.seconds` has them.

    The multiprocessors share the tiles of a launch, and it is not over before its longest tile. A span takes the time of its tiles, or
    where its queries are few, of reading its keys.
    """
    forms, size = _forms(problem, machine), plan.cp_size
    load, longest = np.zeros((2, len(kernels), len(forms), size))
    works = np.zeros(size, dtype=bool)
    for spans, count in spans_of(plan, hop):
        if not len(spans.rank):
            continue
        order = spans.rank.argsort(kind="stable")
        spans = RankSpans._make(column[order] for column in spans)
        begins = np.append(0, np.flatnonzero(spans.rank[1:] != spans.rank[:-1]) + 1)
        ranks = spans.rank[begins]
        works[ranks] |= np.maximum.reduceat(spans.k_len, begins) > 0
        # Of a window's keys none are read before those of the first query.
        seen = spans.k_len if problem.window is None else np.minimum(spans.k_len, spans.q_len + (problem.window - 1))
        reading = seen * (problem.key_bytes // groups) / _column([kernel.read for kernel in kernels])
        computing, of_longest = _seconds_of_spans(spans, problem, machine, kernels, forms, groups, over_pages)
        # In ps, whose sums are exact, and so the same on every rank.
        each = np.rint(np.maximum(computing, reading) * 1e12)
        load[..., ranks] += count * np.add.reduceat(each, begins, axis=-1)
        longest[..., ranks] = np.maximum(longest[..., ranks], np.maximum.reduceat(of_longest, begins, axis=-1))
    splits = _column([kernel.splits for kernel in kernels])
    seconds = np.where(splits, load * 1e-12, np.maximum(load * 1e-12, longest)).min(axis=1)
    overhead = np.array([kernel.overhead for kernel in kernels])[:, None]
    launch: FloatArray = np.where(works, overhead + seconds, 0.0)
    return launch


def _seconds_of_spans(
    spans: RankSpans,
    problem: Problem,
    machine: Machine,
    kernels: tuple[KernelCosts, ...],
    forms: list[TileForm],
    groups: int,
    over_pages: bool,
) -> tuple[FloatArray, FloatArray]:
    """``[kernels, forms, spans]``: of each span's tiles, shared by all multiprocessors; and of the longest of them alone."""
    pack = np.array([[form.pack] for form in forms])
    rows = np.array([[form.shape.block_m] for form in forms]) // pack * pack
    sums = TileSums.of(spans, rows // pack, forms[0].shape.block_n, problem.window)
    # In rows times key blocks; a kernel without such small tiles computes as many rows as its smallest has.
    least, tile = _column([kernel.least_rows for kernel in kernels]), _column([kernel.tile for kernel in kernels])
    full_cost, last_cost = (_row_costs(np.maximum(rows_of_tile, least), forms) for rows_of_tile in (rows, sums.last_tokens * pack))
    last = (sums.last_blocks + tile) * last_cost
    costs = (sums.blocks + sums.full * tile) * full_cost + last
    longest = np.maximum((sums.longest + tile * (sums.full > 0)) * full_cost, last)
    seconds = _unit(problem, machine) / _column([kernel.flops for kernel in kernels])
    if over_pages:
        seconds = seconds * _column([kernel.paged if kernel.reads_pages(problem.page_size) else 1.0 for kernel in kernels])
    sees = spans.k_len > 0
    if not sees.all():
        costs, longest = costs * sees, longest * sees
    return costs * (seconds * (problem.q_heads // groups // pack / machine.multiprocessors)), longest * seconds


def _row_costs(rows: IntArray, forms: list[TileForm]) -> IntArray:
    """Of a key block, for tiles with so many rows ``[kernels, forms, n]``."""
    if forms[0].shape.specialized:
        return block_costs(rows, forms[0].shape)
    return np.concatenate([block_costs(rows[:, [number]], form.shape) for number, form in enumerate(forms)], axis=1)


def _column(values: Sequence[float]) -> npt.NDArray[Any]:
    """A value for each kernel, beside forms and spans."""
    return np.array(values)[:, None, None]


def _forms(problem: Problem, machine: Machine) -> list[TileForm]:
    """Those that kernels choose from."""
    shapes = _shapes(problem, machine)
    packs = packs_for(problem.q_heads // problem.kv_heads, shapes[0].block_m)
    return [TileForm(shape, pack) for pack in packs for shape in shapes if shape.block_m >= pack]


def _shapes(problem: Problem, machine: Machine) -> tuple[TileShape, ...]:
    specialized = machine.capability[0] == 9
    return tile_shapes(problem.head_dim, problem.v_head_dim, problem.dtype, machine.capability, specialized)


def _unit(problem: Problem, machine: Machine) -> float:
    """Times a kernel's seconds for an operation, what a multiprocessor takes for what :func:`cpattn.kernels.tiles.block_costs` counts:
    full tiles reach ``kernel.flops``."""
    shape, dims = _shapes(problem, machine)[0], padded_dims(problem.head_dim, problem.v_head_dim)
    flops = 2 * (dims.d + dims.dv) * shape.block_m * shape.block_n
    cost = int(block_costs(np.array([shape.block_m]), shape)[0])
    return flops * machine.multiprocessors / cost
