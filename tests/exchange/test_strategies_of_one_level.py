"""A strategy of two levels of which one has a single rank does what the other level does: it takes what that takes, and refuses as much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from inputs.latent_cases import LatentCase
from inputs.problems import problem
from inputs.stored_cases import StoredCase

import cpattn
from cpattn.exchange.registry import find_strategy
from cpattn.exchange.schedule import bytes_sent
from cpattn.problem import Problem
from cpattn.testing import run_loopback

BATCH = [(40, 9), (16, 1), (0, 5)]
SAME = [
    (cpattn.hybrid(1, "ring"), "ring", 3),
    (cpattn.hybrid(1, "all_gather"), "all_gather", 2),
    (cpattn.hybrid(2, "ring"), "ulysses", 2),
    (cpattn.two_level(1), "all_gather", 3),
    (cpattn.two_level(2), "all_gather", 2),
    ("ulysses", "all_gather", 1),
]


def plans(cp_size: int) -> Iterator[cpattn.Plan]:
    """Of each owner rule."""
    counts = [[len(range(rank, prefix, cp_size)) for rank in range(cp_size)] for prefix, _ in BATCH]
    yield cpattn.plan(BATCH, cp_size)
    yield cpattn.plan(BATCH, cp_size, owner=cpattn.Striped(4))
    yield cpattn.plan(BATCH, cp_size, prefix_shards=counts)
    yield cpattn.plan(BATCH, cp_size, prefix_ranks=[[position % cp_size for position in range(prefix)] for prefix, _ in BATCH])
    yield cpattn.plan(BATCH, cp_size, owner=cpattn.Striped(4), queries="all")


def problems(plan: cpattn.Plan) -> Iterator[Problem]:
    """Of caches in q's dtype and in fp8, of latents, and of buckets."""
    for cache in ("packed", "paged") if not plan.sharded else ("paged",):
        plain = problem(dtype=torch.bfloat16, rows=plan.rows, cache=cache, page_size=16 if cache == "paged" else None)
        for window in (None, 5):
            one = replace(plain, window=window)
            yield from (one, replace(one, latent_dim=24))
            if cache == "paged":
                yield from (replace(one, fixed=True), replace(one, kv_dtype=torch.float8_e4m3fn, scales="token"))


@pytest.mark.parametrize(("strategy", "same", "cp_size"), SAME, ids=str)
def test_the_same_is_refused(strategy: Any, same: str, cp_size: int) -> None:
    mine, other = find_strategy(strategy), find_strategy(same)
    able = 0
    for plan in plans(cp_size):
        for one in problems(plan):
            assert (mine.refusal(one, plan) is None) == (other.refusal(one, plan) is None), (one, plan)
            if mine.refusal(one, plan) is None:
                able += 1
                assert bytes_sent(mine.schedule(one, plan)).tolist() == bytes_sent(other.schedule(one, plan)).tolist()
    assert able


@pytest.mark.parametrize(("strategy", "same", "cp_size"), [one for one in SAME if one[1] != "ulysses"], ids=str)
def test_fp8_pages_and_latents_have_the_same_bits(strategy: Any, same: str, cp_size: int) -> None:
    """Which head groups of more than one rank refuse."""
    window = 5 if same == "all_gather" and not isinstance(strategy, str) else None
    stored = StoredCase(BATCH, cache="striped" if window or same == "ring" else "paged", interleave=4, page_size=5, window=window)
    for case in (stored, LatentCase(BATCH)):
        plan = case.plan(cp_size)
        mine, other = (run_loopback(lambda c: case.on_rank(plan, c.rank, c, one, "reference"), cp_size) for one in (strategy, same))  # noqa: B023
        assert all(torch.equal(x, y) for pair in zip(mine, other, strict=True) for x, y in zip(*pair, strict=True))
