"""Every backend that this machine has, over the loopback communicator on one GPU, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from inputs.cases import STRIPED_EXCHANGES, AttentionCase
from programs import split_heads
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.testing import run_loopback

GPU_BACKENDS = ["flash_attn4", "flash_attn3", "flash_attn2", "torch_flash", "triton", "reference"]
MIXED = [(0, 777), (640, 300), (0, 3), (997, 1), (64, 0), (0, 1), (131, 89)]


def serving(backend: str, case: AttentionCase, strategy: str) -> bool:
    """Whether the backend can serve the case here; the reason why not is what the test is skipped with."""
    plan = cpattn.plan(case.batch, 1)
    meta = plan.metadata(0, case.device)
    try:
        cpattn.cp_attention(case.q, case.k, case.v, meta, kv_cache=case.prefix, strategy=strategy, backend=backend, **case.options)  # type: ignore[call-overload]
    except cpattn.UnsupportedError as refusal:
        pytest.skip(str(refusal))
    return not cpattn.BACKENDS[backend].fp32_out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("cp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_error_is_that_of_one_device(backend: str, cp_size: int, strategy: str, dtype: torch.dtype) -> None:
    case = AttentionCase(MIXED, heads=8, kv_heads=2, head_dim=128, dtype=dtype, device="cuda")
    half_only = serving(backend, case, strategy)
    plan = cpattn.plan(case.batch, cp_size, pad_to=16)
    case.check_loopback(plan, strategy, backend, rounded_partials=half_only and strategy == "ring")


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize(
    "features",
    [
        pytest.param({"window": 100}, id="window"),
        pytest.param({"softcap": 20.0}, id="softcap"),
        pytest.param({"sinks": True}, id="sinks"),
        pytest.param({"window": 33, "softcap": 5.0, "sinks": True}, id="all three"),
        pytest.param({"scale": 0.3}, id="scale"),
        pytest.param({"head_dim": 64}, id="D 64"),
        pytest.param({"head_dim": 96}, id="D 96"),
        pytest.param({"head_dim": 192}, id="D 192"),
        pytest.param({"head_dim": 256}, id="D 256"),
        pytest.param({"head_dim": 192, "v_head_dim": 128}, id="D 192, Dv 128"),
        pytest.param({"heads": 8, "kv_heads": 8}, id="no groups"),
        pytest.param({"heads": 8, "kv_heads": 1}, id="one KV head"),
        pytest.param({"heads": 6, "kv_heads": 2}, id="groups of 3"),
        pytest.param({"overlap": 2, "sinks": True}, id="overlap"),
    ],
)
def test_features(backend: str, strategy: str, features: dict[str, object]) -> None:
    case = AttentionCase(MIXED, **({"heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"} | features))  # type: ignore[arg-type]
    half_only = serving(backend, case, strategy)
    plan = cpattn.plan(case.batch, 3, pad_to=8)
    # Where sinks are applied to a result in half precision, it is rounded once more, on one device as well.
    case.check_loopback(plan, strategy, backend, rounded_partials=half_only and strategy == "ring")


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize(
    "batch",
    [
        pytest.param([], id="no requests"),
        pytest.param([(17, 0), (0, 0)], id="nothing new"),
        pytest.param([(0, 1)], id="one token"),
        pytest.param([(5, 1), (970, 1), (0, 1), (31, 1)], id="decode batch"),
        pytest.param([(0, 9)] * 64, id="many short requests"),
        pytest.param([(0, 2111), *[(3, 2)] * 31], id="one long beside short ones"),
    ],
)
def test_ugly_batches(backend: str, strategy: str, batch: list[tuple[int, int]]) -> None:
    case = AttentionCase(batch, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda")
    half_only = serving(backend, case, strategy)
    for cp_size in (3, 8):
        plan = cpattn.plan(case.batch, cp_size, pad_to=8)
        case.check_loopback(plan, strategy, backend, rounded_partials=half_only and strategy == "ring")


@pytest.mark.parametrize(
    ("strategy", "cache"),
    [
        ("all_gather", "paged"),
        ("ring", "paged"),
        ("ring", "sharded"),
        ("pass_q", "packed"),
        ("pass_q", "sharded"),
        ("pass_q_ring", "packed"),
        ("pass_q_ring", "sharded"),
        *STRIPED_EXCHANGES,
    ],
)
@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("backend", ["flash_attn4", "flash_attn3", "torch_flash", "triton"])
def test_caches(backend: str, page_size: int, strategy: str, cache: str) -> None:
    """Pages in any order, NaN in all that is not a token's, garbage in the rest of the table."""
    case = AttentionCase(
        MIXED,
        heads=8,
        kv_heads=2,
        head_dim=128,
        dtype=torch.bfloat16,
        device="cuda",
        cache=cache,
        page_size=page_size,
        interleave=3,
        sinks=page_size == 16,
    )
    half_only = serving(backend, case, "all_gather")
    for cp_size in (1, 3, 4):
        case.check_loopback(case.plan(cp_size, pad_to=16), strategy, backend, rounded_partials=half_only and strategy != "all_gather")


