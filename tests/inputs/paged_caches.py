"""A rank's pages for an AttentionCase: the prefix lies in them in random order, and all else is NaN."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import cpattn

GARBAGE = [-1, 2**30, -(2**31)]


def random_shards(batch: list[tuple[int, int]], cp_size: int, seed: int) -> list[list[int]]:
    """How many prefix tokens of each request each rank holds: spread at random, very unevenly for some."""
    rng = np.random.default_rng(seed)
    return [rng.multinomial(prefix, rng.dirichlet(np.full(cp_size, rng.choice([0.2, 5.0])))).tolist() for prefix, _ in batch]


def random_ranks(batch: list[tuple[int, int]], cp_size: int, seed: int) -> list[list[int]]:
    """Which rank holds each of them: in runs, as a prefill leaves them, or one by one."""
    rng = np.random.default_rng(seed)
    ranks = []
    for shards in random_shards(batch, cp_size, seed):
        runs = [[rank] * length for rank, count in enumerate(shards) for length in rng.multinomial(count, [0.2, 0.3, 0.5]) if length]
        in_runs = [rank for run in rng.permutation(len(runs)) for rank in runs[run]]
        ranks.append(in_runs if rng.random() < 0.5 else rng.permutation(in_runs).astype(int).tolist())
    return ranks


@dataclass
class RankPages:
    """The pages of one rank, and what must be in them before and after a call.

    Args:
        prefix_k, prefix_v: ``[sum of prefix_len, Hkv, ...]`` of the whole batch; v None where it is in K.
        new_k, new_v: the new tokens of the whole batch, in order.
    """

    plan: cpattn.Plan
    rank: int
    prefix_k: Tensor
    prefix_v: Tensor | None
    new_k: Tensor
    new_v: Tensor | None
    page_size: int
    seed: int
    table_dtype: torch.dtype = torch.int32
    max_requests: int | None = None

    def __post_init__(self) -> None:
        # Which rank holds which prefix token is drawn alike on every rank; within a rank tokens keep their order.
        shared = np.random.default_rng(self.seed)
        own = np.random.default_rng([self.seed, self.rank])
        plan, device = self.plan, self.prefix_k.device
        token_owner = np.empty(plan.num_tokens, dtype=np.int64)
        token_start = np.cumsum([extend for _, extend in plan.batch]) - [extend for _, extend in plan.batch]
        for request, start, length, rank in plan.chunks:
            token_owner[token_start[request] + start :][:length] = rank
        lines = []
        before: list[tuple[int, int, int]] = []  # (request, number on the rank, prefix row)
        after: list[tuple[int, int, int]] = []  # (request, number on the rank, new row)
        prefix_start = 0
        # The tokens on the rank that holds the most: the table must be wide enough for that.
        held = plan.total_lens.copy()
        for request, (prefix_len, extend_len) in enumerate(plan.batch):
            prefix_rows, new_rows = np.arange(prefix_len) + prefix_start, np.arange(extend_len) + token_start[request]
            if plan.owner is not None:
                position = np.arange(prefix_len + extend_len)
                owners = (position // plan.owner.interleave) % plan.cp_size
                is_own = owners == self.rank
                prefix_rows, new_rows = prefix_rows[is_own[:prefix_len]], new_rows[is_own[prefix_len:]]
                held[request] = np.bincount(owners, minlength=plan.cp_size).max()
            elif plan.prefix_shards is not None:
                owners = shared.permutation(np.repeat(np.arange(plan.cp_size), plan.prefix_shards[request]))
                if plan.prefix_ranks is not None:
                    owners = plan.prefix_ranks.ranks[request]
                prefix_rows, new_rows = prefix_rows[owners == self.rank], new_rows[token_owner[new_rows] == self.rank]
                held[request] = (plan.shard_lens[request] + plan.rank_extends[request]).max()
            before += [(request, n, row) for n, row in enumerate(prefix_rows.tolist())]
            after += [(request, len(prefix_rows) + n, row) for n, row in enumerate(new_rows.tolist())]
            lines.append(-(-(len(prefix_rows) + len(new_rows)) // self.page_size))
            prefix_start += prefix_len
        width = -(-int(held.max(initial=0)) // self.page_size) + 1
        pages = own.permutation(sum(lines) + 3)
        table = own.choice(GARBAGE, (self.max_requests or len(plan.batch), width))
        taken = 0
        for request, count in enumerate(lines):
            table[request, :count] = pages[taken : taken + count]
            taken += count
        slots = (len(pages), self.page_size)
        self.table = table
        self.expected_k = torch.full((*slots, *self.new_k.shape[1:]), torch.nan, dtype=self.new_k.dtype, device=device)
        self.expected_v = None
        if self.new_v is not None:
            self.expected_v = torch.full((*slots, *self.new_v.shape[1:]), torch.nan, dtype=self.new_v.dtype, device=device)
        self._put(before, self.prefix_k, self.prefix_v)
        self.cache = cpattn.PagedKV(
            self.expected_k.clone(),
            None if self.expected_v is None else self.expected_v.clone(),
            torch.tensor(table.tolist(), dtype=self.table_dtype, device=device).view(table.shape),
        )
        self._put(after, self.new_k, self.new_v)

    def _put(self, places: list[tuple[int, int, int]], k: Tensor, v: Tensor | None) -> None:
        if not places:
            return
        request, number, row = np.array(places).T
        index = torch.from_numpy(self.table[request, number // self.page_size]), torch.from_numpy(number % self.page_size)
        index = tuple(part.to(k.device) for part in index)  # type: ignore[assignment]
        rows = torch.from_numpy(row).to(k.device)
        _bytes(self.expected_k)[index] = _bytes(k)[rows]
        if self.expected_v is not None and v is not None:
            _bytes(self.expected_v)[index] = _bytes(v)[rows]

    def check_written(self) -> None:
        """This call's tokens are in their slots to the bit, and no other slot has changed."""
        assert _same_bits(self.cache.k_pages, self.expected_k)
        if self.expected_v is not None and self.cache.v_pages is not None:
            assert _same_bits(self.cache.v_pages, self.expected_v)


def _bytes(x: Tensor) -> Tensor:
    """fp8 as bytes, with which torch does on every device what it does with other numbers."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _same_bits(x: Tensor, y: Tensor) -> bool:
    x, y = _bytes(x), _bytes(y)
    return bool(((x == y) | (x.isnan() & y.isnan())).all())
