"""Strategies that divide heads among ranks: shares, caches of a rank's own heads, faults, and what is refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import HEAD_EXCHANGES, AttentionCase
from inputs.own_partitions import OwnPartition
from inputs.strategies import batches, non_empty_batches
from programs.failed_calls import Faults, attend_with_faults, check_partly_failed

import cpattn
from cpattn.exchange.head_shares import head_shares
from cpattn.exchange.schedule import bytes_sent, hop_pairs
from cpattn.machine import H100
from cpattn.metadata.united import united_layout
from cpattn.testing import run_loopback
from cpattn.transports.transfer import Transfer

ACROSS = st.sampled_from(["ring", "all_gather"])
BATCH = [(37, 60), (0, 41), (90, 1), (0, 0), (5, 0), (12, 7), (0, 2)]


@given(kv_heads=st.integers(1, 9), group=st.integers(1, 9), ranks=st.integers(1, 20))
def test_each_query_head_is_on_one_rank_beside_its_kv_head(kv_heads: int, group: int, ranks: int) -> None:
    q_heads = kv_heads * group
    if q_heads < ranks:
        return
    shares = head_shares(q_heads, kv_heads, ranks)
    assert len(shares) == ranks
    assert [head for share in shares for head in range(q_heads)[share.q]] == list(range(q_heads))
    for share in shares:
        # Kernels take query heads that share KV heads alike.
        group_here = share.q_heads // share.kv_heads
        assert group_here * share.kv_heads == share.q_heads > 0
        here = range(share.q.start, share.q.stop)
        assert [head // group - share.kv.start for head in here] == [n // group_here for n in range(len(here))]
    if ranks <= kv_heads:
        assert max(share.kv_heads for share in shares) - min(share.kv_heads for share in shares) <= 1
    elif ranks % kv_heads == 0:
        assert max(share.q_heads for share in shares) - min(share.q_heads for share in shares) <= 1


@given(data=st.data(), batch=batches(), cp_size=st.integers(1, 8), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_any_heads_partition_and_cache(data: st.DataObject, batch: Any, cp_size: int, seed: int) -> None:
    _, cache = data.draw(st.sampled_from([*HEAD_EXCHANGES, ("hybrid", "paged")]))
    within = data.draw(st.sampled_from([n for n in range(1, cp_size + 1) if cp_size % n == 0]))
    strategy: Any = "ulysses" if within == cp_size and data.draw(st.booleans()) else cpattn.hybrid(within, data.draw(ACROSS))
    kv_heads, backend = data.draw(st.sampled_from([1, 2, 3, 5])), data.draw(st.sampled_from(["reference", "reference", "cpu"]))
    is_reference = backend == "reference"
    if cache == "paged":
        # Where every rank has all heads.
        kv_heads = kv_heads if within == 1 else 1
    v_in_k = data.draw(st.booleans())
    case = AttentionCase(
        batch,
        heads=kv_heads * -(-within // kv_heads) * data.draw(st.sampled_from([1, 2, 3])),
        kv_heads=kv_heads,
        head_dim=8,
        v_head_dim=data.draw(st.sampled_from([None, 4] if v_in_k else [None, 3, 16])),
        v_in_k=v_in_k,
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        window=data.draw(st.none() | st.integers(1, 60)) if is_reference else None,
        softcap=data.draw(st.sampled_from([None, 3.0])) if is_reference else None,
        sinks=data.draw(st.booleans()),
        cache=cache,
        within=within,
        page_size=data.draw(st.sampled_from([1, 3, 16])),
        seed=seed,
    )
    partition = data.draw(st.sampled_from(["zigzag", "contiguous", "whole", "uncut", OwnPartition(seed)]))
    case.check_loopback(case.plan(cp_size, partition=partition, pad_to=data.draw(st.sampled_from([1, 4]))), strategy, backend)


def test_float64_and_strides_and_memory_of_the_callers() -> None:
    case = AttentionCase(BATCH, dtype=torch.float64, sinks=True)
    plan = case.plan(2, pad_to=4)
    case.check_loopback(plan, "ulysses", "reference")

    def program(group: cpattn.Transport) -> None:
        meta = plan.metadata(group.rank)
        q, k, v = (cpattn.shard(x, meta).transpose(0, 2).contiguous().transpose(0, 2) for x in (case.q, case.k, case.v))
        options: dict[str, Any] = {"group": group, "kv_cache": case.prefix, "strategy": "ulysses", "backend": "reference"}
        expected = cpattn.cp_attention(q, k, v, meta, **options)
        out = torch.empty(meta.rows, 2, 4, 16, dtype=torch.float64)[:, 1]
        assert cpattn.cp_attention(q, k, v, meta, out=out, **options) is out
        assert torch.equal(out, expected)

    run_loopback(program, 2)


@pytest.mark.parametrize(("cache", "heads"), [("packed", (4, 2)), ("own pages", (4, 2)), ("paged", (3, 1))])
@pytest.mark.parametrize(
    ("cp_size", "strategy"), [(1, "ulysses"), (3, "ulysses"), (4, cpattn.hybrid(2, "ring")), (6, cpattn.hybrid(3, "all_gather"))], ids=str
)
def test_through_a_bucket(cache: str, heads: tuple[int, int], cp_size: int, strategy: Any) -> None:
    """One rank's metadata, refilled with layouts that have nothing in common; pages of one KV head have all of a rank's."""
    batches = [BATCH, [(11, 3)], [], [(20, 50), (60, 1), (0, 9)]]
    if cache == "packed":  # in a bucket, no prefix at all
        batches = [[(0, extend_len) for _, extend_len in batch] for batch in batches]
    # A ring with a window over a partition of one's own takes another number of launches each time.
    options: dict[str, Any] = {"cache": cache, "page_size": 5, "window": None if "ring" in str(strategy) else 30}
    options["within"] = None if strategy == "ulysses" else strategy.within
    cases = [AttentionCase(batch, *heads, seed=seed, **options) for seed, batch in enumerate(batches)]
    plans = [case.plan(cp_size, partition=OwnPartition(seed)) for seed, case in enumerate(cases)]
    bucket = cpattn.Bucket(max_requests=8, max_rows=160, max_chunks=70, max_seqlen=160)

    def program(group: cpattn.Transport) -> list[tuple[torch.Tensor, torch.Tensor]]:
        meta = plans[-1].metadata(group.rank, bucket=bucket)
        outputs = []
        for case, plan in zip(cases, plans, strict=True):
            meta.copy_(plan)
            outputs.append(case.on_rank(plan, group.rank, group, strategy, "reference", meta=meta))
        return outputs

    for case, plan, *outputs in zip(cases, plans, *run_loopback(program, cp_size), strict=True):
        case.check(outputs, plan, strategy, "reference")


@pytest.mark.parametrize("cache", ["packed", "own pages"])
def test_one_launch_over_whole_requests(cache: str) -> None:
    """However requests are cut among ranks."""
    case = AttentionCase(BATCH, heads=8, kv_heads=4, cache=cache)
    plan = case.plan(4, pad_to=8)
    seen: list[tuple[tuple[int, ...], np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    reference = cpattn.BACKENDS["reference"]

    def attend(q: torch.Tensor, keys: cpattn.Keys, spans: cpattn.Spans, options: Any, out_dtype: torch.dtype) -> Any:
        seen.append((tuple(q.shape), spans.host.q_len, spans.host.k_len))
        return reference.attend(q, keys, spans, options, out_dtype)

    backend = replace(reference, name="watched", attend=attend)
    run_loopback(lambda group: case.on_rank(plan, group.rank, group, "ulysses", backend), 4)
    assert len(seen) == 4
    requests = [(prefix + extend, extend) for prefix, extend in BATCH if extend]
    for shape, q_len, k_len in seen:
        assert shape == (plan.num_tokens, 2, 16)
        assert [(k, q) for q, k in zip(q_len.tolist(), k_len.tolist(), strict=True) if q] == requests


@given(data=st.data(), batch=non_empty_batches(), cp_size=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_fault_anywhere_keeps_ranks_in_step(data: st.DataObject, batch: Any, cp_size: int, seed: int) -> None:
    _, cache = data.draw(st.sampled_from(HEAD_EXCHANGES))
    within = data.draw(st.sampled_from([n for n in range(1, cp_size + 1) if cp_size % n == 0]))
    strategy = cpattn.hybrid(within, data.draw(ACROSS))
    backend, kv_heads = data.draw(st.sampled_from(["reference", "cpu"])), data.draw(st.sampled_from([1, 3, 4]))
    heads = 12 // kv_heads * kv_heads
    case = AttentionCase(batch, heads, kv_heads, cache=cache, within=within, page_size=5, seed=seed)
    plan = case.plan(cp_size, pad_to=data.draw(st.sampled_from([1, 4])), partition=data.draw(st.sampled_from(["zigzag", "whole"])))
    failing = data.draw(st.lists(st.integers(0, cp_size - 1), min_size=1, unique=True))
    faults = Faults({rank: data.draw(st.integers(0, 300)) for rank in failing})
    then = AttentionCase(BATCH, heads, kv_heads, cache=cache, within=within, page_size=5, seed=seed + 1)
    then_plan = then.plan(cp_size)

    def program(group: cpattn.Transport) -> Any:
        first = attend_with_faults(case, plan, group, group.rank, strategy, backend, faults)
        return first, then.on_rank(then_plan, group.rank, group, strategy, backend, check=True)

    results = run_loopback(program, cp_size, timeout=20)
    check_partly_failed(case, plan, strategy, [first for first, _ in results])
    then.check([second for _, second in results], then_plan, strategy, backend)


def refusal(heads: tuple[int, int] = (4, 2), cache: str = "packed", cp_size: int = 2, cached: int | None = None, **options: Any) -> str:
    """What a rank raises before anything is sent: nobody else is there."""
    case = AttentionCase([(8, 12)], *heads, cache=cache, **options)
    plan = case.plan(cp_size)
    if cached is None:
        kv_cache = case.packed(plan, 0) if cache.endswith("packed") else case.pages(plan, 0).cache
    else:
        kv_cache = cpattn.PackedKV(*torch.zeros(2, 8, cached, 16))
    group = cpattn.LoopbackGroup(cp_size, timeout=1).transport(0)
    meta = plan.metadata(0)
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    with pytest.raises(cpattn.CPError) as raised:
        cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=kv_cache, strategy="ulysses")
    assert group.state.failure is None
    return str(raised.value)


def test_what_is_refused_says_why() -> None:
    few = "4 query heads cannot be divided among {} ranks; {}"
    assert few.format(6, "divide them among 3: cpattn.hybrid(3)") in refusal(cp_size=6)
    assert few.format(5, "cp_size=5 has no divisor for cpattn.hybrid that is as small; pass a strategy that divides no") in refusal(
        cp_size=5
    )
    few = few.replace("4 query", "2 query")
    assert few.format(4, "divide them among 2: cpattn.hybrid(2)") in refusal((2, 2), cp_size=4, cached=1)
    assert few.format(5, "cp_size=5 has no divisor") in refusal((2, 2), cp_size=5, cached=1)
    assert "pass a strategy that divides no heads, and a cache of all KV heads" in refusal((2, 2), cp_size=5, cached=1)
    assert "pages of all 2 KV heads want all heads of new tokens, and a rank gets 1 of them" in refusal(cache="paged")
    assert "a sharded cache has all heads of some; keep each rank's KV heads of all tokens" in refusal(cache="sharded")
    assert "a sharded cache has all heads of some" in refusal(cache="striped")
    assert "must be the same, or the heads those of this rank, which are 2" in refusal((8, 4), cached=3)
    assert "must be the same, or the heads those of this rank, which are 2" in refusal((8, 4), cached=1)


def test_a_cache_of_own_heads_is_for_those_who_divide_them() -> None:
    meta, x = cpattn.build_metadata([(8, 12)], 2, 0), torch.zeros(6, 4, 8)
    cache = cpattn.PackedKV(*torch.zeros(2, 8, 2, 8))
    group = cpattn.LoopbackGroup(2, timeout=1).transport(0)
    for strategy in ("auto", "ring"):
        with pytest.raises(cpattn.TensorMismatchError, match=r"must be the same \(a cache of a rank's own heads is for .* 'ulysses'\)"):
            cpattn.cp_attention(x, x, x, meta, group=group, kv_cache=cache, strategy=strategy)
    both = cpattn.PackedKV(cache.k, torch.zeros(8, 4, 8))
    with pytest.raises(cpattn.HeadCountError, match=r"kv_cache\.k has 2 heads, kv_cache\.v has 4; they must have the same"):
        cpattn.cp_attention(x, x, x, meta, group=group, kv_cache=both, strategy="ulysses")


def test_hybrids_are_made_once_and_say_what_they_are() -> None:
    strategy = cpattn.hybrid(2, "all_gather")
    assert strategy is cpattn.hybrid(within=np.int64(2), across="all_gather")
    assert pickle.loads(pickle.dumps(strategy)) is strategy
    assert repr(strategy) == strategy.name == "hybrid(2, 'all_gather')"
    with pytest.raises(cpattn.OptionError, match="within=0; pass the ranks of a group that divides heads"):
        cpattn.hybrid(0)
    with pytest.raises(cpattn.UnknownNameError, match="across='pass_q' is unknown; choose one of 'ring', 'all_gather'"):
        cpattn.hybrid(2, "pass_q")


def test_a_window_over_a_hybrid_ring_in_a_bucket_is_refused() -> None:
    """Whatever cuts the batch: a group has as many chunks of a request as its ranks' leave when they are joined."""
    case = AttentionCase([(0, 12)], window=5)
    plan = case.plan(4)
    problem = replace(case.problem(plan), fixed=True)
    said = "a ring across groups takes a launch for each chunk that a group has of a request; those change in number from batch to batch"
    assert said in str(cpattn.hybrid(2).why_not(problem, plan))
    assert cpattn.hybrid(2, "all_gather").why_not(problem, plan) is None
    assert cpattn.hybrid(4).why_not(problem, plan) is None


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (4, {}, "it has groups of 4 ranks, and cp_size=6 is no multiple of that"),
        (3, {"heads": 2}, "2 query heads cannot be divided among 3 ranks"),
        (2, {"cache": "sharded"}, "a sharded cache has all heads of some"),
    ],
)
def test_hybrids_that_cannot_serve(size: int, options: dict[str, Any], message: str) -> None:
    case = AttentionCase([(8, 12)], **options)
    plan = case.plan(6)
    reason = cpattn.hybrid(size).why_not(case.problem(plan), plan)
    assert reason is not None
    assert message in reason