@pytest.mark.parametrize("partition", ["zigzag", "whole"])
@pytest.mark.parametrize("backend", ["flash_attn4", "flash_attn3", "torch_flash", "triton"])
def test_first_chunks_over_pages(backend: str, partition: str) -> None:
    """So long that they are put in order where that is faster, and on one rank as they lie."""
    sizes = {"heads": 16, "kv_heads": 1, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda", "page_size": 64}
    case = AttentionCase([(0, 3000), (0, 1), (40, 0), (0, 77)], cache="paged", **sizes)  # type: ignore[arg-type]
    serving(backend, case, "all_gather")
    for cp_size in (1, 2):
        case.check_loopback(case.plan(cp_size, partition=partition, pad_to=8), "all_gather", backend)


@pytest.mark.parametrize(("strategy", "cache"), [("all_gather", "paged"), ("pass_q", "sharded"), ("pass_q", "striped"), ("ring", "packed")])
def test_latent_attention(strategy: str, cache: str) -> None:
    """One KV head of 576, of which the first 512 columns are V."""
    batch = [(640, 300), (0, 3), (997, 1), (131, 89)]
    case = AttentionCase(batch, 16, 1, 576, 512, torch.bfloat16, scale=192**-0.5, device="cuda", cache=cache, page_size=64, v_in_k=True)
    case.check_loopback(case.plan(3, pad_to=8), strategy, "triton")


@pytest.mark.parametrize("cache", ["striped", "ranked"])
@pytest.mark.parametrize("strategy", ["all_gather", "pass_q"])
@pytest.mark.parametrize("backend", ["flash_attn4", "flash_attn3", "triton"])
def test_a_window_over_shards(backend: str, strategy: str, cache: str) -> None:
    case = AttentionCase(
        MIXED, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda", cache=cache, interleave=3, window=100
    )
    half_only = serving(backend, case, "all_gather")
    for cp_size, partition in ((1, "zigzag"), (3, "zigzag"), (3, "whole")):
        plan = case.plan(cp_size, partition=partition, pad_to=16)
        case.check_loopback(plan, strategy, backend, rounded_partials=half_only and strategy == "pass_q")


@pytest.mark.parametrize(("cache", "window"), [("striped", None), ("sharded", None), ("ranked", 100), ("striped", 100)])
@pytest.mark.parametrize("backend", ["flash_attn4", "flash_attn3", "triton"])
def test_queries_split_by_heads(backend: str, cache: str, window: int | None) -> None:
    """Prefills and decodes at once, which cut launches where a rank's turn begins; FlashAttention can express decodes alone."""
    decodes = [(640, 1), (997, 1), (31, 1), (64, 0)]
    batch = MIXED if backend == "triton" or window is not None else decodes
    case = AttentionCase(
        batch,
        heads=24,
        kv_heads=2,
        head_dim=128,
        dtype=torch.bfloat16,
        device="cuda",
        cache=cache,
        interleave=4,
        page_size=64,
        window=window,
    )
    half_only = serving(backend, case, "all_gather")
    plan = case.plan(3, queries="all", pad_to=16)
    outputs = run_loopback(lambda c: split_heads.call(case, plan.metadata(c.rank, "cuda"), c, backend=backend), 3)
    out, lse = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
    case.check([(out, lse)], plan, "helix", backend, rounded_partials=half_only)


def test_an_engines_own_kernel() -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, **options: object) -> tuple[Tensor, Tensor]:
        given = AttentionOptions(options["scale"], options["window"], options["softcap"], options["sinks"])  # type: ignore[arg-type]
        return cpattn.BACKENDS["triton"].run(q, k, v, rows, given, options["out_dtype"])  # type: ignore[arg-type]

    case = AttentionCase(MIXED, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    plan = case.plan(3, pad_to=16)
    mine = run_loopback(lambda c: case.on_rank(plan, c.rank, c, "ring", kernel), 3)
    case.check(mine, plan, "ring", "triton")


def triton_output(case: AttentionCase, plan: cpattn.Plan) -> tuple[Tensor, Tensor]:
    return run_loopback(lambda c: case.on_rank(plan, c.rank, c, "all_gather", "triton"), plan.cp_size)[0]


def test_triton_gives_a_token_the_same_bits_wherever_it_is_computed() -> None:
    batch = [(0, 3000), (640, 300), (0, 3), (997, 1), (131, 89)]
    case = AttentionCase(batch, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda", sinks=True)
    outputs = []
    for partition in ("zigzag", "contiguous", "whole"):
        for cp_size in (1, 2, 4, 8):
            plan = cpattn.plan(batch, cp_size, partition=partition)
            outputs.append(triton_output(case, plan))
    for out, lse in outputs[1:]:
        assert torch.equal(out, outputs[0][0])
        assert torch.equal(lse, outputs[0][1])
    # Each request alone.
    token = cached = 0
    for prefix_len, extend_len in batch:
        alone = AttentionCase(
            [(prefix_len, extend_len)], heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda", sinks=True
        )
        tokens, prefix = slice(token, token + extend_len), slice(cached, cached + prefix_len)
        token, cached = tokens.stop, prefix.stop
        alone.q, alone.k, alone.v, alone.options = case.q[tokens], case.k[tokens], case.v[tokens], case.options
        alone.prefix_k, alone.prefix_v = case.prefix_k[prefix], case.prefix_v[prefix]
        out, lse = triton_output(alone, cpattn.plan(alone.batch, 3))
        assert torch.equal(out, outputs[0][0][tokens])
        assert torch.equal(lse, outputs[0][1][tokens])
