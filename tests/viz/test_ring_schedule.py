"""The schedule of a ring: its pairs are the plan's, and no rank computes with keys that it does not have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs.strategies import Batch, any_plan_options, batches

import cpattn
from cpattn.exchange.schedule import prefix_pairs, shard_pairs
from cpattn.viz import ring_as_text, ring_schedule, work_as_text


def counted(plan: cpattn.Plan) -> tuple[list[list[int]], list[int]]:
    """The same as shard_pairs and prefix_pairs, one query-key pair after another."""
    pairs = [[0] * plan.cp_size for _ in range(plan.cp_size)]
    prefixes = [0] * plan.cp_size
    for request, (prefix_len, extend_len) in enumerate(plan.batch):
        owner = [0] * extend_len
        for chunk in plan.chunks:
            if chunk.request == request:
                owner[chunk.start : chunk.start + chunk.length] = [chunk.rank] * chunk.length
        for query in range(extend_len):
            prefixes[owner[query]] += prefix_len
            for key in range(query + 1):
                pairs[owner[query]][owner[key]] += 1
    return pairs, prefixes


@given(batches(max_requests=4, max_prefix=20, max_extend=24), any_plan_options())
def test_pairs_are_those_one_counts(batch: Batch, options: dict[str, Any]) -> None:
    plan = cpattn.plan(batch, **options)
    pairs, prefixes = shard_pairs(plan), prefix_pairs(plan)
    assert (pairs.tolist(), prefixes.tolist()) == counted(plan)
    assert tuple((pairs.sum(axis=1) + prefixes).tolist()) == plan.rank_pairs


@given(batches(), any_plan_options(), st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_a_rank_waits_for_its_keys(batch: Batch, options: dict[str, Any], transfer: float) -> None:
    plan = cpattn.plan(batch, **options)
    schedule = ring_schedule(plan, transfer)
    assert len(schedule.computing) == plan.cp_size**2
    assert len(schedule.sending) == plan.cp_size * (plan.cp_size - 1)
    computing = {(stretch.rank, stretch.hop): stretch for stretch in schedule.computing}
    sending = {(stretch.rank, stretch.hop): stretch for stretch in schedule.sending}
    for (rank, hop), stretch in computing.items():
        assert stretch.owner == (rank - hop) % plan.cp_size
        if hop:
            # It has computed the hop before, sent its keys on, and got these from the rank before it.
            before = (rank - 1) % plan.cp_size
            arrived = sending[before, hop - 1]
            assert arrived.owner == stretch.owner
            ready = [computing[rank, hop - 1].end, sending[rank, hop - 1].end, arrived.end]
            assert stretch.begin == pytest.approx(max(ready))
    for (rank, hop), stretch in sending.items():
        # It sends what it holds, once it holds it.
        assert stretch.owner == computing[rank, hop].owner
        assert stretch.begin >= computing[rank, hop].begin
    assert schedule.end == max(stretch.end for stretch in schedule.computing)
    assert 0 <= schedule.busy <= 1 + 1e-9


def test_free_transfers_and_even_work_leave_no_gaps() -> None:
    assert ring_schedule(cpattn.plan([(0, 64)], 4), transfer=0).busy == 1.0
    assert ring_schedule(cpattn.plan([(0, 64)], 4, partition="contiguous"), transfer=0).busy < 0.7


def test_slow_transfers_are_what_it_waits_for() -> None:
    """Two transfers of 10 hops' time each, beside three hops."""
    plan = cpattn.plan([(0, 3000)], 3)
    schedule = ring_schedule(plan, transfer=10)
    hop = sum(plan.rank_pairs) / 9
    last = shard_pairs(plan)[np.arange(3), [1, 2, 0]].max()
    assert schedule.end == pytest.approx(2 * 10 * hop + last)


def test_a_negative_transfer_is_refused() -> None:
    for wrong in (-0.5, float("nan")):
        with pytest.raises(cpattn.PlanError, match="it must be at least 0"):
            ring_schedule(cpattn.plan([(0, 4)], 2), wrong)


@given(batches(), any_plan_options(), st.integers(1, 80))
def test_texts_are_as_wide_as_asked(batch: Batch, options: dict[str, Any], width: int) -> None:
    plan = cpattn.plan(batch, **options)
    lines = ring_as_text(ring_schedule(plan), width).splitlines()
    bars = [line.split("|")[1] for line in lines if "|" in line]
    assert [len(bar) for bar in bars] == [width] * 2 * plan.cp_size
    work = [line.split("|")[1] for line in work_as_text([plan, plan], width).splitlines() if "|" in line]
    assert [len(bar) for bar in work] == [width] * 2 * plan.cp_size
    if any(plan.rank_pairs):
        assert "#" * width in work
