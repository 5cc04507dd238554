"""Of latents those are expanded that a launch's queries see, and no others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.latent_cases import LatentCase
from inputs.strategies import Batch, any_plan_options, batches
from torch import Tensor

import cpattn
from cpattn.attention.seen_rows import SeenRows
from cpattn.costs.steps.tally import latents_of
from cpattn.device_tables import IntArray
from cpattn.exchange.registry import find_strategy
from cpattn.metadata.needed_keys import View
from cpattn.spans import Spans
from cpattn.testing import run_loopback

BATCH = [(0, 19), (35, 6), (9, 0), (23, 1)]


def seen_by_query(spans: Spans, window: int | None, rows: IntArray) -> list[set[int]]:
    """Of each query which rows of keys, as the definition of spans has it; ``rows`` are the names of those that are at hand."""
    host, seen = spans.host, []
    for q_len, k_start, k_len, diagonal in zip(host.q_len, host.k_start, host.k_len, host.diagonal, strict=True):
        for j in range(q_len):
            low = 0 if window is None else max(0, diagonal + j - window)
            seen.append({int(rows[k_start + key]) for key in range(low, min(max(diagonal + j, 0), k_len))})
    return seen


@given(st.data(), st.none() | st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_a_launch_over_seen_rows_is_the_same_launch(data: st.DataObject, window: int | None) -> None:
    num_keys = data.draw(st.integers(1, 24))
    table = []
    for _ in range(data.draw(st.integers(0, 5))):
        k_start = data.draw(st.integers(0, num_keys))
        k_len = data.draw(st.integers(0, num_keys - k_start))
        table.append((data.draw(st.integers(0, 6)), k_start, k_len, data.draw(st.integers(-3, k_len + 6))))
    spans = Spans.build(*np.array(table, dtype=np.int64).reshape(-1, 4).T)
    seen = SeenRows.of(spans, window, num_keys)
    before = seen_by_query(spans, window, np.arange(num_keys))
    names = seen.take(torch.arange(num_keys)).numpy()
    assert set(names) == set().union(*before)
    assert (np.diff(names) > 0).all()
    assert seen_by_query(seen.spans, window, names) == before
    assert seen.spans.alignment in (spans.alignment, "any") or not len(names)


def seen_tokens(plan: cpattn.Plan, window: int | None, rank: int) -> IntArray:
    """How many cached and new tokens a rank's queries see, token by token."""
    seen: set[tuple[int, int]] = set()
    for chunk in plan.chunks:
        prefix = plan.batch[chunk.request][0]
        for query in range(prefix + chunk.start, prefix + chunk.start + chunk.length) if chunk.rank == rank else ():
            seen |= {(chunk.request, key) for key in range(0 if window is None else max(0, query - window + 1), query + 1)}
    cached = sum(position < plan.batch[request][0] for request, position in seen)
    return np.array([cached, len(seen) - cached])


