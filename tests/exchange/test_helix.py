"""Queries split by heads, keys by tokens: each rank gets its heads of what one device computes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import AttentionCase
from inputs.strategies import Batch, batches
from programs.failed_calls import Faults, with_fault
from programs.split_heads import call, check, heads_of
from torch import Tensor

import cpattn
from cpattn.exchange.helix import HELIX
from cpattn.exchange.schedule import bytes_sent
from cpattn.testing import oracle_attention, run_loopback

CACHES = ["striped", "sharded", "ranked"]


@st.composite
def helix_cases(draw: st.DrawFn) -> tuple[AttentionCase, int]:
    batch, cp_size = draw(batches(max_requests=5)), draw(st.sampled_from([1, 2, 3, 4]))
    kv_heads = draw(st.sampled_from([1, 2]))
    longest = max((sum(request) for request in batch), default=0)
    cache = draw(st.sampled_from(CACHES))
    windows = st.one_of(st.none(), st.integers(1, max(1, longest)))
    case = AttentionCase(
        batch,
        heads=cp_size * 2,
        kv_heads=kv_heads,
        head_dim=8,
        v_in_k=draw(st.booleans()),
        v_head_dim=4,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        window=None if cache == "sharded" else draw(windows),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 5.0])),
        cache=cache,
        page_size=draw(st.sampled_from([1, 3, 16])),
        interleave=draw(st.sampled_from([1, 2, 16])),
        seed=draw(st.integers(0, 1000)),
    )
    return case, cp_size


@given(drawn=helix_cases(), partition=st.sampled_from(["zigzag", "contiguous", "whole"]), pad_to=st.sampled_from([1, 4]), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_batch(drawn: tuple[AttentionCase, int], partition: str, pad_to: int, data: st.DataObject) -> None:
    """Results, what is written, and that nothing else is; then over pages that hold the new tokens, and in a bucket."""
    case, cp_size = drawn
    plan = case.plan(cp_size, partition=partition, pad_to=pad_to, queries="all")
    assert plan.rank_tokens == (plan.num_tokens,) * cp_size
    fixed, written = data.draw(st.booleans()), data.draw(st.booleans())
    bucket = cpattn.Bucket(len(case.batch) + 1, plan.rows + 2, len(case.batch) + 1, 400) if fixed else None
    check(case, plan, run_loopback(lambda c: call(case, plan.metadata(c.rank, bucket=bucket), c, written, backend="reference"), cp_size))


@pytest.mark.parametrize("cache", CACHES)
def test_a_backend_that_is_given_a_copy_of_pages(cache: str) -> None:
    case = AttentionCase([(30, 1), (9, 12), (0, 3), (5, 0)], heads=6, kv_heads=2, cache=cache, interleave=2, page_size=4)
    plan = case.plan(3, queries="all")
    check(case, plan, run_loopback(lambda c: call(case, plan.metadata(c.rank), c, backend="cpu"), 3), "cpu")


@pytest.mark.parametrize(("cache", "window"), [("striped", None), ("striped", 7), ("sharded", None), ("ranked", 7)])
def test_a_bucket_takes_one_batch_after_another(cache: str, window: int | None) -> None:
    bucket = cpattn.Bucket(3, 20, 3, 64)
    steps: list[Batch] = [[(0, 17)], [(17, 1), (30, 1)], [(18, 1), (31, 4), (0, 9)], []]
    cases = [AttentionCase(step, 4, 2, cache=cache, window=window, interleave=4, page_size=4, seed=n) for n, step in enumerate(steps)]
    plans = [case.plan(2, queries="all") for case in cases]

    def program(group: cpattn.Transport) -> list[Any]:
        meta = plans[0].metadata(group.rank, bucket=bucket)
        outs = []
        for case, plan in zip(cases, plans, strict=True):
            meta.copy_(plan)
            outs.append(call(case, meta, group, backend="reference"))
        return outs

    for number, outputs in enumerate(zip(*run_loopback(program, 2), strict=True)):
        check(cases[number], plans[number], list(outputs))


@pytest.mark.parametrize(("cache", "window"), [("striped", None), ("ranked", 6)])
def test_a_fault_anywhere_keeps_ranks_in_step(cache: str, window: int | None) -> None:
    """Of a rank that raises, others get NaN with LSE NaN, in whole rows; then the same call works on all."""
    case = AttentionCase([(9, 8), (20, 1), (0, 5)], 4, 2, cache=cache, interleave=2, page_size=5, window=window)
    plan = case.plan(2, queries="all")
    expected = [x.float() for x in case.expected]

    def program(group: cpattn.Transport) -> int:
        raised = 0
        for line in range(0, 240, 12):
            found = with_fault(lambda: call(case, plan.metadata(group.rank), group, backend="reference"), group.rank, Faults({1: line}))
            raised += found is None
            if group.rank == 0:
                for x, right in zip(found, expected, strict=True):
                    mine = heads_of(right, group)
                    assert torch.allclose(torch.where(x.isnan(), mine, x), mine, rtol=1e-4, atol=1e-4)
                assert torch.equal(found[0].isnan().all(dim=-1), found[1].isnan())
            call(case, plan.metadata(group.rank), group, backend="reference", check=True)
        return raised

    raised = run_loopback(program, 2, timeout=30)
    assert raised[0] == 0
    assert raised[1] > 5, raised


def test_an_engine_with_tensor_parallelism() -> None:
    """A prefill, a chunk, decodes: over a pool, whose pages hold each token once; each rank has its heads of all rows."""
    torch.manual_seed(0)
    q, k, v = torch.randn(40, 6, 8), *torch.randn(2, 40, 2, 8)
    expected, _ = oracle_attention(q, k, v, [(0, 40)])

    def program(group: cpattn.Transport, owner: Any) -> Tensor:
        pool = cpattn.KVPool(8, 4, 1, 2, 8, cp_size=group.size, cp_rank=group.rank, owner=owner)
        pool.admit("a")
        outs = []
        for begin, end in [(0, 19), (19, 30), *((n, n + 1) for n in range(30, 40))]:
            meta = pool.plan([("a", end - begin)], queries="all").metadata(group.rank)
            assert torch.equal(cpattn.shard(k[begin:end], meta), k[begin:end])
            assert meta.position_ids.tolist() == list(range(begin, end))
            cache = pool.layer(0, pool.page_table(["a"]))
            outs.append(cpattn.cp_attention(heads_of(q, group)[begin:end], k[begin:end], v[begin:end], meta, group=group, kv_cache=cache))
        return torch.cat(outs)

    for owner in ("computed", cpattn.Striped(2)):
        outs = run_loopback(partial(program, owner=owner), 3)
        torch.testing.assert_close(torch.cat(outs, dim=1), expected.float())


def test_tensor_parallelism_beside_it() -> None:
    """Four ranks, two KV heads: each two ranks share a KV head, and its tokens."""
    case = AttentionCase([(9, 8), (20, 1)], 8, 2, cache="striped", page_size=4)
    plan = case.plan(2, queries="all")

    def program(group: cpattn.Transport) -> Tensor:
        tp, cp = group.split(2, 2)
        mine = replace(case)
        for name in ("q", "k", "v", "prefix_k", "prefix_v"):
            setattr(mine, name, heads_of(getattr(case, name), tp))
        return call(mine, plan.metadata(cp.rank), cp)[0]  # type: ignore[no-any-return]

    torch.testing.assert_close(torch.cat(run_loopback(program, 4), dim=1), case.expected[0].float())


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_what_travels_is_what_the_schedule_says(cp_size: int) -> None:
    case = AttentionCase([(9, 8), (20, 1)], 6, 2, cache="striped", page_size=4)
    plan = case.plan(cp_size, queries="all", pad_to=4)

    def program(group: cpattn.Transport) -> int:
        call(case, plan.metadata(group.rank), group)
        return group.bytes_sent

    schedule = HELIX.schedule(case.problem(plan), plan)
    assert run_loopback(program, cp_size) == bytes_sent(schedule).tolist()
    # A row's queries to all others, and the results of their heads.
    assert bytes_sent(schedule).tolist() == [(cp_size - 1) * plan.rows * (6 // cp_size) * (16 + 17) * 4] * cp_size


@pytest.mark.parametrize("window", [None, 7])
def test_an_exchange_a_launch_and_an_exchange(window: int | None) -> None:
    """Of queries, of all heads over the rank's keys, and of partial results."""
    case = AttentionCase([(9, 8), (20, 1)], 6, 2, cache="striped", page_size=4, window=window)
    plan = case.plan(3, queries="all")
    reference = cpattn.BACKENDS["reference"]

    def program(group: cpattn.Transport) -> list[str]:
        done: list[str] = []

        def attend(q: Tensor, keys: Any, spans: Any, options: Any, out_dtype: Any) -> tuple[Tensor, Tensor]:
            done.append(f"{q.shape[1]} heads")
            return reference.attend(q, keys, spans, options, out_dtype)

        def start(transfer: Any, original: Any = group.start) -> Any:
            done.append("exchange")
            return original(transfer)

        group.start = start  # type: ignore[method-assign]
        call(case, plan.metadata(group.rank), group, backend=replace(reference, attend=attend, accumulate=None))
        return done

    assert run_loopback(program, 3) == [["exchange", "6 heads", "exchange"]] * 3


