"""What tiles of attention cost on a machine, by the forms in which kernels cut queries into them; the same for every batch."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpattn.device_tables import IntArray
from cpattn.kernels.tile_shapes import TileShape, has_specialized, packs_for, padded_dims, summed_dims, tile_shapes
from cpattn.kernels.tiles import block_costs
from cpattn.machine import KernelCosts, Machine
from cpattn.memo import Memo
from cpattn.problem import Problem

FloatArray = npt.NDArray[np.float64]
# Of groups of heads and sizes of pages, of which a model has few.
_MOST_REMEMBERED = 16
# By how much the kernel for Hopper is faster over stored keys than the plain one, which those get that it cannot take: prefills with scales
# of heads took 1.57 times as long, and with those of tokens 1.59 and 1.62 (fp8_pages_gpu.csv).
_AHEAD_OF_PLAIN = 1.58


class TileForm(NamedTuple):
    """How queries are cut into tiles: ``pack`` query heads of a KV head share one."""

    shape: TileShape
    pack: int

    @property
    def tokens(self) -> int:
        """Of a full tile."""
        return self.shape.block_m // self.pack


class TileCosts:
    """What tiles of a kind of call cost on a machine, whatever the batch. Arrays are ``[kernels or 1, forms or 1, 1]``.

    Attributes:
        forms: that kernels choose from; pack: of each.
        block_n: keys of a key block.
        tokens: of a full tile of each form, ``[forms, 1]``; are_even: whether such tiles and key blocks divide each other.
        unit: times a kernel's seconds for an operation, what a multiprocessor takes for what
            :func:`cpattn.kernels.tiles.block_costs` counts: full tiles reach ``kernel.flops``.
        full: of a key block of a full tile; a kernel without such small tiles computes as many rows as its smallest has.
        last: of one of a tile of so many tokens, ``[kernels, forms, tokens + 1]``.
        tile, flops, read, overhead, splits: of the kernels.
        numbers: of the forms, ``[forms, 1]``.
        leading: the number of the form whose tiles have the most rows and the fewest tokens, and so waste least. Only where there are
            few tiles may others be faster.
        leads: whether no other form ever does with less work. parts: the same of that form, and of all others, if so.
        of_leading: the same of that form alone.
        full_cost, last_costs: ``full`` and ``last`` of that form; full_of_row: what a row of a full tile costs at least.
    """

    def __init__(self, problem: Problem, machine: Machine, kernels: Sequence[KernelCosts]) -> None:
        self.kernels, self.multiprocessors, self._capability = tuple(kernels), machine.multiprocessors, machine.capability
        specialized = machine.capability[0] == 9
        shapes = tile_shapes(problem.head_dim, problem.v_head_dim, problem.dtype, machine.capability, specialized)
        packs = packs_for(problem.q_heads // problem.kv_heads, shapes[0].block_m)
        self.forms = [TileForm(shape, pack) for pack in packs for shape in shapes if shape.block_m >= pack]
        self.block_n = shapes[0].block_n
        self.tokens = np.array([[form.tokens] for form in self.forms])
        self.are_even = all(self.block_n % form.tokens == 0 or form.tokens % self.block_n == 0 for form in self.forms)
        dims = padded_dims(problem.head_dim, problem.v_head_dim)
        summed = summed_dims(problem.head_dim, problem.v_head_dim, shapes[0].specialized)
        operations = 2 * (summed + dims.dv) * shapes[0].block_m * self.block_n
        full_cost = int(block_costs(np.array([shapes[0].block_m]), shapes[0])[0])
        self.unit, self.full_of_row = operations * self.multiprocessors / full_cost, full_cost / shapes[0].block_m
        self.pack = np.array([[form.pack] for form in self.forms])
        self.numbers: IntArray = np.arange(len(self.forms))[:, None]
        self._rates: Memo[tuple[Any, ...], tuple[FloatArray, FloatArray]] = Memo(_MOST_REMEMBERED)
        last = np.arange(int(self.tokens.max()) + 1) * self.pack
        least = _column([kernel.least_rows for kernel in kernels])
        self.full, self.last = (_row_costs(np.maximum(rows, least), self.forms) for rows in (self.tokens * self.pack, last))
        self.tile = _column([kernel.tile for kernel in kernels])
        self.flops, self.read = _column([kernel.flops for kernel in kernels]), _column([kernel.read for kernel in kernels])
        self.overhead, self.splits = _column([kernel.overhead for kernel in kernels])[:, 0], _column([kernel.splits for kernel in kernels])
        shared = shapes[0].specialized and self.are_even and shapes[0].block_m % packs[-1] == 0
        self.leading, self.leads = self.forms.index(TileForm(shapes[0], packs[-1])), shared
        self.full_cost, self.last_costs = self.full[:, self.leading, 0].tolist(), self.last[:, self.leading]
        others = [number for number in range(len(self.forms)) if number != self.leading]
        self.of_leading = self._part([self.leading])
        self.parts = [self.of_leading, self._part(others)] if shared and others else [self]

    def _part(self, numbers: list[int]) -> TileCosts:
        """Of forms of those numbers."""
        part = copy(self)
        part.forms = [self.forms[number] for number in numbers]
        part.tokens, part.pack = self.tokens[numbers], self.pack[numbers]
        part.full, part.last = self.full[:, numbers], self.last[:, numbers]
        part.numbers, part._rates = np.arange(len(numbers))[:, None], Memo(_MOST_REMEMBERED)
        return part

    @classmethod
    def of(cls, problem: Problem, machine: Machine, kernels: Sequence[KernelCosts]) -> TileCosts:
        """Worked out once."""
        sizes = problem.q_heads, problem.kv_heads, problem.head_dim, problem.v_head_dim, problem.dtype
        key = "tile costs", sizes, tuple(map(id, kernels))
        found: TileCosts | None = machine.memo.get(key)
        # Of kernels that are gone others may have the number.
        if found is None or not all(map(is_, found.kernels, kernels)):
            found = machine.memo.keep(key, cls(problem, machine, kernels))
        return found

    def rates(self, problem: Problem, groups: int, over_pages: bool) -> tuple[FloatArray, FloatArray]:
        """Seconds of what is counted: of all tiles of all heads, which all multiprocessors share; and of one tile."""
        key = groups, problem.page_size if over_pages else None, problem.stored_dtype, problem.scales
        found = self._rates.get(key)
        if found is None:
            seconds = self.unit / self.flops * self._of_stored(problem)
            if over_pages:
                seconds = seconds * _column([kernel.paged if kernel.reads_pages(problem.page_size) else 1.0 for kernel in self.kernels])
            shared = seconds * (problem.q_heads // groups // self.pack / self.multiprocessors)
            found = self._rates.keep(key, (shared, seconds))
        return found

    def bytes_read(self, problem: Problem, groups: int) -> IntArray:
        """Of the K and V of one token, in one of so many groups of heads: as they are stored, or of a copy."""
        stored, copied = problem.key_bytes // groups, problem.copied_key_bytes // groups
        return _column([copied if kernel.stored is None else stored for kernel in self.kernels])

    def _of_stored(self, problem: Problem) -> FloatArray | float:
        """By how much kernels are slower over keys that are stored in another dtype than q's."""
        if problem.stored_dtype == problem.dtype:
            return 1.0
        sizes = problem.head_dim, problem.v_head_dim, problem.dtype, self._capability
        # Where no kernel is for keys in q's dtype either, that is counted already.
        is_plain = has_specialized(*sizes, 0) and not has_specialized(*sizes, 0, problem.stored_dtype)
        ahead = _AHEAD_OF_PLAIN if is_plain else 1.0
        slower = [kernel.slower_over(problem.stored_dtype, problem.scales) for kernel in self.kernels]
        return _column([one if kernel.stored is None else one * ahead for kernel, one in zip(self.kernels, slower, strict=True)])


def _row_costs(rows: IntArray, forms: list[TileForm]) -> IntArray:
    """Of a key block, for tiles with so many rows ``[kernels, forms, n]``."""
    if forms[0].shape.specialized:
        return block_costs(rows, forms[0].shape)
    return np.concatenate([block_costs(rows[:, [number]], form.shape) for number, form in enumerate(forms)], axis=1)


def _column(values: Sequence[float]) -> npt.NDArray[Any]:
    """A value for each kernel, beside forms and spans."""
    return np.array(values)[:, None, None]
