"""Two ways of keeping the books of a cache's pages: a KVPool's, and those of an engine that has its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from references.cache_model import CacheForm
from torch import Tensor

import cpattn


class Books(Protocol):
    """Of one rank; every rank's do the same.

    Attributes:
        pages: K, V if it is not in K, and the scales of tokens if they have some: ``[num_pages, page_size, Hkv, ...]`` each.
    """

    pages: list[Tensor]

    def admit(self, name: str) -> None: ...
    def fork(self, parent: str, child: str, length: int) -> None: ...
    def reject(self, name: str, length: int) -> None:
        """Only the first ``length`` tokens count."""

    def release(self, name: str) -> None: ...
    def undo(self, plan: cpattn.Plan, extends: Mapping[str, int]) -> None:
        """Takes the last step back, in which each request had so many new tokens."""

    def plan(self, extends: Sequence[tuple[str, int]], **options: Any) -> cpattn.Plan:
        """Raises PoolFullError, and changes nothing, where there are too few pages."""

    def cache(self, names: Sequence[str], shape: tuple[int, int] | None) -> cpattn.PagedKV:
        """For requests in the order of a plan; shape of the table, where it is that of a bucket."""

    def line(self, name: str) -> list[int]:
        """The request's pages on this rank."""


class PoolBooks:
    """Those of a KVPool. What is rejected is dropped."""

    def __init__(self, form: CacheForm, rank: int, of_heads: tuple[Tensor, Tensor] | None) -> None:
        v_head_dim = 0 if form.v_in_k else form.v_head_dim
        sizes = form.num_pages, form.page_size, 1, form.kv_heads, form.head_dim, v_head_dim
        self.pool = cpattn.KVPool(
            *sizes, dtype=form.stored, device=form.device, scales=form.scales, owner=form.owner, cp_size=form.cp_size, cp_rank=rank
        )  # fmt: skip
        pool, of_tokens = self.pool, form.scales == "token"
        if of_heads is not None:
            for mine, scale in zip((pool.k_scale, pool.v_scale), of_heads, strict=True):
                if mine is not None:
                    mine[0] = scale
        both = [pool.k_pages, pool.v_pages, *((pool.k_scale, pool.v_scale) if of_tokens else ())]
        self.pages = [x[0] for x in both if x is not None]
        _fill(self.pages)
        self.admit, self.fork, self.release, self.reject = pool.admit, pool.fork, pool.release, pool.truncate

    def plan(self, extends: Sequence[tuple[str, int]], **options: Any) -> cpattn.Plan:
        return self.pool.plan(extends, **options)

    def undo(self, plan: cpattn.Plan, extends: Mapping[str, int]) -> None:
        self.pool.undo(plan)

    def cache(self, names: Sequence[str], shape: tuple[int, int] | None) -> cpattn.PagedKV:
        return self.pool.layer(0, self.pool.page_table(names, shape))

    def line(self, name: str) -> list[int]:
        return self.pool.page_table([name])[0].tolist()