def test_explain_and_estimate_say_it() -> None:
    case = AttentionCase([(900, 1)] * 8, 8, 2, 64, cache="striped")
    plan = case.plan(4, queries="all")
    problem = replace(case.problem(plan), page_size=16, dtype=torch.bfloat16)
    estimates = cpattn.estimate(plan, problem, "h100-nvlink")
    assert {found.strategy for found in estimates} == {"helix"}
    assert not any(name in ("ring", "pass_q") for name in estimates.passed_over)
    assert estimates[0].bytes_sent == bytes_sent(HELIX.schedule(problem, plan)).max()
    meta = plan.metadata(0)
    q, k = torch.zeros(8, 2, 64), torch.zeros(8, 2, 64)
    assert cpattn.explain(q, k, k, meta)["cpu"] == "chosen"
    assert repr(plan).endswith("owner=Striped(interleave=1), queries=all)")


def refused(error: type[Exception], message: str, q_heads: int = 2, k_heads: int = 2, queries: str = "all", **options: Any) -> None:
    meta = cpattn.build_metadata([(4, 2)], 2, 0, owner=cpattn.Striped(), queries=queries)
    group = cpattn.LoopbackGroup(2).transport(0)
    k_pages, v_pages = torch.zeros(2, 2, 4, k_heads, 8)
    pages = cpattn.PagedKV(k_pages, v_pages, torch.tensor([[0]]))
    q, k = torch.zeros(meta.rows, q_heads, 8), torch.zeros(meta.rows, k_heads, 8)
    with pytest.raises(error, match=message):
        cpattn.cp_attention(q, k, k, meta, group=group, kv_cache=pages, **options)
    assert group.bytes_sent == 0


