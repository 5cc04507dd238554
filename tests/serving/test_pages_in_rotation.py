"""Whole pages on ranks in turn, each request's first on a rank of its own, as SGLang's sharded prefill has them.

Which rank holds a token depends on the request, and so no rule of positions says it. A partition of one's own does: each rank computes the
tokens of its pages, and keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cpattn
from cpattn.testing import oracle_attention, run_loopback

SIZE, PAGE = 3, 4
# Of each step the cached and the new tokens of both requests: prompts, a chunk that ends within a page, decodes.
STEPS = [[(0, 21), (0, 6)], [(21, 9), (6, 1)], [(30, 1), (7, 14)], [(31, 1), (21, 1)]]
# Which rank has a request's first page.
FIRST = [2, 0]


@dataclass(frozen=True)
class ByPage:
    """A partition: the tokens of a page are the rank's that holds it."""

    first: tuple[int, ...]

    def __call__(self, batch: Any, cp_size: int) -> cpattn.Chunks:
        table = []
        for request, (prefix, extend) in enumerate(batch.tolist()):
            begins = [prefix, *range(-(-(prefix + 1) // PAGE) * PAGE, prefix + extend, PAGE)]
            for begin, end in zip(begins, [*begins[1:], prefix + extend], strict=True):
                if end > begin:
                    table.append((request, begin - prefix, end - begin, (self.first[request] + begin // PAGE) % cp_size))
        return cpattn.Chunks(*np.array(table, dtype=np.int64).reshape(-1, 4).T)


@pytest.mark.parametrize("window", [None, 7])
def test_a_partition_by_pages_writes_where_such_an_engine_has_them(window: int | None) -> None:
    """Logical page l of the pool is page ``l // SIZE`` of rank ``l % SIZE``; nothing else is written."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, 8) for heads in (4, 2, 2))
    # The classes of the pool that a request draws its pages from follow each other.
    free = {rank: iter(np.random.default_rng(rank).permutation(8).tolist()) for rank in range(SIZE)}
    logical = [[next(free[(first + page) % SIZE]) * SIZE + (first + page) % SIZE for page in range(9)] for first in FIRST]

    def program(group: cpattn.Transport) -> list[Tensor]:
        pages = torch.full((2, 8, PAGE, 2, 8), torch.nan)
        mine = [[page // SIZE for page in line if page % SIZE == group.rank] for line in logical]
        cache = cpattn.PagedKV(pages[0], pages[1], torch.tensor(mine))
        outs = []
        for batch in STEPS:
            ranks = [
                [(first + position // PAGE) % SIZE for position in range(prefix)] for first, (prefix, _) in zip(FIRST, batch, strict=True)
            ]
            plan = cpattn.plan(batch, SIZE, partition=ByPage(tuple(FIRST)), prefix_ranks=ranks)
            meta = plan.metadata(group.rank)
            new = [torch.cat([x[i, prefix : prefix + extend] for i, (prefix, extend) in enumerate(batch)]) for x in (q, k, v)]
            my_q, my_k, my_v = (cpattn.shard(x, meta) for x in new)
            out = cpattn.cp_attention(my_q, my_k, my_v, meta, group=group, kv_cache=cache, window=window, check=True)
            outs.append(cpattn.unshard(out, meta, group=group))
        right = torch.full_like(pages, torch.nan)
        for i, line in enumerate(logical):
            for position in range(sum(STEPS[-1][i])):
                page = line[position // PAGE]
                if page % SIZE == group.rank:
                    right[:, page // SIZE, position % PAGE] = torch.stack([k[i, position], v[i, position]])
        assert torch.equal(pages.nan_to_num(9), right.nan_to_num(9))
        return outs

    totals = [prefix + extend for prefix, extend in STEPS[-1]]
    whole = [oracle_attention(q[i, :n], k[i, :n], v[i, :n], [(0, n)], window=window)[0] for i, n in enumerate(totals)]
    for outs in run_loopback(program, SIZE):
        for batch, out in zip(STEPS, outs, strict=True):
            expected = torch.cat([whole[i][prefix : prefix + extend] for i, (prefix, extend) in enumerate(batch)])
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
