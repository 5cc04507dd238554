"""Hypothesis strategies for an engine's own tests: batches, owner rules, plans, and caches over them.

Sizes stay small, because what goes wrong in a layout goes wrong with few tokens: around multiples of the chunk count, with
empty and one-token requests, with many of them, and with one that is long beside others that are short.

Needs Hypothesis: ``pip install 'cpattn[testing]'``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

try:
    from hypothesis import strategies as st
except ImportError as missing:
    raise ImportError("cpattn.testing.strategies needs Hypothesis: pip install 'cpattn[testing]'") from missing

import numpy as np
import torch
from torch import Tensor

from cpattn.device_tables import IntArray
from cpattn.kv_cache import PagedKV
from cpattn.metadata.chunks import Chunks
from cpattn.metadata.plan import Plan, plan
from cpattn.metadata.striped import Striped

__all__ = ["Batch", "Caches", "batches", "caches", "chunks", "lengths", "owner_rules", "plans"]

Batch = list[tuple[int, int]]
"""(prefix_len, extend_len) of each request."""


def lengths(max_value: int) -> st.SearchStrategy[int]:
    """0 .. max_value, with more weight on 0, 1 and lengths around multiples of 16: those of 2 * cp_size for 1, 2, 4, 8 ranks."""
    edges = [length for base in range(0, max_value + 2, 16) for length in (base - 1, base, base + 1) if 0 <= length <= max_value]
    return st.sampled_from(edges) | st.integers(0, max_value)


def batches(max_requests: int = 10, max_prefix: int = 100, max_extend: int = 64) -> st.SearchStrategy[Batch]:
    """Lists of (prefix_len, extend_len): mixed batches; many requests shorter than the number of chunks; decode batches (every extend
    1); equal requests."""
    mixed = st.lists(st.tuples(lengths(max_prefix), lengths(max_extend)), max_size=max_requests)
    decode = st.lists(st.tuples(lengths(max_prefix), st.just(1)), max_size=max_requests)
    equal = st.builds(lambda request, n: [request] * n, st.tuples(lengths(max_prefix), lengths(max_extend)), st.integers(1, max_requests))
    short = st.lists(st.tuples(lengths(max_prefix), lengths(min(max_extend, 8))), max_size=2 * max_requests)
    return mixed | short | decode | equal


def owner_rules() -> st.SearchStrategy[str | Striped]:
    """What ``KVPool(owner=)`` takes: ``"replicated"``, ``"computed"``, or :class:`cpattn.Striped` with an interleave."""
    return st.sampled_from(["replicated", "computed"]) | st.builds(Striped, st.integers(1, 20))


@st.composite
def chunks(draw: st.DrawFn, batch: Batch, cp_size: int) -> Chunks:
    """A layout of a batch as an engine's own partition may make it: requests cut anywhere, chunks on any ranks."""
    table = []
    for request, (_, extend_len) in enumerate(batch):
        cuts = draw(st.sets(st.integers(1, extend_len - 1), max_size=4)) if extend_len > 1 else set()
        bounds = [0, *sorted(cuts), extend_len]
        for start, end in pairwise(bounds):
            if start < end:
                table.append((request, start, end - start, draw(st.integers(0, cp_size - 1))))
    return Chunks(*np.array(table, dtype=np.int64).reshape(-1, 4).T)


