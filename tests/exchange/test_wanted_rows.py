"""Keys that travel over a sharded cache before the attention, with a window or where nothing is cached: those that a rank's queries see or
that it is to hold, and that it does not have."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import AttentionCase
from inputs.own_partitions import OwnPartition
from inputs.strategies import Batch, batches
from references.needed_by_hand import wanted_over_shards
from torch import Tensor

import cpattn
from cpattn.exchange.schedule import bytes_sent
from cpattn.exchange.traveling_over_shards import rows_brought, traveling_over_shards
from cpattn.metadata import needed_keys, wanted_keys
from cpattn.metadata.wanted_keys import WantedKeys, seen_by_chunks
from cpattn.testing import run_loopback

MIXED = [(3, 60), (0, 5), (7, 0), (20, 9), (0, 6), (0, 13), (21, 1), (0, 8)]
WITHOUT_PREFIX = [(0, extend) for _, extend in MIXED]
# Strategy, cache, window and batch.
CALLS = [
    ("all_gather", "striped", 9, MIXED),
    ("all_gather", "ranked", 9, MIXED),
    ("all_gather", "ranked", 1, MIXED),
    ("pass_q", "striped", None, WITHOUT_PREFIX),
    ("pass_q", "ranked", 9, WITHOUT_PREFIX),
]
PARTITIONS: list[Any] = ["zigzag", "contiguous", "whole", "uncut", OwnPartition(3)]


def case_of(cache: str, window: int | None, batch: Batch, **options: Any) -> AttentionCase:
    return AttentionCase(batch, cache=cache, window=window, page_size=5, interleave=2, **options)


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@pytest.mark.parametrize(("strategy", "cache", "window", "batch"), CALLS)
def test_bits_and_bytes(
    strategy: str, cache: str, window: int | None, batch: Batch, partition: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limit out of the way, above which all of them go to all; and with all of them."""
    case = case_of(cache, window, batch, v_head_dim=8)
    results: list[list[tuple[Tensor, Tensor]]] = []
    for most in (1.0, -1.0):
        monkeypatch.setattr(needed_keys, "MOST_NEEDED", most)
        plan = case.plan(3, partition=partition, pad_to=4)
        problem = case.problem(plan)

        def program(group: cpattn.Transport, plan: cpattn.Plan = plan) -> tuple[tuple[Tensor, Tensor], int]:
            meta, before = plan.metadata(group.rank), group.bytes_sent
            q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
            cp_cache = case.pages(plan, group.rank)
            options: dict[str, Any] = {"strategy": strategy, "backend": "reference", "window": window, "return_lse": True}
            out = cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=cp_cache.cache, **options)
            cp_cache.check_written()
            return out, group.bytes_sent - before

        outputs, sent = zip(*run_loopback(program, 3), strict=True)
        results.append(list(outputs))
        assert list(sent) == bytes_sent(cpattn.STRATEGIES[strategy].schedule(problem, plan)).tolist()
        wanted = wanted_over_shards(plan, window)
        if most > 0:
            assert sum(sent) == sum(wanted) * problem.key_bytes
            found = WantedKeys.of(plan, window)
            assert found.lacking().received.tolist() == wanted
        else:
            assert sum(sent) >= sum(wanted) * problem.key_bytes
    for one, other in zip(*results, strict=True):
        assert all(map(torch.equal, one, other))


