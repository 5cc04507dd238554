"""Plans that know which rank holds each cached token: what they say of it, and what is refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.paged_caches import random_ranks
from inputs.strategies import Batch, batches

import cpattn
from cpattn.metadata.window_reach import Reach


@given(batch=batches(max_requests=6), cp_size=st.integers(1, 5), window=st.integers(1, 50), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_they_say_what_each_rank_holds(batch: Batch, cp_size: int, window: int, seed: int) -> None:
    """Counts, numbers, runs and what a window reaches: token by token."""
    ranks = random_ranks(batch, cp_size, seed)
    plan = cpattn.plan(batch, cp_size, prefix_ranks=ranks)
    assert plan.shard_lens.tolist() == [[line.count(rank) for rank in range(cp_size)] for line in ranks]
    assert plan == cpattn.plan(batch, cp_size, prefix_ranks=[np.array(line, dtype=np.int16) for line in ranks])
    assert plan.rows == cpattn.plan(batch, cp_size, prefix_shards=plan.prefix_shards).rows
    numbers = [line[:place].count(rank) for line in ranks for place, rank in enumerate(line)]
    assert plan.prefix_numbers.tolist() == numbers
    assert plan.prefix_ranks is not None
    runs = plan.prefix_ranks.runs()
    assert runs.rank.repeat(runs.length).tolist() == [rank for line in ranks for rank in line]
    assert cpattn.plan([(0, prefix) for prefix, _ in batch], cp_size, partition=lambda *_: runs).num_tokens == plan.num_prefix_tokens
    reach, held = Reach.of(plan, window), [list(line) for line in ranks]
    for chunk in plan.chunks:
        held[chunk.request] += [chunk.rank] * chunk.length
    for request, (prefix, extend) in enumerate(batch):
        reached = min(prefix, window - 1) if extend else 0
        assert reach.counts[request].tolist() == [ranks[request][prefix - reached :].count(rank) for rank in range(cp_size)]
        positions: Any = np.arange(prefix - reached, prefix + extend + 1)
        for rank in range(cp_size):
            before = reach.held_before(plan, rank, np.full_like(positions, request), positions)
            assert before.tolist() == [held[request][:position].count(rank) for position in positions]


def test_plans_are_told_apart() -> None:
    plans = [cpattn.plan([(4, 2)], 2, prefix_ranks=[ranks]) for ranks in ([0, 0, 1, 1], [0, 1, 0, 1])]
    counted = cpattn.plan([(4, 2)], 2, prefix_shards=[[2, 2]])
    assert len({plan.fingerprint for plan in (*plans, counted)}) == len({*plans, counted}) == 3
    for plan in plans:
        copy = pickle.loads(pickle.dumps(plan))
        assert copy == plan
        assert copy.fingerprint == plan.fingerprint
        assert replace(plan, partition="zigzag") == plan
    assert repr(plans[0].prefix_ranks) == "PrefixRanks(4 tokens of 1 requests)"


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([[0, 1, 0]], "prefix_ranks of request 0 has 3 entries, its prefix_len is 4; pass for each request the rank of each"),
        ([[0, 1, 0, 1], []], "prefix_ranks has 2 entries, the batch has 1 requests"),
        ([[0, 1, 2, 1]], "prefix_ranks of request 0 has rank 2 for token 2; ranks are 0 to 1"),
        ([[0, 1, -1, 1]], "prefix_ranks of request 0 holds -1 to 1"),
        ([[0.0, 1.0, 0.0, 1.0]], r"prefix_ranks of request 0 is float64 of shape \(4,\)"),
        ([[[0, 1, 0, 1]]], r"prefix_ranks of request 0 is int64 of shape \(1, 4\)"),
        ([[0, [1], 0, 1]], r"prefix_ranks of request 0 cannot be read as an array \(ValueError\)"),
        (4, "prefix_ranks is 4; pass for each request"),
    ],
)
def test_what_is_refused(ranks: Any, message: str) -> None:
    with pytest.raises(cpattn.PlanError, match=message):
        cpattn.plan([(4, 2)], 2, prefix_ranks=ranks)


def test_one_word_for_where_tokens_lie() -> None:
    for other in ({"prefix_shards": [[4, 0]]}, {"owner": cpattn.Striped()}):
        with pytest.raises(cpattn.PlanError, match=r"prefix_ranks beside .*; it says itself which tokens each rank holds, so leave"):
            cpattn.plan([(4, 2)], 2, prefix_ranks=[[0, 1, 0, 1]], **other)


def test_a_bucket_with_a_window_takes_no_plan_without_positions() -> None:
    """It is told before anything changes: a graph of the call needs them for each batch."""
    batch, bucket = [(4, 2)], cpattn.Bucket(1, 4, 4, 32)
    known, counted = cpattn.plan(batch, 1, prefix_ranks=[[0] * 4]), cpattn.plan(batch, 1, prefix_shards=[[4]])
    meta = known.metadata(0, bucket=bucket)
    meta.copy_(counted)
    meta.copy_(known)
    q, k = torch.zeros(4, 2, 8), torch.zeros(4, 1, 8)
    pages = cpattn.PagedKV(torch.zeros(1, 8, 1, 8), torch.zeros(1, 8, 1, 8), torch.tensor([[0]]))
    cpattn.cp_attention(q, k, k, meta, kv_cache=pages, window=3, backend="reference")
    with pytest.raises(cpattn.PlanError, match="prefix_shards, which say how many tokens each rank holds, but not which, and a call with"):
        meta.copy_(counted)
    assert meta.plan is known


def test_a_plan_that_is_refused_leaves_others_as_they_are() -> None:
    plan = cpattn.plan([(8, 0)], 8, prefix_ranks=[[4, 5, 6, 7] * 2])
    with pytest.raises(cpattn.PlanError, match="ranks are 0 to 3"):
        cpattn.plan([(8, 0)], 4, prefix_ranks=plan.prefix_ranks)
    assert plan.prefix_numbers.tolist() == [0] * 4 + [1] * 4