class EngineBooks:
    """Those of an engine: pages of the same numbers on every rank, as vLLM has them, or, where ranks keep what they compute, each
    rank's own. Drafts that are rejected keep their slots until others come there. Pages are shared until someone writes to them.

    Attributes:
        lines: pages of each request, for each table that there is; ranks: who holds each token (0, where all do).
    """

    def __init__(self, form: CacheForm, rank: int, of_heads: tuple[Tensor, Tensor] | None, known: bool) -> None:
        """``known``: whether cpattn is told which rank has which token, or only how many."""
        self.form, self.rank, self.known = form, rank, known
        shape = form.num_pages, form.page_size, form.kv_heads

        def zeros(*more: int) -> Tensor:
            return torch.zeros(*shape, *more, device=form.device)

        k, v = zeros(form.head_dim).to(form.stored), None if form.v_in_k else zeros(form.v_head_dim).to(form.stored)
        scales: list[Tensor | None] = [None, None]
        if form.scales == "token":
            scales = [zeros(), None if v is None else zeros()]
        elif of_heads is not None:
            scales = [of_heads[0], None if v is None else of_heads[1]]
        self._parts = k, v, scales
        self.pages = [x for x in (k, v, *(scales if form.scales == "token" else ())) if x is not None]
        _fill(self.pages)
        ranks = range(form.cp_size if form.sharded else 1)
        # The ranks that each table is for.
        self._tables = [[rank] for rank in ranks] if form.owner == "computed" else [list(ranks)]
        self._mine = rank if form.owner == "computed" else 0
        self._free = [np.random.default_rng(n).permutation(form.num_pages).tolist() for n in range(len(self._tables))]
        self._uses: list[Counter[int]] = [Counter() for _ in self._tables]
        self.lines: dict[str, list[list[int]]] = {}
        self.ranks: dict[str, list[int]] = {}

    def admit(self, name: str) -> None:
        self.lines[name], self.ranks[name] = [[] for _ in self._tables], []

    def fork(self, parent: str, child: str, length: int) -> None:
        self.ranks[child] = self.ranks[parent][:length]
        held = self._held(child)
        counts = [-(-int(held[ranks].max()) // self.form.page_size) for ranks in self._tables]
        self.lines[child] = [line[:count] for line, count in zip(self.lines[parent], counts, strict=True)]
        for uses, line in zip(self._uses, self.lines[child], strict=True):
            uses.update(line)

    def reject(self, name: str, length: int) -> None:
        del self.ranks[name][length:]

    def undo(self, plan: cpattn.Plan, extends: Mapping[str, int]) -> None:
        for name, extend in extends.items():
            self.reject(name, len(self.ranks[name]) - extend)

    def release(self, name: str) -> None:
        for table, line in enumerate(self.lines.pop(name)):
            self._give_back(table, line)
        del self.ranks[name]

    def plan(self, extends: Sequence[tuple[str, int]], **options: Any) -> cpattn.Plan:
        form, before = self.form, {name: self._held(name) for name, _ in extends}
        if isinstance(form.owner, cpattn.Striped):
            options["owner"] = form.owner
        elif form.sharded and self.known:
            options["prefix_ranks"] = [self.ranks[name] for name, _ in extends]
        elif form.sharded:
            options["prefix_shards"] = [held.tolist() for held in before.values()]
        plan = cpattn.plan([(len(self.ranks[name]), extend) for name, extend in extends], form.cp_size, **options)
        after = plan.held_lens if form.sharded else plan.total_lens[:, None]
        self._take(before, dict(zip(before, after, strict=True)))
        for request, (name, extend) in enumerate(extends):
            if isinstance(form.owner, cpattn.Striped):
                first = len(self.ranks[name])
                self.ranks[name] += form.owner.ranks(first + np.arange(extend), form.cp_size).tolist()
            elif form.sharded:
                self.ranks[name] += [chunk.rank for chunk in plan.chunks if chunk.request == request for _ in range(chunk.length)]
            else:
                self.ranks[name] += [0] * extend
        return plan

    def cache(self, names: Sequence[str], shape: tuple[int, int] | None) -> cpattn.PagedKV:
        lines = [self.lines[name] for name in names]
        width = max((len(line) for tables in lines for line in tables), default=0)
        # What lies beyond a request's pages is not looked at.
        table = torch.full(shape or (len(names), max(1, width)), -1, dtype=torch.int64)
        for entries, tables in zip(table, lines, strict=False):
            entries[: len(tables[self._mine])] = torch.tensor(tables[self._mine])
        k, v, (k_scale, v_scale) = self._parts
        return cpattn.PagedKV(k, v, table.to(self.form.device), k_scale=k_scale, v_scale=v_scale)

    def line(self, name: str) -> list[int]:
        return self.lines[name][self._mine]

    def _held(self, name: str) -> Any:
        return np.bincount(self.ranks[name], minlength=self.form.cp_size if self.form.sharded else 1)

    def _take(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Pages for what a step writes; where others use such a page, too, another one with a copy."""
        size, taken = self.form.page_size, []
        for table, ranks in enumerate(self._tables):
            uses = self._uses[table].copy()
            for name, line in ((name, self.lines[name][table]) for name in before):
                spans = [(before[name][rank], after[name][rank]) for rank in ranks]
                for index in sorted({index for begin, end in spans if end > begin for index in range(begin // size, -(-end // size))}):
                    if index >= len(line):
                        taken.append((table, name, index))
                    elif uses[line[index]] > 1:
                        uses[line[index]] -= 1
                        taken.append((table, name, index))
            if sum(one[0] == table for one in taken) > len(self._free[table]):
                raise cpattn.PoolFullError("no page is free")
        for table, name, index in taken:
            page, line = self._free[table].pop(), self.lines[name][table]
            self._uses[table][page] = 1
            if index < len(line):
                if table == self._mine:
                    kept = int(before[name][self.rank if self.form.sharded else 0]) - index * size
                    for x in self.pages:
                        x[page, : max(0, kept)] = x[line[index], : max(0, kept)]
                self._give_back(table, [line[index]])
                line[index] = page
            else:
                assert index == len(line)
                line.append(page)

    def _give_back(self, table: int, pages: Sequence[int]) -> None:
        for page in pages:
            self._uses[table][page] -= 1
            if not self._uses[table][page]:
                self._free[table].append(page)


def _fill(pages: Sequence[Tensor]) -> None:
    """With NaN, which whoever reads a slot that nobody has written would show."""
    for x in pages:
        x.copy_(torch.full_like(x, torch.nan, dtype=torch.float32))
