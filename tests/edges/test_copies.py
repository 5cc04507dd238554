"""Copies and pickles of plans and metadata, and what caches and groups print."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import cpattn

COPIES: list[Callable[[Any], Any]] = [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy]
BUCKET = cpattn.Bucket(max_requests=4, max_rows=32, max_chunks=16)


def used(plan: cpattn.Plan, bucket: cpattn.Bucket | None = None) -> cpattn.CPMetadata:
    """Metadata of one rank that calls have derived tables from."""
    meta = plan.metadata(0, bucket=bucket)
    q, k = torch.randn(meta.rows, 4, 8), torch.randn(meta.rows, 2, 8)
    for strategy in ("all_gather", "ring"):
        cpattn.cp_attention(q, k, k, meta, strategy=strategy, window=5)
    cpattn.unshard(q, meta)
    assert meta._derived
    return meta


@pytest.mark.parametrize("copied", COPIES, ids=["pickle", "copy", "deepcopy"])
@pytest.mark.parametrize("bucket", [None, BUCKET], ids=["", "bucket"])
def test_used_metadata_are_copied_as_what_they_were_made_from(copied: Callable[[Any], Any], bucket: cpattn.Bucket | None) -> None:
    meta = used(cpattn.plan([(0, 12), (0, 3)], 1, pad_to=4), bucket)
    other = copied(meta)
    assert (other.plan, other.cp_rank, other.device, other.bucket) == (meta.plan, meta.cp_rank, meta.device, meta.bucket)
    for name in ("chunk_request", "cu_seqlens_q", "k_len", "k_start", "token_count", "position_ids", "token_index", "restore_index"):
        assert torch.equal(getattr(other, name), getattr(meta, name)), name
        # What a copy writes must not reach the other.
        assert getattr(other, name).data_ptr() != getattr(meta, name).data_ptr(), name
    x = torch.randn(meta.rows, 2, 8)
    assert torch.equal(cpattn.cp_attention(x, x, x, other), cpattn.cp_attention(x, x, x, meta))


def test_a_copy_in_a_bucket_has_the_batch_of_the_moment_and_then_its_own() -> None:
    meta = used(cpattn.plan([(0, 12)], 1), BUCKET)
    meta.copy_(cpattn.plan([(0, 5), (0, 7)], 1))
    other = copy.deepcopy(meta)
    assert other.plan == meta.plan
    other.copy_(cpattn.plan([(0, 3)], 1))
    assert (other.num_tokens, meta.num_tokens) == (3, 12)
    assert meta.token_count.item() == 12


@pytest.mark.parametrize("copied", COPIES, ids=["pickle", "copy", "deepcopy"])
@pytest.mark.parametrize("shards", [None, [[1, 2], [0, 0]]], ids=["", "sharded"])
def test_copied_plans_are_read_only(copied: Callable[[Any], Any], shards: Any) -> None:
    plan = cpattn.plan([(3, 9), (0, 4)], 2, partition="contiguous", remainder="first", pad_to=2, prefix_shards=shards)
    names = ["shard_lens", "rank_extends", "shard_totals", "chunk_rank", "lengths", "starts", "rank_columns", "local_starts", "_pairs"]
    for name in names:
        getattr(plan, name)
    other = copied(plan)
    assert other == plan
    assert hash(other) == hash(plan)
    assert other.fingerprint == plan.fingerprint
    for name in names:
        assert np.array_equal(getattr(other, name), getattr(plan, name))
        with pytest.raises(ValueError, match="read-only"):
            getattr(other, name)[...] = 0


def test_reprs_are_short() -> None:
    pages, table = torch.zeros(64, 16, 8, 128, dtype=torch.bfloat16), torch.zeros(4, 9, dtype=torch.int32)
    assert repr(cpattn.PagedKV(pages, pages, table)) == (
        "PagedKV(64 pages of 16 tokens, 8 heads, k 128, v 128, torch.bfloat16, cpu, table (4, 9) torch.int32)"
    )
    latent = cpattn.PagedKV(pages, None, table.long())
    assert repr(latent) == "PagedKV(64 pages of 16 tokens, 8 heads, k 128, v in k, torch.bfloat16, cpu, table (4, 9) torch.int64)"
    packed = cpattn.PackedKV(torch.zeros(77, 2, 64), torch.zeros(77, 2, 32))
    assert repr(packed) == "PackedKV(77 tokens, 2 heads, k 64, v 32, torch.float32, cpu)"
    assert repr(cpattn.PackedKV(packed.k, None)) == "PackedKV(77 tokens, 2 heads, k 64, v in k, torch.float32, cpu)"
    group = cpattn.LoopbackGroup(4, timeout=2.5)
    assert repr(group) == "LoopbackGroup(4 ranks, timeout 2.5 s)"
    group.abort()
    assert repr(group) == "LoopbackGroup(4 ranks, timeout 2.5 s, aborted)"


@pytest.mark.parametrize("wrong", [None, [1, 2], torch.zeros(3), torch.zeros(2, 2, 2, 2, 2), "k"], ids=repr)
def test_a_repr_of_a_wrong_cache_does_not_raise(wrong: Any) -> None:
    for cache in (cpattn.PackedKV(wrong, wrong), cpattn.PagedKV(wrong, wrong, wrong), cpattn.PackedKV(torch.zeros(2, 2, 2), wrong)):
        assert len(repr(cache)) < 200
