"""Which keys travel before the attention: those that a rank's queries see and that it does not hold, and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import AttentionCase
from inputs.own_partitions import OwnPartition
from inputs.strategies import Batch, any_plan_options, batches
from torch import Tensor

import cpattn
from cpattn.device_tables import IntArray
from cpattn.exchange import traveling_keys as traveling
from cpattn.exchange.auto import AUTO_GATHER_LIMIT, candidate_strategies
from cpattn.exchange.key_order import Ordered, key_order
from cpattn.exchange.seen_keys import exchanged_rows
from cpattn.metadata import needed_keys
from cpattn.metadata.needed_keys import View, lacking_rows
from cpattn.testing import run_loopback

# One request that is cut among all ranks, beside some that are short.
MIXED = [(3, 90), (0, 5), (7, 0), (40, 9), (0, 6), (0, 13), (21, 1), (0, 8)]


def needed_by_brute_force(plan: cpattn.Plan, window: int | None) -> IntArray:
    """``[cp_size, cp_size]`` how many new tokens of one rank another one's queries see, token by token."""
    needed: dict[tuple[int, int], set[tuple[int, int]]] = {}
    owner = {(chunk.request, chunk.start + i): chunk.rank for chunk in plan.chunks for i in range(chunk.length)}
    for (request, query), rank in owner.items():
        for key in range(0 if window is None else max(0, query - window + 1), query + 1):
            needed.setdefault((owner[request, key], rank), set()).add((request, key))
    counts = np.zeros((plan.cp_size, plan.cp_size), dtype=np.int64)
    for (source, rank), keys in needed.items():
        counts[source, rank] = 0 if source == rank else len(keys)
    return counts