@given(batch=batches(max_requests=5, max_extend=30), options=any_plan_options(), window=st.none() | st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_what_is_in_view_through_a_window(batch: Batch, options: dict[str, Any], window: int | None) -> None:
    plan = cpattn.plan(batch, **options)
    expected = [seen_tokens(plan, window, rank) for rank in range(plan.cp_size)]
    assert np.array_equal(np.stack(View.of(plan, window), axis=1), expected)


class Counting:
    """An ``expand=`` that counts the rows that it is given, of each head once."""

    def __init__(self, case: LatentCase) -> None:
        self.rows, self.case, self.expand = 0, case, case.expand

    def __call__(self, latent: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        self.rows += len(latent) if heads.start == 0 else 0
        k, v = self.expand(latent, heads)
        return k, v


@pytest.mark.parametrize("window", [1, 7, 30])
@pytest.mark.parametrize(
    ("strategy", "cache", "cp_size"),
    [
        ("all_gather", "packed", 1),
        ("all_gather", "paged", 3),
        (cpattn.two_level(2), "packed", 4),
        ("ring", "paged", 3),
        ("ring", "packed", 2),
    ],
    ids=str,
)
def test_what_no_window_reaches_is_not_expanded(strategy: Any, cache: str, cp_size: int, window: int) -> None:
    """To the row: in a ring each key is of one hop. The result is the oracle's."""
    case = LatentCase(BATCH, cache=cache, window=window, sinks=window == 7)
    plan = case.plan(cp_size)
    counts = [Counting(case) for _ in range(cp_size)]

    def program(group: cpattn.Transport) -> tuple[Tensor, Tensor]:
        mine = replace(case)
        mine.options = case.options | {"expand": counts[group.rank]}
        return mine.on_rank(plan, group.rank, group, strategy, "reference")

    case.check(run_loopback(program, cp_size), plan, strategy, "reference")
    assert [count.rows for count in counts] == [seen_tokens(plan, window, rank).sum() for rank in range(cp_size)]
    if strategy != "ring":
        # As estimates and explain have it.
        (hop,) = find_strategy(strategy).schedule(case.problem(plan), plan)
        assert latents_of(plan, case.problem(plan), hop) == max(count.rows for count in counts)


@pytest.mark.parametrize("strategy", ["all_gather", "pass_q"])
@pytest.mark.parametrize("cache", ["striped", "ranked"])
def test_over_shards(strategy: str, cache: str) -> None:
    """What travels there is what windows reach, of all requests: a rank expands what its own queries, or those of others, see of it."""
    case = LatentCase(BATCH, cache=cache, window=5)
    plan = case.plan(3)
    counts = [Counting(case) for _ in range(3)]

    def program(group: cpattn.Transport) -> tuple[Tensor, Tensor]:
        mine = replace(case)
        mine.options = case.options | {"expand": counts[group.rank]}
        return mine.on_rank(plan, group.rank, group, strategy, "reference")

    case.check(run_loopback(program, 3), plan, strategy, "reference")
    if strategy == "all_gather":
        assert [count.rows for count in counts] == [seen_tokens(plan, 5, rank).sum() for rank in range(3)]


def test_queries_that_see_nothing_expand_nothing() -> None:
    """A rank whose requests have nothing cached expands no prefix of others, and one without a query nothing at all."""
    case = LatentCase([(50, 4), (0, 6)], cache="packed")
    plan = case.plan(3, partition="uncut")
    counts = [Counting(case) for _ in range(3)]

    def program(group: cpattn.Transport) -> tuple[Tensor, Tensor]:
        mine = replace(case)
        mine.options = case.options | {"expand": counts[group.rank]}
        return mine.on_rank(plan, group.rank, group, "ring", "cpu")

    case.check(run_loopback(program, 3), plan, "ring", "cpu")
    assert sorted(count.rows for count in counts) == [0, 6, 54]


def test_fp8_pages_through_a_window() -> None:
    """What is expanded are stored latents times their scales, which lie beside them."""
    case = LatentCase([(0, 40)], window=6)
    plan = case.plan(2)

    def program(group: Any) -> tuple[Tensor, Tensor, int]:
        meta, count = plan.metadata(group.rank), Counting(case)
        pages = torch.zeros(8, 16, 1, case.latent_dim, dtype=torch.float8_e4m3fn)
        cache = cpattn.PagedKV(pages, None, torch.tensor([[5, 2, 7]]), k_scale=torch.full((8, 16, 1), torch.nan))
        q, latent = cpattn.shard(case.q, meta), cpattn.shard(case.k, meta)
        out = cpattn.cp_attention(q, latent, None, meta, group=group, v_dim=12, kv_cache=cache, window=6, expand=count)
        assert cache.k_scale is not None
        stored = (pages.float() * cache.k_scale[..., None])[[5, 2, 7]].flatten(0, 1)[:40]
        return cpattn.unshard(out, meta, group=group), stored, count.rows

    for rank, (out, stored, rows) in enumerate(run_loopback(program, 2)):
        case.k = stored
        case.__dict__.pop("expected", None)
        torch.testing.assert_close(out.double(), case.expected[0], rtol=1e-4, atol=1e-5)
        assert rows == seen_tokens(plan, 6, rank).sum() < 40


def test_a_bucket_expands_all_of_its_rows() -> None:
    """Its graph cannot change in size."""
    case = LatentCase([(0, 19), (0, 6)], window=4)
    plan, count = case.plan(1), Counting(case)
    meta = plan.metadata(0, bucket=cpattn.Bucket(max_requests=4, max_rows=plan.rows + 3, max_chunks=8))
    mine = replace(case)
    mine.options = case.options | {"expand": count}
    case.check([mine.on_rank(plan, 0, None, "all_gather", "reference", meta=meta)], plan, "all_gather", "reference")
    assert count.rows == plan.rows + 3