@st.composite
def plans(
    draw: st.DrawFn,
    of: st.SearchStrategy[Batch] | None = None,
    cp_sizes: st.SearchStrategy[int] | None = None,
    owners: st.SearchStrategy[str | Striped] | None = None,
) -> Plan:
    """Plans of any batch by any partition, one's own included, over any kind of cache.

    Args:
        of: the batches; :func:`batches` with few and short requests if left out.
        cp_sizes: sizes of groups; 1 to 5 if left out.
        owners: :func:`owner_rules` if left out.
    """
    batch = draw(batches(max_requests=4, max_prefix=40, max_extend=40) if of is None else of)
    cp_size = draw(st.integers(1, 5) if cp_sizes is None else cp_sizes)
    owner = draw(owner_rules() if owners is None else owners)
    options: dict[str, Any] = {"pad_to": draw(st.sampled_from([1, 2, 8]))}
    if isinstance(owner, Striped):
        options["owner"] = owner
    elif owner == "computed":
        ranks = st.integers(0, cp_size - 1)
        options["prefix_ranks"] = [draw(st.lists(ranks, min_size=prefix, max_size=prefix)) for prefix, _ in batch]
    name = draw(st.sampled_from(["zigzag", "contiguous", "whole", "uncut", "own"]))
    if name == "own":
        own = draw(chunks(batch, cp_size))
        return plan(batch, cp_size, partition=lambda *_: own, **options)
    return plan(batch, cp_size, partition=name, **options)


@dataclass(frozen=True, eq=False)
class Caches:
    """Pages for the cache of every rank of a plan, in random order, with some to spare.

    Attributes:
        plan: whose.
        page_size, num_pages: of each rank.
        tables: for each rank int32 ``[num_requests, max_pages]``, with wild numbers beyond a request's pages.
    """

    plan: Plan
    page_size: int
    num_pages: int
    tables: list[Tensor]

    def filled(self, rank: int, prefix_k: Tensor, prefix_v: Tensor) -> PagedKV:
        """A rank's pages with its part of the prefixes in them, and NaN elsewhere: who reads what is not there gets NaN.

        Args:
            prefix_k: ``[sum of prefix_len, Hkv, D]``, floating; prefix_v ``[sum of prefix_len, Hkv, Dv]``: all of the batch's.
        """
        k, v = (x.new_full((self.num_pages, self.page_size, *x.shape[1:]), torch.nan) for x in (prefix_k, prefix_v))
        first = 0
        for request, (prefix_len, _) in enumerate(self.plan.batch):
            held = first + torch.from_numpy(np.flatnonzero(_holders(self.plan, request)[:, rank]))
            number = torch.arange(len(held))
            table = self.tables[rank].to(prefix_k.device)
            page = table[request, number // self.page_size].long()
            for pages, prefix in ((k, prefix_k), (v, prefix_v)):
                pages[page, number % self.page_size] = prefix[held]
            first += prefix_len
        return PagedKV(k, v, self.tables[rank].to(prefix_k.device))


def _holders(of: Plan, request: int) -> IntArray:
    """bool ``[prefix_len, cp_size]``: which ranks' caches hold each prefix token."""
    positions = np.arange(of.batch[request].prefix_len)
    if of.owner is not None:
        ranks = of.owner.ranks(positions, of.cp_size)
    elif of.prefix_ranks is not None:
        ranks = np.asarray(of.prefix_ranks.ranks[request], dtype=np.int64)
    elif of.prefix_shards is not None:
        ranks = np.repeat(np.arange(of.cp_size), of.prefix_shards[request])
    else:
        return np.ones((len(positions), of.cp_size), dtype=np.int64)
    return np.asarray(ranks[:, None] == np.arange(of.cp_size), dtype=np.int64)


@st.composite
def caches(draw: st.DrawFn, of: Plan, page_sizes: st.SearchStrategy[int] | None = None) -> Caches:
    """Pages for a plan's prefixes and new tokens on every rank; page sizes 1 to 16 if left out."""
    page_size = draw(st.sampled_from([1, 2, 3, 4, 16]) if page_sizes is None else page_sizes)
    counts = -(-np.asarray(of.held_lens) // page_size)
    num_pages = int(counts.sum(axis=0).max(initial=0)) + 2
    width = max(int(counts.max(initial=0)), 1)
    tables = []
    for rank in range(of.cp_size):
        order = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).permutation(num_pages)
        table = np.full((len(of.batch), width), 2**30, dtype=np.int32)
        first = 0
        for line, count in zip(table, counts[:, rank].tolist(), strict=True):
            line[:count] = order[first : first + count]
            first += count
        tables.append(torch.from_numpy(table))
    return Caches(of, page_size, num_pages, tables)
