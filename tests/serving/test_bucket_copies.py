"""Metadata of a bucket: any batch that fits, copied in, computes what fresh metadata do, at the same addresses."""

from __future__ import annotations

import copy
import gc
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from inputs.cases import AttentionCase
from inputs.own_partitions import OwnPartition
from inputs.strategies import Batch, any_plan_options, batches
from torch import Tensor

import cpattn
from cpattn.call.arguments import Arguments
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.spans import Spans
from cpattn.testing import run_loopback

BUCKET = cpattn.Bucket(max_requests=5, max_rows=40, max_chunks=8, max_seqlen=90)

# What a bucket's graph can replay: pages, or no prefix at all.
EXCHANGES = [
    ("all_gather", "paged"),
    ("all_gather", "none"),
    ("ring", "paged"),
    ("ring", "none"),
    ("pass_q", "none"),
    ("pass_q", "sharded"),
    ("pass_q_ring", "none"),
    ("pass_q_ring", "sharded"),
    ("pass_q", "striped"),
    ("all_gather", "striped"),
    ("pass_q", "ranked"),
    ("all_gather", "ranked"),
]
all_exchanges = pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)


def random_cases(cp_size: int, cache: str, count: int, seed: int, **options: Any) -> tuple[list[AttentionCase], list[cpattn.Plan]]:
    """Batches that fit the bucket, large and small in turn, and their plans."""
    rng = np.random.default_rng(seed)
    cases: list[AttentionCase] = []
    plans: list[cpattn.Plan] = []
    while len(cases) < count:
        requests, longest = (int(rng.integers(0, 6)), [3, 45][len(cases) % 2])
        batch = [(0 if cache == "none" else int(rng.integers(0, longest)), int(rng.integers(0, longest))) for _ in range(requests)]
        case = AttentionCase(
            batch,
            heads=2,
            kv_heads=1,
            head_dim=8,
            cache="packed" if cache == "none" else cache,
            page_size=int(rng.choice([1, 3, 16])),
            seed=seed + len(cases),
            **options,
        )
        plan = case.plan(cp_size, pad_to=int(rng.choice([1, 4])), partition=["zigzag", "whole", "uncut", "contiguous"][len(cases) % 4])
        if plan.fits(BUCKET):
            cases.append(case)
            plans.append(plan)
    return cases, plans