@pytest.mark.parametrize("across", ["ring", "all_gather"])
@pytest.mark.parametrize("within", [1, 2, 3, 6])
@pytest.mark.parametrize("heads", [(6, 6), (12, 2), (7, 7)], ids=str)
def test_bytes_are_those_of_the_schedule_and_keys_cross_once(within: int, across: str, heads: tuple[int, int]) -> None:
    """Any factorisation; across groups each rank sends its heads of its group's rows, to each other group once."""
    case = AttentionCase([(0, 131), (0, 57), (0, 3)], *heads)
    plan = case.plan(6, pad_to=4)
    strategy = cpattn.hybrid(within, across)
    schedule = strategy.schedule(case.problem(plan), plan)
    assert sum(int(hop_pairs(plan, hop).sum()) for hop in schedule) == sum(plan.rank_pairs)
    sent_across = {}

    def program(group: cpattn.Transport) -> None:
        meta = plan.metadata(group.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        starts: list[Transfer] = []
        start = group.start
        group.start = lambda transfer: starts.append(transfer) or start(transfer)  # type: ignore[func-returns-value, method-assign]
        before = group.bytes_sent
        cpattn.cp_attention(q, k, v, meta, group=group, strategy=strategy, backend="reference")
        assert group.bytes_sent - before == bytes_sent(schedule)[group.rank]
        sent_across[group.rank] = sum(transfer.nbytes for transfer in starts if _crosses(transfer, group, within))

    run_loopback(program, 6)
    if within in (1, 6):
        assert not any(sent_across.values()) or within == 1
        return
    groups = 6 // within
    for group in range(groups):
        crossed = sum(sent_across[rank] for rank in range(group * within, (group + 1) * within))
        # K and V of fp32, of the rows of a group, which are as many on each.
        largest = max(united_layout(plan, within).rank_tokens)
        once = largest * heads[1] * (16 + 16) * 4 * (groups - 1)
        assert crossed <= once * max(1, within / heads[1])
        if across == "ring":
            assert crossed == once * max(1, within / heads[1])


def _crosses(transfer: Transfer, group: cpattn.Transport, within: int) -> bool:
    ranks = transfer.part or range(group.size)
    return len({rank // within for rank in ranks}) > 1


def test_a_transport_that_cannot_be_split_is_refused_before_anything_is_sent() -> None:
    class Whole(cpattn.testing.SoloCommunicator):
        def _make_part(self, ranks: tuple[int, ...]) -> cpattn.Transport:
            raise cpattn.UnsupportedError("it has no parts")

    meta, x = cpattn.build_metadata([(0, 16)], 4, 0), torch.zeros(4, 2, 8)
    group = Whole(0, 4)
    with pytest.raises(cpattn.UnsupportedError, match=r"hybrid\(2, 'ring'\).*cannot go over Whole\(rank 0 of 4\): it has no parts"):
        cpattn.cp_attention(x, x, x, meta, group=group, strategy=cpattn.hybrid(2))
    assert group.bytes_sent == 0
    assert group.state.failure is None
    # All ranks by themselves need no parts.
    assert cpattn.cp_attention(x, x, x, cpattn.build_metadata([(0, 8)], 2, 0), group=Whole(0, 2), strategy="ulysses").shape == (4, 2, 8)


@pytest.mark.parametrize(
    ("heads", "cp_size", "strategy", "said"),
    [
        ((8, 2), 4, "ulysses", "divided among 4 ranks: 2 of 8 with 1 of 2 KV"),
        (
            (8, 4),
            3,
            "ulysses",
            "divided among 3 ranks: 2 of 8 with 1 of 4 KV or 4 of 8 with 2 of 4 KV; uneven, the busiest has 1.50 times the mean",
        ),
        ((8, 2), 4, cpattn.hybrid(2), "divided among 2 ranks: 4 of 8 with 1 of 2 KV; 2 such groups, all over collectives"),
    ],
    ids=["even", "uneven", "hybrid"],
)
def test_who_has_how_many_heads_is_explained(heads: tuple[int, int], cp_size: int, strategy: Any, said: str) -> None:
    meta = cpattn.build_metadata([(0, 12)], cp_size, 0)
    q, k = torch.zeros(meta.rows, heads[0], 8), torch.zeros(meta.rows, heads[1], 8)
    assert cpattn.explain(q, k, k, meta, strategy=strategy)["heads"].endswith(said)


def test_auto_divides_heads_over_links_so_slow_that_bytes_decide() -> None:
    """A request cut among all ranks: each row goes to them once, and not to each of them."""
    links = replace(H100.collectives, gather=1e3, shift=1e3, shift_of_many=None)
    slow = replace(H100, kernels=H100.kernels[:1], collectives=links)
    case = AttentionCase([(0, 40), (0, 9), (0, 64)], heads=8, kv_heads=8, head_dim=16)
    plan = case.plan(4)

    def program(group: cpattn.Transport) -> tuple[Any, list[int]]:
        group.machine = slow
        outputs, sent = [], [group.bytes_sent]
        for strategy in ("auto", "ulysses", "all_gather"):
            outputs.append(case.on_rank(plan, group.rank, group, strategy, "reference"))
            sent.append(group.bytes_sent)
        return outputs[0], np.diff(sent).tolist()

    outputs, sent = zip(*run_loopback(program, 4), strict=True)
    case.check(list(outputs), plan, "ulysses", "reference")
    for by_auto, by_heads, all_keys in sent:
        assert by_auto == by_heads < all_keys