def test_what_is_refused() -> None:
    refused(cpattn.HeadCountError, "q has 2 heads on each of 2 ranks, 4 in all, k and v have 3; query heads must be a multiple", k_heads=3)
    refused(cpattn.UnsupportedError, "strategy='pass_q' cannot serve this call: its queries are split by rows", strategy="pass_q")
    refused(cpattn.UnsupportedError, r"pass queries='all' to cpattn.plan; 'ring', 'pass_q'", queries="rows", strategy="helix")
    with pytest.raises(cpattn.PlanError, match="queries='all' without an owner, prefix_shards or prefix_ranks: where queries are split by"):
        cpattn.plan([(4, 2)], 2, queries="all")
    with pytest.raises(cpattn.PlanError, match="queries='some' is unknown; choose one of 'rows', 'all'"):
        cpattn.plan([(4, 2)], 2, owner=cpattn.Striped(), queries="some")
    rows, heads = (cpattn.plan([(4, 2)], 2, owner=cpattn.Striped(), queries=queries) for queries in ("rows", "all"))
    assert rows != heads
    assert rows.fingerprint != heads.fingerprint
    with pytest.raises(cpattn.PlanError, match="the plan has queries='rows', this metadata 'all'"):
        heads.metadata(0, bucket=cpattn.Bucket(1, 4, 4)).copy_(rows)
    with pytest.raises(cpattn.UnsupportedError, match="each rank has all rows: nothing is to be gathered; write_kv takes k and v as they"):
        cpattn.gather_kv(torch.zeros(2, 1, 8), None, heads.metadata(0), group=cpattn.LoopbackGroup(2).transport(0))