def tensors_in(x: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors of metadata, those of the row tables that a call has derived included."""
    if isinstance(x, Tensor):
        return {name: x}
    if isinstance(x, (tuple, list)):
        parts = {f"{name}[{i}]": part for i, part in enumerate(x)}
    elif isinstance(x, Spans):
        parts = {f"{name}.{field}": getattr(x, field) for field in ("cu_seqlens_q", "k_start_padded", "k_len", "diagonal", "request")}
    elif isinstance(x, CPMetadata):
        derived = {str(key): value for key, (_, value) in x._derived.items()}
        parts = {name: x._tables[name] for name in x._host} | derived
    else:
        raise TypeError(type(x))
    return {inner: tensor for part, value in parts.items() for inner, tensor in tensors_in(value, part).items()}


def assert_same_tables(reused: CPMetadata, fresh: CPMetadata) -> None:
    """To the last number, so that nothing of an earlier batch is left."""
    theirs = tensors_in(fresh)
    for name, tensor in tensors_in(reused).items():
        assert torch.equal(tensor, theirs[name]), name
    for name in ("plan", "rows", "num_tokens", "max_seqlen_q", "max_seqlen_k", "longest_request"):
        assert getattr(reused, name) == getattr(fresh, name), name


@all_exchanges
@pytest.mark.parametrize(
    ("cp_size", "options"),
    [(1, {"window": 7, "softcap": 5.0}), (2, {"sinks": True}), (3, {}), (3, {"window": 7, "softcap": 5.0})],
    ids=["1-window-softcap", "2-sinks", "3-plain", "3-window-softcap"],
)
def test_copied_batches_compute_what_fresh_metadata_do(cp_size: int, strategy: str, cache: str, options: dict[str, Any]) -> None:
    if cache == "sharded" and "window" in options:
        options = {"softcap": 5.0}
    if (strategy, cache) == ("all_gather", "striped") or cache == "ranked":
        # It is for windows alone; and without one the others are those of a sharded cache.
        options = options | {"window": 7}
    cases, plans = random_cases(cp_size, cache, 8, seed=10 * cp_size, dtype=torch.bfloat16, **options)

    def program(communicator: cpattn.Communicator) -> list[tuple[Tensor, Tensor]]:
        reused = plans[0].metadata(communicator.rank, bucket=BUCKET)
        addresses: dict[str, int] = {}
        outputs = []
        for case, plan in zip(cases, plans, strict=True):
            reused.copy_(plan)
            for buffer in communicator.arena.blocks():
                buffer.fill_(255)  # NaN in every floating dtype
            output = case.on_rank(plan, communicator.rank, communicator, strategy, "reference", meta=reused)
            fresh = plan.metadata(communicator.rank, bucket=BUCKET)
            expected = case.on_rank(plan, communicator.rank, communicator, strategy, "reference", meta=fresh)
            assert torch.equal(output[0], expected[0])
            assert torch.equal(output[1], expected[1])
            assert_same_tables(reused, fresh)
            now = {name: tensor.data_ptr() for name, tensor in tensors_in(reused).items()}
            assert addresses.items() <= now.items()
            addresses = now
            outputs.append(output)
        return outputs

    for case, plan, *outputs in zip(cases, plans, *run_loopback(program, cp_size), strict=True):
        case.check(outputs, plan, strategy, "reference")


@given(batch=batches(max_requests=5, max_prefix=60, max_extend=60), options=any_plan_options())
@settings(max_examples=150, deadline=None)
def test_a_plan_fits_where_every_rank_s_metadata_do(batch: Batch, options: dict[str, Any]) -> None:
    plan = cpattn.plan(batch, **options)
    metas = [plan.metadata(rank) for rank in range(plan.cp_size)]
    needs = {
        "max_requests": len(batch),
        "max_rows": plan.rows,
        "max_chunks": max(len(meta.chunk_request) for meta in metas),
        "max_seqlen": max(map(sum, batch), default=0),
    }
    sizes = {name: max(need, 1) for name, need in needs.items()}
    assert plan.fits(cpattn.Bucket(**sizes))
    for name, need in needs.items():
        if need > 1:
            tight = cpattn.Bucket(**sizes | {name: need - 1})
            assert not plan.fits(tight)
            for rank in range(plan.cp_size):
                with pytest.raises(cpattn.PlanError, match=f"{name} is {need - 1}, the plan needs {need}; ask plan.fits"):
                    plan.metadata(rank, bucket=tight)


def test_whoever_asks_may_refuse_a_copy_before_anything_has_changed() -> None:
    meta = cpattn.build_metadata([(0, 6)], 2, 0, bucket=BUCKET)
    asked: list[cpattn.Plan] = []

    def check(plan: cpattn.Plan) -> None:
        asked.append(plan)
        if len(plan.batch) > 1:
            raise cpattn.PlanError("one request at a time")

    meta.on_copy(check)
    meta.on_copy(check)
    other = cpattn.plan([(1, 2)], 2)
    meta.copy_(other)
    assert asked == [other]
    before = meta.plan, meta.token_index.clone()
    with pytest.raises(cpattn.PlanError, match="one request at a time"):
        meta.copy_(cpattn.plan([(0, 3), (0, 4)], 2))
    assert meta.plan == before[0]
    assert torch.equal(meta.token_index, before[1])
    # What does not fit is refused first, and of copies nobody has asked for anything.
    with pytest.raises(cpattn.PlanError, match="does not fit the bucket"):
        meta.copy_(cpattn.plan([(0, 6)] * 6, 2))
    copy.deepcopy(meta).copy_(cpattn.plan([(0, 3), (0, 4)], 2))
    assert len(asked) == 2


def test_who_only_replays_graphs_is_told_that_a_group_was_given_up() -> None:
    """Whatever for: its ranks are out of step, and what one has posted the others would take for a replay's."""
    meta = cpattn.build_metadata([(0, 6)], 1, 0, bucket=BUCKET)
    x, group, whole = torch.ones(meta.rows, 1, 8), cpattn.LoopbackGroup(1).transport(0), meta.plan
    with torch.no_grad():
        cpattn.prepare(x, x, x, meta, group=group)._captured(Arguments(x, x, x))
    meta.copy_(cpattn.plan([(0, 5)], 1))
    group.state.give_up("a call was interrupted")
    with pytest.raises(cpattn.GroupError, match="a call was interrupted"):
        meta.copy_(whole)
    assert meta.plan.extend_lens.tolist() == [5]
    # Of one that is gone nothing is known.
    del group
    meta.memo.clear()
    gc.collect()
    meta.copy_(whole)


def test_a_bucket_s_metadata_as_an_engine_sees_them() -> None:
    bucket = cpattn.Bucket(max_requests=3, max_rows=8, max_chunks=4)
    meta = cpattn.build_metadata([(5, 6), (0, 2)], cp_size=2, cp_rank=0, bucket=bucket)
    assert (meta.rows, meta.num_tokens, meta.token_count.tolist()) == (8, 4, [4])
    assert meta.cu_seqlens_q.tolist() == [0, 2, 3, 4, 4]
    assert meta.k_len.tolist() == [7, 11, 1, 0]
    assert meta.token_index.tolist() == [0, 1, 5, 6, -1, -1, -1, -1]
    assert meta.position_ids.tolist() == [5, 6, 10, 0, 0, 0, 0, 0]
    meta.copy_(cpattn.build_metadata([(3, 1)], cp_size=2, cp_rank=1))
    assert (meta.rows, meta.num_tokens, meta.token_count.tolist()) == (8, 1, [1])
    assert meta.cu_seqlens_q.tolist() == [0, 1, 1, 1, 1]
    assert meta.k_len.tolist() == [4, 0, 0, 0]
    assert meta.token_index.tolist() == [0] + [-1] * 7
    assert meta.position_ids.tolist() == [3] + [0] * 7
    x = torch.randn(1, 3)
    assert torch.equal(cpattn.shard(x, meta), torch.cat([x, torch.zeros(7, 3)]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (cpattn.plan([(0, 4)], 3), "the plan has cp_size=3, this metadata 2; a graph cannot be replayed over another layout"),
        (cpattn.plan([(0, 4)], 2, partition=OwnPartition(0)), "the plan has partition=\"a caller's\", this metadata 'zigzag'"),
        (cpattn.plan([(4, 4)], 2, prefix_shards=[(2, 2)]), "the plan has sharded=True, this metadata False"),
        (cpattn.plan([(0, 100)], 2), "max_rows is 40, the plan needs 50; max_seqlen is 90, the plan needs 100; ask plan.fits"),
        (cpattn.plan([(0, 1)] * 6, 2), "max_requests is 5, the plan needs 6"),
        (cpattn.plan([(0, 4)] * 5, 2), "max_chunks is 8, the plan needs 10"),
        (cpattn.plan([(91, 0)], 2), "max_seqlen is 90, the plan needs 91"),
    ],
    ids=["cp_size", "partition", "sharded", "rows", "requests", "chunks", "seqlen"],
)
def test_a_batch_that_can_not_be_copied_in_changes_nothing(other: cpattn.Plan, message: str) -> None:
    plan = cpattn.plan([(3, 20), (7, 9)], 2)
    for rank in range(2):
        meta = plan.metadata(rank, bucket=BUCKET)
        assert meta.gathered_places
        with pytest.raises(cpattn.PlanError, match=message):
            meta.copy_(other)
        assert re.search(message, meta.why_not(other) or "")
        assert not other.fits(meta)
        assert plan.fits(meta)
        fresh = plan.metadata(rank, bucket=BUCKET)
        assert fresh.gathered_places
        assert_same_tables(meta, fresh)


def test_a_copied_batch_is_checked_anew() -> None:
    """What a call found out about the batch before says nothing about this one."""
    meta = cpattn.plan([(0, 9)], 1).metadata(0, bucket=BUCKET)
    x = torch.zeros(BUCKET.max_rows, 1, 8)
    cpattn.cp_attention(x, x, x, meta)
    meta.copy_(cpattn.plan([(4, 9)], 1))
    with pytest.raises(cpattn.PrefixError, match="the batch has 4 prefix tokens, but kv_cache is None"):
        cpattn.cp_attention(x, x, x, meta)


def test_metadata_without_a_bucket_are_not_copied_into() -> None:
    meta = cpattn.build_metadata([(0, 4)], 2, 0)
    with pytest.raises(cpattn.PlanError, match="this metadata has no bucket, so its sizes are those of its batch"):
        meta.copy_(meta.plan)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, 2**31])
