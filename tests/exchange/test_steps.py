"""What strategies promise of their steps, on which the choice and the merging of backends rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Batch, batches

import cpattn
from cpattn.exchange.message import torch_pack_
from cpattn.exchange.registry import AUTO_GATHER_LIMIT, candidate_strategies, default_overlap
from cpattn.exchange.strategy import ExchangeInputs, Step
from cpattn.testing import SoloCommunicator

# What each alignment can pass for.
FITS = {"bottom_right": {"bottom_right", "any"}, "full": {"full", "any"}, "any": {"any"}}


def steps_of(strategy: str, plan: cpattn.Plan, rank: int, window: int | None, overlap: int = 1) -> list[Step]:
    k = torch.zeros(plan.rows, 2, 4)
    cached = torch.zeros(plan.num_prefix_tokens, 2, 4)
    prefix = cpattn.PackedKV(cached, cached) if plan.num_prefix_tokens else None
    inputs = ExchangeInputs(k, k, prefix, 4, window, overlap)
    return list(cpattn.STRATEGIES[strategy].steps(inputs, plan.metadata(rank), SoloCommunicator(rank, plan.cp_size)))


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@given(
    batch=batches(), cp_size=st.integers(1, 6), partition=st.sampled_from(["zigzag", "contiguous"]), window=st.none() | st.integers(1, 90)
)
@settings(max_examples=150, deadline=None)
def test_steps_are_as_many_and_of_the_alignment_that_the_strategy_says(
    strategy: str, batch: Batch, cp_size: int, partition: str, window: int | None
) -> None:
    plan = cpattn.plan(batch, cp_size, partition=partition)
    promised = cpattn.STRATEGIES[strategy].alignments(plan, window)
    for rank in range(cp_size):
        steps = steps_of(strategy, plan, rank, window)
        assert len(steps) == cpattn.STRATEGIES[strategy].num_steps(plan, window)
        for step in steps:
            assert FITS[step.rows.alignment] & promised
            assert step.rows.num_queries == plan.rank_tokens[rank]
            # All ranges lie within the keys at hand.
            assert ((step.rows.host.k_start + step.rows.host.k_len) <= step.k.shape[0]).all()


@pytest.mark.parametrize("cp_size", [1, 4])
def test_a_ring_leaves_out_ranges_before_every_window(cp_size: int) -> None:
    plan = cpattn.plan([(1000, 400)], cp_size)
    prefix_step, *_ = steps_of("ring", plan, cp_size - 1, window=20)
    # Only the chunks that begin within 20 tokens of the prefix see any of it.
    starts = plan.metadata(cp_size - 1).chunk_host.start
    assert (prefix_step.rows.host.k_len == (1000 * (starts < 20 - 1))).all()


def test_groups_of_heads_cover_each_query_head_once() -> None:
    plan = cpattn.plan([(3, 20)], 2)
    steps = steps_of("all_gather", plan, 0, None, overlap=2)
    assert [step.heads for step in steps] == [slice(0, 2), slice(2, 4)]
    assert [step.k.shape[1] for step in steps] == [1, 1]


def test_padding_is_zeroed_before_it_travels() -> None:
    message = torch.full((6, 2, 7), torch.nan)
    k, v = torch.randn(6, 2, 4), torch.randn(6, 2, 3)
    k[4:], v[4:] = torch.nan, torch.inf
    torch_pack_(message, k, v, 4)
    assert torch.equal(message[:4], torch.cat([k, v], -1)[:4])
    assert (message[4:] == 0).all()


def test_auto_takes_the_ring_where_gathered_keys_would_not_fit() -> None:
    assert [strategy.name for strategy in candidate_strategies("auto", AUTO_GATHER_LIMIT)] == ["all_gather", "ring"]
    assert [strategy.name for strategy in candidate_strategies("auto", AUTO_GATHER_LIMIT + 1)] == ["ring", "all_gather"]


@pytest.mark.parametrize(
    ("kv_heads", "gathered_bytes", "device", "groups"),
    [(8, 2**30, "cuda", 4), (6, 2**30, "cuda", 3), (1, 2**30, "cuda", 1), (8, 2**20, "cuda", 1), (8, 2**30, "cpu", 1)],
)
def test_default_overlap(kv_heads: int, gathered_bytes: int, device: str, groups: int) -> None:
    assert default_overlap(kv_heads, gathered_bytes, device) == groups


def test_an_unknown_strategy_of_any_type_is_refused() -> None:
    bad: Any = ["ring"]
    with pytest.raises(cpattn.UnknownNameError, match=r"strategy=\['ring'\] is unknown"):
        candidate_strategies(bad, 0)
