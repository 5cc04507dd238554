"""``pass_q`` over caches in which nothing is cached yet, and others hold what a rank computes: new keys travel, and no query does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import AttentionCase
from inputs.strategies import Batch, lengths
from programs.failed_calls import Faults, attend_with_faults, check_partly_failed

import cpattn
from cpattn.byte_sizes import in_words
from cpattn.exchange.schedule import bytes_sent, num_results
from cpattn.testing import run_loopback


def case_of(extends: list[int], windowed: bool, **options: Any) -> AttentionCase:
    """Striped, or of computed tokens that a window sees through gaps."""
    kind: dict[str, Any] = {"cache": "ranked", "window": 7} if windowed else {"cache": "striped", "interleave": 3}
    return AttentionCase([(0, extend) for extend in extends], page_size=5, **(kind | options))


@pytest.mark.parametrize("windowed", [False, True])
@given(
    extends=st.lists(lengths(50), max_size=6), cp_size=st.integers(1, 5), partition=st.sampled_from(["zigzag", "whole"]),
    pad_to=st.sampled_from([1, 4]), v_in_k=st.booleans(), sinks=st.booleans(),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_any_batch(windowed: bool, extends: list[int], cp_size: int, partition: str, pad_to: int, v_in_k: bool, sinks: bool) -> None:
    case = case_of(extends, windowed, v_in_k=v_in_k, v_head_dim=8, sinks=sinks)
    plan = case.plan(cp_size, partition=partition, pad_to=pad_to)
    case.check_loopback(plan, "pass_q", "reference")
    assert num_results(cpattn.STRATEGIES["pass_q"].schedule(case.problem(plan), plan)) == 1


@pytest.mark.parametrize("windowed", [False, True])
def test_what_travels_where_nearly_all_is_wanted(windowed: bool) -> None:
    case = case_of([40, 9], windowed, **({"window": 39} if windowed else {}))
    plan = case.plan(3, pad_to=4)

    def program(group: cpattn.Transport) -> tuple[int, str]:
        meta, cache = plan.metadata(group.rank), case.pages(plan, group.rank).cache
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        named: dict[str, Any] = {"kv_cache": cache, "strategy": "pass_q", "window": case.window}
        cpattn.cp_attention(q, k, v, meta, group=group, **named)
        return group.bytes_sent, cpattn.explain(q, k, v, meta, **named)["queries"]

    schedule = cpattn.STRATEGIES["pass_q"].schedule(case.problem(plan), plan)
    # K and V of two heads in fp32.
    others = 2 * plan.rows * 2 * (16 + 16) * 4
    assert bytes_sent(schedule).tolist() == [others] * 3
    said = f"none travel: nothing is cached; of keys and values a rank receives all new ones, {in_words(others)}"
    for sent, text in run_loopback(program, 3):
        assert sent == others
        assert text.startswith(said)
        assert text.endswith("which is above 67%")


def test_with_one_cached_token_queries_travel_as_well() -> None:
    case = AttentionCase([(0, 40), (1, 9)], cache="striped")
    plan = case.plan(3)
    meta, problem = plan.metadata(0), case.problem(plan)
    schedule = cpattn.STRATEGIES["pass_q"].schedule(problem, plan)
    assert bytes_sent(schedule).max() == 2 * plan.rows * (problem.query_bytes + problem.key_bytes + problem.result_bytes)
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    said = cpattn.explain(q, k, v, meta, kv_cache=case.pages(plan, 0).cache, strategy="pass_q")["queries"]
    assert said.startswith("a rank receives all of them, ")
    assert said.endswith(": each holds a part of almost every request")


@pytest.mark.parametrize(
    ("cache", "window", "strategy"), [("striped", None, "pass_q_ring"), ("striped", 9, "pass_q"), ("ranked", 9, "pass_q")]
)
def test_all_that_travels_is_said(cache: str, window: int | None, strategy: str) -> None:
    """Also where queries go around beside new keys, and where a window reaches few keys of others."""
    case = AttentionCase([(0, 40), (30, 9)], cache=cache, window=window)
    plan = case.plan(3)

    def program(group: cpattn.Transport) -> tuple[int, str]:
        case.on_rank(plan, group.rank, group, strategy, "reference")
        meta, cache = plan.metadata(group.rank), case.pages(plan, group.rank).cache
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        return group.bytes_sent, cpattn.explain(q, k, v, meta, kv_cache=cache, strategy=strategy, window=window)["queries"]

    problem = case.problem(plan)
    queries, keys = (in_words(2 * plan.rows * each) for each in (problem.query_bytes, problem.key_bytes))
    why = "each holds a part of almost every request" if window is None else "it is not worked out which of them see keys elsewhere"
    said = f"a rank receives all of them, {queries}, beside all new keys and values, {keys}: {why}"
    assert {text for _, text in run_loopback(program, 3)} == {said}
    sent = bytes_sent(cpattn.STRATEGIES[strategy].schedule(problem, plan))
    assert sent.tolist() == [2 * plan.rows * (problem.query_bytes + problem.key_bytes + problem.result_bytes)] * 3


def test_a_bucket_takes_batches_with_a_prefix_after_one_without() -> None:
    bucket = cpattn.Bucket(3, 20, 6, 64)
    steps: list[Batch] = [[(0, 30)], [(30, 1), (0, 9)], [(0, 3)]]
    cases = [AttentionCase(step, cache="striped", interleave=2, seed=seed) for seed, step in enumerate(steps)]
    plans = [case.plan(2) for case in cases]

    def program(group: cpattn.Transport) -> list[Any]:
        meta, outs = plans[0].metadata(group.rank, bucket=bucket), []
        for case, plan in zip(cases, plans, strict=True):
            meta.copy_(plan)
            outs.append(case.on_rank(plan, group.rank, group, "pass_q", "reference", meta=meta))
        return outs

    for case, plan, *outputs in zip(cases, plans, *run_loopback(program, 2), strict=True):
        case.check(list(outputs), plan, "pass_q", "reference")


@pytest.mark.parametrize("windowed", [False, True])
def test_a_fault_anywhere_keeps_ranks_in_step(windowed: bool) -> None:
    case = case_of([17, 30, 2], windowed)
    plan = case.plan(3)
    for line in range(0, 240, 24):
        faults = Faults({1: line})

        def program(group: cpattn.Transport, faults: Faults = faults) -> Any:
            first = attend_with_faults(case, plan, group, group.rank, "pass_q", "reference", faults)
            return first, case.on_rank(plan, group.rank, group, "pass_q", "reference", check=True)

        results = run_loopback(program, 3, timeout=20)
        check_partly_failed(case, plan, "pass_q", [first for first, _ in results])
        case.check([second for _, second in results], plan, "pass_q", "reference")


def test_auto_takes_it_for_a_prompt() -> None:
    """No ring is as fast where every rank is to see all new keys anyway."""
    plan = cpattn.plan([(0, 8192)], 2, owner=cpattn.Striped())
    problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 32, 8, 128, 128, cache="paged", page_size=64)
    best = cpattn.estimate(plan, problem, "h100-nvlink")[0]
    assert (best.strategy, best.bytes_sent) == ("pass_q", plan.rows * problem.key_bytes)
