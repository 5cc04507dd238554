"""Where tokens lie, in the gathered buffer, in pages and among the keys, against their definition in plain loops."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.paged_caches import random_shards
from inputs.strategies import Batch, any_plan_options, batches
from torch import Tensor

import cpattn
from cpattn import CPMetadata, Plan

BUCKET = cpattn.Bucket(max_requests=20, max_rows=700, max_chunks=160)


def pairs(places: tuple[Tensor, Tensor]) -> list[tuple[int, int]]:
    request, number = places
    assert request.dtype == number.dtype == torch.int32
    return list(zip(request.tolist(), number.tolist(), strict=True))


def rank_places(plan: Plan, rank: int) -> list[tuple[int, int]]:
    """(request, absolute position) of each of the rank's tokens, in local order."""
    return [(c.request, plan.batch[c.request].prefix_len + c.start + i) for c in plan.chunks if c.rank == rank for i in range(c.length)]


def held_by(plan: Plan, rank: int) -> list[tuple[int, int]]:
    """(request, number among what the rank holds of it) of each of the rank's new tokens, in local order."""
    numbers = [0 if plan.prefix_shards is None else shares[rank] for shares in plan.prefix_shards or [[0] * plan.cp_size] * len(plan.batch)]
    held = []
    for request, _ in rank_places(plan, rank):
        held.append((request, numbers[request]))
        numbers[request] += 1
    return held


def filled(places: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    return places + [(-1, -1)] * (length - len(places))


def check(meta: CPMetadata) -> None:
    plan = meta.plan
    gathered = [place for rank in range(plan.cp_size) for place in filled(rank_places(plan, rank), meta.rows)]
    assert pairs(meta.gathered_places) == gathered
    assert pairs(meta.held_places) == filled(held_by(plan, meta.cp_rank), meta.rows)
    if meta.bucket is not None:
        return
    assert pairs(meta.key_places) == [(i, p) for i, request in enumerate(plan.batch) for p in range(sum(request))]
    assert pairs(meta.prefix_places) == [(i, p) for i, request in enumerate(plan.batch) for p in range(request.prefix_len)]
    held = (plan.shard_lens + plan.rank_extends)[:, meta.cp_rank].tolist()
    assert pairs(meta.shard_places) == filled([(i, n) for i, count in enumerate(held) for n in range(count)], plan.largest_shard)


@given(
    batch=batches(max_requests=6, max_prefix=40, max_extend=40), options=any_plan_options(), sharded=st.booleans(), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_places(batch: Batch, options: dict[str, Any], sharded: bool, seed: int) -> None:
    plan = cpattn.plan(batch, **options, prefix_shards=random_shards(batch, options["cp_size"], seed) if sharded else None)
    for rank in range(plan.cp_size):
        check(plan.metadata(rank))
        check(plan.metadata(rank, bucket=BUCKET))


@given(
    first=batches(max_requests=6, max_prefix=40, max_extend=40),
    second=batches(max_requests=6, max_prefix=40, max_extend=40),
    options=any_plan_options(),
    sharded=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_places_of_a_batch_copied_into_a_bucket(first: Batch, second: Batch, options: dict[str, Any], sharded: bool) -> None:
    plans = [
        cpattn.plan(batch, **options, prefix_shards=random_shards(batch, options["cp_size"], 5) if sharded else None)
        for batch in (first, second)
    ]
    for rank in range(plans[0].cp_size):
        meta = plans[0].metadata(rank, bucket=BUCKET)
        check(meta)
        before = [x.data_ptr() for x in (*meta.gathered_places, *meta.held_places)]
        meta.copy_(plans[1].metadata(0))
        check(meta)
        assert [x.data_ptr() for x in (*meta.gathered_places, *meta.held_places)] == before