@given(batch=batches(max_requests=6, max_extend=40), options=any_plan_options(), window=st.none() | st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_brute_force(batch: Batch, options: dict[str, Any], window: int | None) -> None:
    plan = cpattn.plan(batch, **options)
    expected = needed_by_brute_force(plan, window)
    lacking = lacking_rows(plan, window)
    assert (lacking.sent == expected.sum(axis=1)).all()
    assert (lacking.received == expected.sum(axis=0)).all()
    prefix, new = View.of(plan)
    for rank in range(plan.cp_size):
        meta = plan.metadata(rank)
        exchanged, order = exchanged_rows(meta, window), key_order(meta, Ordered.SEEN)
        assert exchanged.sent == tuple(expected[rank])
        assert exchanged.received == tuple(expected[:, rank])
        # Of its own and of those that it receives, each has one place.
        assert sorted(exchanged.source[exchanged.source >= 0].tolist()) == list(range(meta.num_tokens + sum(exchanged.received)))
        assert order.rows == prefix[rank] + new[rank]
        if order.new_places is not None and order.prefix_places is not None:
            places = torch.cat([order.new_places, order.prefix_places])
            assert sorted(places.tolist()) == list(range(order.rows))


PLANS = {
    "whole": lambda case: case.plan(3, partition="whole", pad_to=4),
    "zigzag": lambda case: case.plan(3, pad_to=2),
    "own": lambda case: case.plan(4, partition=OwnPartition(3)),
}


@pytest.mark.parametrize("window", [None, 1, 12])
@pytest.mark.parametrize("partition", PLANS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bits_and_bytes(partition: str, window: int | None, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows travel a result has the bits that it has over all keys, as pages hold them; and exact messages are as brute
    force says."""
    if backend == "cpu" and window is not None:
        return  # it has no window
    cases = {cache: AttentionCase(MIXED, cache=cache, window=window, overlap=2, page_size=5, sinks=True) for cache in ("packed", "paged")}
    plan = PLANS[partition](cases["packed"])
    needed = needed_by_brute_force(plan, window)

    def attend(group: cpattn.Communicator, cache: str) -> tuple[tuple[Tensor, Tensor], int]:
        meta, case, before = plan.metadata(group.rank), cases[cache], group.bytes_sent
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        kv_cache = case.prefix if cache == "packed" else case.pages(plan, group.rank).cache
        result = cpattn.cp_attention(
            q,
            k,
            v,
            meta,
            group=group,
            kv_cache=kv_cache,
            strategy="all_gather",
            backend=backend,
            return_lse=True,
            overlap=2,
            **case.options,
        )  # type: ignore[call-overload]
        return result, group.bytes_sent - before

    baseline = [result for result, _ in run_loopback(lambda group: attend(group, "paged"), plan.cp_size)]
    for most, what in ((1.0, "needed"), (0.0, "all")):
        monkeypatch.setattr(needed_keys, "MOST_NEEDED", most)
        plan.memo.clear()
        if not needed.any():
            what = "nothing"
        problem = cases["packed"].problem(plan)
        assert traveling.traveling_keys(problem, plan).what == what
        for rank, ((out, lse), sent) in enumerate(run_loopback(lambda group: attend(group, "packed"), plan.cp_size)):
            assert torch.equal(out, baseline[rank][0])
            assert torch.equal(lse, baseline[rank][1])
            rows = (plan.cp_size - 1) * plan.rows if what == "all" else needed[rank].sum()
            assert sent == rows * problem.key_bytes


def test_nothing_is_started_where_nobody_needs_anything() -> None:
    """Whatever the cache is; pages that every rank holds whole want all keys all the same, beside the attention."""
    batch = [(5, 12)] * 3
    plan = cpattn.plan(batch, 3, partition="whole")
    assert not needed_by_brute_force(plan, None).any()

    def transfers(group: cpattn.Communicator, case: AttentionCase) -> int:
        meta = plan.metadata(group.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        kv_cache = case.prefix if case.cache == "packed" else case.pages(plan, group.rank).cache
        call = cpattn.prepare(q, k, v, meta, group=group, kv_cache=kv_cache, strategy="all_gather", backend="reference")
        return len(call.transfers())

    assert run_loopback(lambda group: transfers(group, AttentionCase(batch)), 3) == [0, 0, 0]
    assert run_loopback(lambda group: transfers(group, AttentionCase(batch, cache="paged")), 3) == [1, 1, 1]


def explained(plan: cpattn.Plan, bucket: cpattn.Bucket | None = None, cache: Any = None, window: int | None = None) -> str:
    meta = plan.metadata(0, bucket=bucket)
    q, k = torch.zeros(meta.rows, 4, 16), torch.zeros(meta.rows, 2, 16)
    return cpattn.explain(q, k, k, meta, kv_cache=cache, window=window, strategy="all_gather")["keys"]


def test_what_travels_is_explained() -> None:
    long, mixed = cpattn.plan([(0, 64)], 4), cpattn.plan([(0, 64), *[(0, 64)] * 9, (0, 32)], 4, partition="whole")
    assert explained(cpattn.plan([(0, 9)], 1)) == "none travel: there is one rank"
    assert explained(cpattn.plan([(0, 8)] * 4, 4, partition="whole")) == "none travel: each rank holds all that its queries see"
    assert explained(long) == (
        "a rank receives all of them, 12.0 KiB, of which its queries see at most 12.0 KiB: the busiest rank receives or sends 100% of all, "
        "which is above 67%"
    )
    assert "a rank receives those that its queries see, " in explained(mixed)
    bucket = cpattn.Bucket(16, 256, 32)
    assert "of which its queries see " in explained(mixed, bucket)
    assert explained(mixed, bucket).endswith(
        "over collectives a bucket's messages are of its size, whatever batch it holds; through the memory of peers a rank reads before "
        "the attention what its queries see"
    )
    pages = torch.zeros(60, 16, 2, 16)
    cache = cpattn.PagedKV(pages, pages.clone(), torch.arange(55, dtype=torch.int32).view(11, 5))
    assert ", at most 14.0 KiB of 126.0 KiB before the attention, and at most " in explained(mixed, cache=cache)
    assert explained(cpattn.plan([(0, 8)] * 4, 4, partition="whole"), cache=cache) == (
        "none travel before the attention, and all of them, 6.0 KiB, beside it or after it, as every rank's pages hold all: each rank "
        "holds all that its queries see; attended to as they lie, and written to the pages after that"
    )
    assert explained(long, cache=cache).endswith("which is above 67%; attended to in order, and written to the pages after that")
    # Cached keys lie in pages alone.
    assert explained(cpattn.plan([(3, 64), (0, 1)], 4), cache=cache).endswith("which is above 67%")


def test_own_rows_that_do_not_follow_each_other_are_explained_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing travels for queries that see themselves alone, however a request is cut."""
    monkeypatch.setattr("cpattn.call.choose.is_order_faster", lambda *arguments: True)
    pages = torch.zeros(60, 16, 2, 16)
    cache = cpattn.PagedKV(pages, pages.clone(), torch.arange(20, dtype=torch.int32).view(4, 5))
    for batch, lie in (([(0, 64)], "in order"), ([(0, 8)] * 4, "as they lie")):
        found = explained(cpattn.plan(batch, 4, partition="whole"), cache=cache, window=1)
        assert found.endswith(f"each rank holds all that its queries see; attended to {lie}, and written to the pages after that")


def test_a_rank_is_taken_to_hold_what_its_queries_see() -> None:
    """Where requests are whole, more fits than all ranks' keys together could."""
    length = 2 * AUTO_GATHER_LIMIT // (3 * 2 * 2 * 16 * 4)
    case = AttentionCase([(0, 1)])  # of those sizes, but for the batch
    zigzag, whole = (cpattn.plan([(0, length)] * 2, 2, partition=partition) for partition in ("zigzag", "whole"))
    assert candidate_strategies("auto", case.problem(zigzag), zigzag)[0][0].name == "ring"
    assert candidate_strategies("auto", case.problem(whole), whole)[0][0].name == "all_gather"


def test_the_choice_is_by_the_rank_that_receives_or_sends_the_most() -> None:
    """The last rank of a contiguous cut receives all, and the first one sends to all."""
    case = AttentionCase([(0, 40), (0, 40)])
    contiguous = cpattn.plan(case.batch, 2, partition="contiguous")
    assert lacking_rows(contiguous, None).received.tolist() == [0, 40]
    assert traveling.traveling_keys(case.problem(contiguous), contiguous).what == "all"
    # Of a window's keys few are needed, however the request is cut.
    case.window = 8
    assert traveling.traveling_keys(case.problem(contiguous), contiguous).what == "needed"