def test_sizes_of_a_bucket_are_positive_integers(size: Any) -> None:
    with pytest.raises(cpattn.PlanError, match=r"max_chunks=.*; it must be an integer from 1 to 2147483647"):
        cpattn.Bucket(1, 1, size)


def test_what_changes_in_size_is_refused() -> None:
    case = AttentionCase([(9, 12)])
    meta = cpattn.plan(case.batch, 2).metadata(0, bucket=BUCKET)
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    group = cpattn.LoopbackGroup(2).communicator(0)
    with pytest.raises(cpattn.PrefixError, match=r"a PackedKV changes in size from batch to batch.*pass a PagedKV"):
        cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=case.prefix)
    cache = case.pages(meta.plan, 0, max_requests=4).cache
    with pytest.raises(cpattn.PageTableError, match="page_table has 4 lines, one a request, but the bucket has 5 requests"):
        cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=cache)
    with pytest.raises(cpattn.UnsupportedError, match="it cannot read pages of 16 tokens, and a bucket's graph cannot copy"):
        cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=case.pages(meta.plan, 0, max_requests=5).cache, backend="cpu")
    case.cache = "sharded"
    sharded = case.plan(2)
    cache = case.pages(sharded, 0, max_requests=5).cache
    with pytest.raises(cpattn.UnsupportedError, match="the shards that travel change in size from batch to batch"):
        cpattn.cp_attention(q, k, v, sharded.metadata(0, bucket=BUCKET), group=group, kv_cache=cache, strategy="ring")
    assert group.bytes_sent == 0
