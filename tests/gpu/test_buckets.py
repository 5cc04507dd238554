"""One captured graph replays any batch of its bucket: the bits are those of an eager call with that batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from inputs.cases import AttentionCase
from inputs.paged_caches import RankPages, random_ranks, random_shards
from torch import Tensor

import cpattn
from cpattn.attention.fa3_build import find_build
from cpattn.testing import SoloCommunicator

BUCKET = cpattn.Bucket(max_requests=12, max_rows=192, max_chunks=24, max_seqlen=2048)
CP_SIZE, CP_RANK, PAGE_SIZE, NUM_PAGES = 4, 1, 16, 2048
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128


def random_batch(rng: np.random.Generator) -> list[tuple[int, int]]:
    """Any mix, idle requests and none at all included, of at most the bucket's rows."""
    batch = []
    left = CP_SIZE * BUCKET.max_rows
    for _ in range(rng.integers(0, BUCKET.max_requests + 1)):
        extend = [0, 1, 1, int(rng.integers(0, 20)), int(rng.integers(0, 400))][rng.integers(5)]
        extend = min(extend, left)
        left -= extend
        batch.append((int(rng.integers(0, 1600)) * int(rng.integers(2)), extend))
    return batch


def random_table(rng: np.random.Generator) -> Tensor:
    width = -(-BUCKET.max_seqlen // PAGE_SIZE)
    pages = rng.permutation(NUM_PAGES)[: BUCKET.max_requests * width]
    return torch.from_numpy(pages.astype(np.int32)).view(BUCKET.max_requests, width).cuda()


@pytest.mark.parametrize(
    ("strategy", "cache", "options"),
    [
        pytest.param("all_gather", "paged", {}, id="all_gather"),
        pytest.param("all_gather", "paged", {"window": 100, "sinks": True}, id="all_gather window sinks"),
        pytest.param("ring", "paged", {}, id="ring"),
        pytest.param("pass_q", "sharded", {"softcap": 20.0}, id="pass_q"),
        pytest.param("pass_q_ring", "sharded", {}, id="pass_q_ring"),
        pytest.param("pass_q", "striped", {"sinks": True}, id="pass_q striped"),
        pytest.param("pass_q", "striped", {"window": 100}, id="pass_q striped window"),
        pytest.param("all_gather", "striped", {"window": 100}, id="all_gather striped window"),
        pytest.param("pass_q", "ranked", {"window": 100}, id="pass_q ranked window"),
        pytest.param("all_gather", "ranked", {"window": 100}, id="all_gather ranked window"),
        pytest.param("helix", "striped", {"sinks": True}, id="helix striped"),
        pytest.param("helix", "sharded", {}, id="helix sharded"),
        pytest.param("helix", "ranked", {"window": 100}, id="helix ranked window"),
    ],
)
def test_a_graph_replays_a_hundred_batches(strategy: str, cache: str, options: dict[str, object]) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    communicator, eager_communicator = SoloCommunicator(CP_RANK, CP_SIZE), SoloCommunicator(CP_RANK, CP_SIZE)
    options = options | ({"sinks": torch.randn(HEADS, device="cuda")} if options.get("sinks") else {})

    def make_plan() -> cpattn.Plan:
        while True:
            batch = random_batch(rng)
            seed = int(rng.integers(1000))
            held: dict[str, Any] = {"queries": "all" if strategy == "helix" else "rows"}
            if cache == "sharded":
                held["prefix_shards"] = random_shards(batch, CP_SIZE, seed)
            elif cache == "ranked":
                held["prefix_ranks"] = random_ranks(batch, CP_SIZE, seed)
            elif cache == "striped":
                held["owner"] = cpattn.Striped(4)
            plan = cpattn.plan(batch, CP_SIZE, **held)
            # Over shards an all-gather is for windows that are shorter than a request, which in a graph is the bucket's. Where ranks keep
            # what they compute, without such a window pass_q merges other parts.
            is_windowed = (strategy == "all_gather" and cache == "striped") or cache == "ranked"
            is_served = not is_windowed or max(map(sum, batch), default=0) > 100
            if plan.fits(BUCKET) and is_served:
                return plan

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(torch.bfloat16)

    q, k, v = (normal(BUCKET.max_rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    pages = normal(2, NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    table = random_table(rng)
    meta = make_plan().metadata(CP_RANK, "cuda", bucket=BUCKET)

    def attend(meta: cpattn.CPMetadata, pages: Tensor, group: cpattn.Communicator) -> Any:
        kv_cache = cpattn.PagedKV(pages[0], pages[1], table)
        return cpattn.cp_attention(
            q, k, v, meta, group=group, kv_cache=kv_cache, strategy=strategy, backend="triton", return_lse=True, **options
        )  # type: ignore[call-overload]

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend(meta, pages, communicator)
        attend(meta, pages, communicator)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(meta, pages, communicator)

    for _ in range(100):
        plan = make_plan()
        for x in (q, k, v, pages):
            x.copy_(torch.randn_like(x))
        table.copy_(random_table(rng))
        held = plan.rank_tokens[CP_RANK]
        for x in (q, k, v):
            x[held:] = torch.nan
        torch.cuda.set_sync_debug_mode("error")
        try:
            meta.copy_(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected_pages = pages.clone()
        graph.replay()
        # Afresh, and eagerly, the same bits. In a bucket as well: without one less may be sent, of which a rank alone makes other rows.
        fresh = plan.metadata(CP_RANK, "cuda", bucket=BUCKET)
        rows = fresh.rows
        kv_cache = cpattn.PagedKV(expected_pages[0], expected_pages[1], table)
        if rows:
            expected, expected_lse = cpattn.cp_attention(
                q[:rows], k[:rows], v[:rows], fresh, group=eager_communicator, kv_cache=kv_cache, strategy=strategy, backend="triton",
                return_lse=True, **options,
            )  # type: ignore[call-overload]  # fmt: skip
            assert torch.equal(out[:held], expected[:held])
            assert torch.equal(lse[:held], expected_lse[:held])
        # A rank alone answers the queries of others with its own, padding included, as if those were their tokens.
        if cache == "paged":
            assert (out[held:] == 0).all()
            assert (lse[held:] == -torch.inf).all()
        assert torch.equal(pages, expected_pages)


def test_an_eager_call_in_a_bucket_is_exact() -> None:
    """Every backend that reads pages, in metadata of fixed sizes, against the oracle."""
    batch = [(640, 300), (0, 3), (997, 1), (131, 89), (5, 0)]
    bucket = cpattn.Bucket(max_requests=9, max_rows=512, max_chunks=18, max_seqlen=2048)
    for backend in ("flash_attn4", "flash_attn3", "triton"):
        if cpattn.BACKENDS[backend].unavailable() or (backend == "flash_attn3" and not find_build().has("PAGEDKV")):
            continue
        case = AttentionCase(batch, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda", page_size=16)
        plan = cpattn.plan(batch, 1)
        meta = cpattn.build_metadata([], 1, 0, "cuda", bucket=bucket)
        meta.copy_(plan)
        pages = RankPages(plan, 0, case.prefix_k, case.prefix_v, case.k, case.v, 16, 0, max_requests=9)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        for x in (q, k, v):
            x[meta.num_tokens :] = torch.nan
        out, lse = cpattn.cp_attention(q, k, v, meta, kv_cache=pages.cache, backend=backend, return_lse=True)
        pages.check_written()
        case.check([(out[: meta.num_tokens], lse[: meta.num_tokens])], plan, "all_gather", backend)
        assert (out[meta.num_tokens :] == 0).all()
        assert (lse[meta.num_tokens :] == -torch.inf).all()
