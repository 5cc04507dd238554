"""Pages in fp8 on a GPU: what kernels make of them, what overflows, and that nothing waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inputs.stored_cases import StoredCase
from programs import peer_programs as programs
from programs import rank_programs, split_heads

import cpattn
from cpattn.call.arguments import StrategyChoice
from cpattn.testing import ProcessRanks, run_loopback

E4M3, E5M2, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32
MIXED = [(0, 777), (640, 300), (0, 3), (997, 1), (64, 0), (0, 1), (131, 89)]
FORMS = [(E4M3, "token", BF16), (E4M3, "head", FP16), (E5M2, "one", BF16), (E5M2, "token", FP16), (BF16, None, FP16), (BF16, None, FP32)]
EXCHANGES = [
    ("all_gather", "paged"),
    ("ring", "paged"),
    ("ring", "sharded"),
    ("pass_q", "sharded"),
    ("pass_q_ring", "sharded"),
    ("pass_q", "striped"),
    ("pass_q_ring", "striped"),
]


def case_of(stored: torch.dtype, scales: str | None, dtype: torch.dtype, **changes: Any) -> StoredCase:
    fields: dict[str, Any] = {"batch": MIXED, "heads": 8, "kv_heads": 2, "head_dim": 128, "device": "cuda", "page_size": 16}
    return StoredCase(**(fields | {"stored": stored, "scales": scales, "dtype": dtype} | changes))


def check(case: StoredCase, cp_size: int, strategy: StrategyChoice, backend: str, *, rounded_partials: bool = False) -> None:
    plan = case.plan(cp_size, pad_to=16)
    outputs = run_loopback(lambda c: case.on_rank(plan, c.rank, c, strategy, backend), cp_size)
    case.dequantised().check(outputs, plan, strategy, backend, rounded_partials)


@pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)
@pytest.mark.parametrize(("stored", "scales", "dtype"), FORMS, ids=str)
def test_the_triton_kernel_reads_them(strategy: str, cache: str, stored: torch.dtype, scales: str | None, dtype: torch.dtype) -> None:
    for cp_size, page_size in ((1, 64), (3, 16)):
        check(case_of(stored, scales, dtype, cache=cache, page_size=page_size), cp_size, strategy, "triton")


@pytest.mark.parametrize("cache", ["striped", "sharded"])
@pytest.mark.parametrize(("stored", "scales", "dtype"), FORMS, ids=str)
def test_queries_split_by_heads(cache: str, stored: torch.dtype, scales: str | None, dtype: torch.dtype) -> None:
    case = case_of(stored, scales, dtype, cache=cache, interleave=16)
    for cp_size in (1, 2, 4):
        plan = case.plan(cp_size, queries="all", pad_to=16)

        def program(group: cpattn.Transport, plan: cpattn.Plan = plan) -> Any:
            return split_heads.call(case, plan.metadata(group.rank, "cuda"), group, backend="triton")

        split_heads.check(case.dequantised(), plan, run_loopback(program, cp_size), "triton")


@pytest.mark.parametrize("scales", ["head", "token"])
def test_a_group_over_several_hosts(scales: str) -> None:
    check(case_of(E4M3, scales, BF16, cache="paged"), 4, cpattn.two_level(2), "triton")


@pytest.mark.parametrize(
    "features",
    [
        pytest.param({"window": 100}, id="window"),
        pytest.param({"window": 33, "softcap": 5.0, "sinks": True}, id="window, softcap, sinks"),
        pytest.param({"head_dim": 64, "page_size": 1}, id="D 64"),
        pytest.param({"head_dim": 80, "v_head_dim": 96, "page_size": 3}, id="D 80, Dv 96"),
        pytest.param({"head_dim": 192, "v_head_dim": 128}, id="D 192, Dv 128"),
        pytest.param({"head_dim": 256}, id="D 256"),
        pytest.param({"heads": 16, "kv_heads": 1, "head_dim": 576, "v_head_dim": 512, "v_in_k": True, "scale": 192**-0.5}, id="MLA"),
        pytest.param({"overlap": 2}, id="overlap"),
        pytest.param({"batch": [(4000, 1)] * 64}, id="decoding"),
    ],
)
@pytest.mark.parametrize("scales", ["head", "token"])
def test_features(scales: str, features: dict[str, Any]) -> None:
    check(case_of(E4M3, scales, BF16, cache="paged", **features), 3, "all_gather", "triton")


@pytest.mark.parametrize("backend", ["flash_attn4", "flash_attn3", "torch_flash", "reference"])
def test_others_read_a_copy(backend: str) -> None:
    case = case_of(E4M3, "token", BF16, cache="paged")
    plan = case.plan(1)
    meta, cache = plan.metadata(0, "cuda"), case.pages(plan, 0).cache
    says = cpattn.explain(case.q, case.k, case.v, meta, kv_cache=cache)
    if not says[backend].startswith(("able", "chosen")):
        pytest.skip(says[backend])
    expected = "reads the pages in float8_e4m3fn" if backend == "reference" else "reads a packed copy of the pages of 16 in bfloat16"
    assert expected in says[backend]
    assert says["triton"].startswith("chosen, reads the pages in float8_e4m3fn")
    half_only = not cpattn.BACKENDS[backend].fp32_out
    for strategy in ("all_gather", "ring"):
        check(case, 2, strategy, backend, rounded_partials=half_only and strategy == "ring")


@pytest.mark.parametrize("batch", [[(4000, 1)] * 64, [(640, 300), (0, 777), (997, 1)]], ids=["decode", "prefill"])
def test_flash_attn3_computes_with_queries_in_fp8(batch: list[tuple[int, int]]) -> None:
    """It rounds weights to e4m3, each by up to a sixteenth; a quarter of that is for all else: the sums of products in 14
    bits, and the result in bf16."""
    meta = cpattn.build_metadata(batch, 1, 0, device="cuda")
    shape = 4096, 64, 2, 128
    k, v = (torch.randn(shape, device="cuda").to(E4M3) for _ in range(2))
    k_scale, v_scale = torch.tensor([0.5, 0.7], device="cuda"), torch.tensor(2.0, device="cuda")
    table = torch.randperm(4096, device="cuda").int()[: 64 * len(batch)].view(len(batch), 64)
    q = torch.randn(meta.rows, 8, 128, device="cuda").to(E4M3)
    try:
        out, lse = cpattn.attend(
            q, cpattn.PagedKV(k, v, table, k_scale=k_scale, v_scale=v_scale), meta, backend="flash_attn3", return_lse=True
        )
    except cpattn.UnsupportedError as refusal:
        pytest.skip(str(refusal))
    sizes = (v.view(torch.uint8) & 0x7F).view(E4M3)
    want, want_lse = cpattn.attend(
        q.float(), cpattn.PagedKV(k, v, table, k_scale=k_scale, v_scale=v_scale), meta, backend="reference", return_lse=True
    )
    weighted = cpattn.attend(q.float(), cpattn.PagedKV(k, sizes, table, k_scale=k_scale, v_scale=v_scale), meta, backend="reference")
    assert out.dtype == BF16
    assert ((out.float() - want).abs() <= (1 / 16 + 1 / 64) * weighted).all()
    assert (lse - want_lse).abs().max() < 1 / 64


@pytest.mark.parametrize("scales", ["head", "token"])
def test_what_overflows_saturates_and_is_refused_with_check(scales: str) -> None:
    case = case_of(E4M3, scales, BF16, cache="paged", batch=[(0, 40)])
    plan = case.plan(1)
    meta = plan.metadata(0, "cuda")
    case.k[3, 1, 5] = 3e38 if scales == "head" else torch.inf
    out = cpattn.cp_attention(0 * case.q, case.k, case.v, meta, kv_cache=case.pages(plan, 0).cache)
    assert not out.isnan().any()
    with pytest.raises(cpattn.TensorMismatchError, match=r"in head 1, but the pages are torch.float8_e4m3fn"):
        cpattn.cp_attention(case.q, case.k, case.v, meta, kv_cache=case.pages(plan, 0).cache, check=True)


@pytest.mark.parametrize("scales", ["head", "token"])
def test_a_graph_replays_it_and_nothing_waits(scales: str) -> None:
    case = case_of(E4M3, scales, BF16, cache="paged")
    plan = case.plan(1)
    meta, cache = plan.metadata(0, "cuda"), case.pages(plan, 0).cache
    slots = cpattn.slot_mapping(meta, cache.page_table, 16)

    def step() -> list[torch.Tensor]:
        first = cpattn.cp_attention(case.q, case.k, case.v, meta, kv_cache=cache)
        cpattn.write_kv(case.k, case.v, cache, slots)
        return [first, cpattn.attend(case.q, cache, meta), cpattn.attend(case.q, cache, meta, backend="torch_flash")]

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    for x in (case.q, case.k, case.v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    for out, want in zip(outs, step(), strict=True):
        assert torch.equal(out, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="each rank needs a GPU of its own")
class TestPeers:
    @pytest.fixture(scope="class")
    def ranks(self) -> Iterator[ProcessRanks]:
        with ProcessRanks(min(4, torch.cuda.device_count()), timeout=120, transport="nccl") as started:
            yield started

    @pytest.mark.parametrize("scales", ["head", "token"])
    def test_queries_split_by_heads(self, ranks: ProcessRanks, scales: str) -> None:
        case = case_of(E4M3, scales, BF16, cache="striped", interleave=16)
        plan = case.plan(ranks.size, queries="all", pad_to=16)
        outputs = ranks.run(rank_programs.attend_by_heads, case, plan, "triton")
        split_heads.check(case.dequantised(), plan, [[x.cuda() for x in output] for output in outputs], "triton")

    @pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)
    def test_bits_are_those_of_nccl(self, ranks: ProcessRanks, strategy: str, cache: str) -> None:
        """Bytes go through the memory of other ranks' GPUs as well, odd widths included."""
        cases = [case_of(E4M3, scales, BF16, cache=cache, head_dim=dim) for scales in ("head", "token") for dim in (128, 74)]
        by_rank = ranks.run(programs.attend_over_both, cases, strategy, "triton", "zigzag")
        for n, case in enumerate(cases):
            assert all(results[n][1] for results in by_rank), case.scales
            outputs = [(out.cuda(), lse.cuda()) for (out, lse), _ in (results[n] for results in by_rank)]
            plan = case.plan(ranks.size, pad_to=8, partition="zigzag")
            case.dequantised().check(outputs, plan, strategy, "triton")
