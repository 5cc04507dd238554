"""Latents expanded on a GPU: on a stream of its own, in graphs, by each backend, and in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs.latent_cases import LatentCase
from torch import Tensor

import cpattn
from cpattn import expansion
from cpattn.attention import expanded_keys
from cpattn.testing import relative_rmse, rmse_bound, run_loopback

BATCH = [(640, 300), (0, 3), (997, 1), (131, 89)]


def deepseek(batch: list[tuple[int, int]], heads: int = 16, **changes: Any) -> LatentCase:
    """Head dims of DeepSeek-V3."""
    return LatentCase(batch, heads, 1, 192, 128, torch.bfloat16, rank=512, nope=128, device="cuda", page_size=64, **changes)


@pytest.fixture
def in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two heads or a few, whatever the batch here."""
    monkeypatch.setattr(expansion, "MOST_BYTES", 2**21)


def call(case: LatentCase, meta: cpattn.CPMetadata, **given: Any) -> Tensor:
    q, latent = (cpattn.shard(x, meta) for x in (case.q, case.k))
    out: Tensor = cpattn.cp_attention(q, latent, None, meta, v_dim=128, expand=case.expand, window=case.window, **given)
    return out


@pytest.mark.usefixtures("in_groups")
@pytest.mark.parametrize(
    ("strategy", "cache"),
    [
        ("all_gather", "packed"),
        ("all_gather", "paged"),
        ("ring", "packed"),
        ("ring", "sharded"),
        ("pass_q", "sharded"),
        ("pass_q", "striped"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "flash_attn3", "flash_attn4", "reference"])
def test_as_exact_as_on_one_device(strategy: str, cache: str, backend: str) -> None:
    case = deepseek(BATCH, cache=cache)
    meta = cpattn.plan(BATCH, 1).metadata(0, "cuda")
    says = cpattn.explain(case.q, case.k, None, meta, v_dim=128, expand=case.expand, kv_cache=case.prefix)[backend]
    if not says.startswith(("able", "chosen")):
        pytest.skip(says)
    if cache == "striped" and backend.startswith("flash"):
        pytest.skip("pieces of a striped prefill are not for FlashAttention")
    check_beside_one_device(case, strategy, backend)


def check_beside_one_device(case: LatentCase, strategy: str, backend: str) -> None:
    """Over three ranks. One device expands to half precision as well, which AttentionCase.check does not count."""
    own, _ = case.single_device_rmse(backend)
    plan = case.plan(3, pad_to=8)
    outputs = run_loopback(lambda c: case.on_rank(plan, c.rank, c, strategy, backend), 3)
    # Partial results in half precision carry an error each, as in AttentionCase.check.
    rounded = 2**0.5 if backend.startswith("flash") and strategy != "all_gather" else 1.0
    bound = rmse_bound(rounded * own, case.dtype, 8, case.expected[1])
    for out, _ in outputs:
        assert relative_rmse(out, case.expected[0]) <= bound
    assert own <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.usefixtures("in_groups")
@pytest.mark.parametrize(
    ("strategy", "cache"), [("all_gather", "packed"), ("all_gather", "paged"), ("ring", "packed"), ("pass_q", "striped")]
)
def test_what_a_window_reaches_is_expanded_alone(strategy: str, cache: str) -> None:
    """On the stream beside, of rows that were taken for it."""
    check_beside_one_device(deepseek(BATCH, cache=cache, window=150), strategy, "triton")


@pytest.mark.usefixtures("in_groups")
@pytest.mark.parametrize("backend", ["triton", "flash_attn3", "flash_attn4"])
def test_a_stream_of_its_own_changes_no_bit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do groups that are written to their places. Many calls in a row: memory that is used again too early would show."""
    case = deepseek([(0, 3000)], heads=32)
    meta = cpattn.plan(case.batch, 1).metadata(0, "cuda")
    says = cpattn.explain(case.q, case.k, None, meta, v_dim=128, expand=case.expand)[backend]
    if not says.startswith(("able", "chosen")):
        pytest.skip(says)
    beside = [call(case, meta, backend=backend) for _ in range(20)]
    monkeypatch.setattr(expanded_keys, "EXPANDS_BESIDE", False)
    in_turn = call(case, meta, backend=backend)
    assert all(torch.equal(out, in_turn) for out in beside)
    k, v = case.expand(case.k, slice(0, 32))
    plain = cpattn.cp_attention(case.q, k, v, meta, backend=backend)
    # Products of other sizes may be rounded otherwise.
    assert relative_rmse(in_turn, plain) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.usefixtures("in_groups")
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("cache", ["packed", "paged"])
def test_graphs_capture_both_streams(cache: str, window: int | None) -> None:
    case = deepseek([(300, 700), (900, 40)], cache=cache, window=window)
    plan = cpattn.plan(case.batch, 1)
    meta = plan.metadata(0, "cuda")
    pages = case.pages(plan, 0).cache if cache == "paged" else case.prefix
    eager = call(case, meta, kv_cache=pages)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(case, meta, kv_cache=pages)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(case, meta, kv_cache=pages)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, eager)
    # What is captured reads queries, latents and weights where they lie.
    case.q.neg_()
    case.weight.mul_(0.5)
    graph.replay()
    assert torch.equal(out, call(case, meta, kv_cache=pages))


@pytest.mark.usefixtures("in_groups")
@pytest.mark.parametrize(("strategy", "cache"), [("all_gather", "packed"), ("all_gather", "paged"), ("ring", "packed")])
def test_over_the_memory_of_peers(strategy: str, cache: str) -> None:
    """The bits of copies: what is expanded is there, whoever brings it."""
    case = deepseek(BATCH, cache=cache)
    plan = case.plan(2, pad_to=8)

    def program(group: cpattn.Transport) -> None:
        transports = [cpattn.transport(group, kind="peer_memory"), group]
        both = [case.on_rank(plan, group.rank, transport, strategy, "triton") for transport in transports]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*both, strict=True))

    run_loopback(program, 2)


def test_two_groups_are_held_at_most() -> None:
    case = deepseek([(0, 16384)], heads=128)
    meta = cpattn.plan(case.batch, 1).metadata(0, "cuda")
    call(case, meta)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call(case, meta)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    # Of the call: a copy of q and of the latent by shard, the result and its LSE; and the allocator's own rounding.
    given = case.q.nbytes + case.k.nbytes + out.nbytes + 4 * out.shape[0] * out.shape[1]
    assert taken <= given + 2 * expansion.MOST_BYTES + 2**26
    assert 128 * expansion.bytes_of_head(case.problem(cpattn.plan(case.batch, 1)), 16384) > 4 * expansion.MOST_BYTES


@pytest.mark.parametrize("window", [None, 150])
def test_nothing_waits_for_the_device(window: int | None) -> None:
    case = deepseek([(700, 1000), (900, 1000)], window=window)
    metas = [cpattn.plan(case.batch, 1).metadata(0, "cuda") for _ in range(2)]
    call(case, metas[0], kv_cache=case.prefix)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for meta in metas:
            call(case, meta, kv_cache=case.prefix)
    finally:
        torch.cuda.set_sync_debug_mode("default")