@given(
    batch=batches(max_requests=6, max_extend=40), cp_size=st.integers(2, 7), window=st.none() | st.integers(1, 60),
    partition=st.sampled_from(["zigzag", "whole", "uncut", OwnPartition(5)]), striped=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_rows_are_those_of_brute_force(batch: Batch, cp_size: int, window: int | None, partition: Any, striped: bool) -> None:
    if window is None:
        batch, striped = [(0, extend) for _, extend in batch], True
    plan = case_of("striped" if striped else "ranked", window, batch).plan(cp_size, partition=partition)
    found = WantedKeys.of(plan, window)
    assert found.lacking().received.tolist() == wanted_over_shards(plan, window)
    sent = [[len(found.sent_to(source, rank)) for rank in range(cp_size)] for source in range(cp_size)]
    assert np.sum(sent, axis=1).tolist() == found.lacking().sent.tolist()
    seen, wanted = seen_by_chunks(plan, window), found.lacking()
    assert (seen.received <= wanted.received).all()
    assert (seen.sent <= wanted.sent).all()
    assert seen.received.sum() == seen.sent.sum()
    for rank, used in enumerate(found.used):
        placed = found.placed(plan, window, rank)
        assert len(set(placed.tolist())) == len(placed)
        assert set(used.nonzero()[0].tolist()) <= set(placed.tolist())
        # What nobody wants has a place only before what a query sees.
        for token in placed[~used[placed]].tolist():
            assert (used[token:] & (found.request[token:] == found.request[token])).any()


@pytest.mark.parametrize(
    ("cache", "window", "strategy", "sent", "said"),
    [
        ("ranked", 7, "all_gather", 0, "none travel: each rank holds all that its queries see"),
        (
            "striped", None, "pass_q", 3072,
            "none travel: nothing is cached; of keys and values a rank receives those that its queries see or that it is to hold, at most "
            "3.0 KiB of 12.0 KiB: the busiest rank receives or sends 25% of all, within 67%",
        ),
    ],
)  # fmt: skip
def test_whole_requests_need_nothing_but_what_ranks_are_to_hold(
    cache: str, window: int | None, strategy: str, sent: int, said: str
) -> None:
    """Of a cache of computed tokens nothing; of a striped one each rank's part of what the others compute."""
    case = case_of(cache, window, [(0, 16)] * 4)
    plan = case.plan(4, partition="whole")
    meta, pages = plan.metadata(0), case.pages(plan, 0)
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    explained = cpattn.explain(q, k, v, meta, kv_cache=pages.cache, window=window, strategy=strategy)
    assert explained["keys" if strategy == "all_gather" else "queries"] == said
    assert bytes_sent(cpattn.STRATEGIES[strategy].schedule(case.problem(plan), plan)).max() == sent


@pytest.mark.parametrize(("cache", "rows"), [("ranked", 16), ("striped", 16 + 3 * 4)])
def test_what_a_rank_does_not_want_has_no_place_in_its_order(cache: str, rows: int) -> None:
    """Of whole requests it has its own, and its part of the others where it is to hold one."""
    case = case_of(cache, 7, [(0, 16)] * 4)
    plan = case.plan(4, partition="whole")
    found = WantedKeys.of(plan, 7)
    assert [len(found.placed(plan, 7, rank)) for rank in range(4)] == [rows] * 4
    assert traveling_over_shards(case.problem(plan), plan).put == rows


def test_all_of_them_travel_where_there_are_too_many_to_work_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanted_keys, "_MOST_PAIRS", 100)
    case = case_of("ranked", 7, [(0, 16)] * 4)
    plan = case.plan(4, partition="whole")
    meta, pages = plan.metadata(0), case.pages(plan, 0)
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    said = cpattn.explain(q, k, v, meta, kv_cache=pages.cache, window=7, strategy="all_gather")["keys"]
    assert said.endswith(": there are too many ranks and tokens to work out which are needed")
    case.check_loopback(plan, "all_gather", "reference")


@pytest.mark.parametrize(("window", "batch"), [(None, [(0, 64)]), (60, [(80, 8)])])
def test_tokens_are_not_looked_at_one_by_one_where_chunks_want_nearly_all(
    window: int | None, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes a ms, and what ranks are to hold only adds to it. A long window sees mostly cached keys."""
    case = case_of("striped", window, batch)
    plan = case.plan(4)
    problem = case.problem(plan)
    found = WantedKeys.of(plan, window)
    assert found.lacking().is_nearly_all(3 * rows_brought(problem, plan))
    monkeypatch.setattr(WantedKeys, "of", None)
    travels = traveling_over_shards(problem, plan)
    assert travels.what == "all"
    assert re.fullmatch(r"the busiest rank receives or sends (100|at least \d+)% of all, which is above 67%", travels.why)
