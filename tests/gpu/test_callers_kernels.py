"""Every backend that this machine has through all that strategies ask of a kernel; and a caller's kernel waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.exchange.step_spans import causal_spans
from cpattn.testing import SoloCommunicator, check_backend

# They load whole tiles of keys through the tensor memory accelerator, and multiply those after a range by 0.
# Strategies give them no NaN there.
LOADS_WHOLE_TILES = {"flash_attn3", "flash_attn4"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", [name for name, backend in cpattn.BACKENDS.items() if name != "cpu"])
def test_built_in_backends_pass(name: str, dtype: torch.dtype) -> None:
    backend = cpattn.BACKENDS[name]
    reason = backend.unavailable()
    if reason:
        pytest.skip(reason)
    if dtype not in backend.dtypes:
        pytest.skip(f"it does not take {dtype}")
    report = check_backend(name, "cuda", dtype=dtype)
    if all(row.verdict == "not claimed" for row in report.rows):
        # A build of FlashAttention-3 may have been made without fp16.
        pytest.skip(report.rows[0].detail)
    failing = {row.name for row in report.rows if not row.passes}
    assert failing <= ({"NaN in keys of no range"} if name in LOADS_WHOLE_TILES else set()), str(report)
    assert any(row.verdict == "holds" for row in report.rows), str(report)


def kernel(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, *, scale: float, out_dtype: torch.dtype, **options: Any) -> Any:
    return cpattn.BACKENDS["triton"].run(q, k, v, rows, AttentionOptions(scale, options["window"]), out_dtype)


BATCH = [(0, 777), (640, 300), (0, 3), (997, 1), (131, 89)]


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_what_a_kernel_returns_is_checked_without_waiting(strategy: str) -> None:
    case = AttentionCase(BATCH, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    backend, communicator = cpattn.custom_backend(kernel), SoloCommunicator(1, 4)

    def step() -> None:
        meta = cpattn.build_metadata(BATCH, cp_size=4, cp_rank=1, device="cuda")
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        for window in (None, 100):
            cpattn.cp_attention(q, k, v, meta, group=communicator, kv_cache=case.prefix, strategy=strategy, backend=backend, window=window)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kept", [True, False], ids=["kept before the capture", "first seen in the capture"])
def test_which_queries_see_keys_follows_the_rows_of_a_captured_graph(kept: bool) -> None:
    bucket = cpattn.Bucket(max_requests=4, max_rows=64, max_chunks=8, max_seqlen=128)
    meta = cpattn.build_metadata([(0, 1)] * 4, 1, 0, device="cuda", bucket=bucket)
    spans = causal_spans(meta, paged=True)
    if kept:
        spans.sees_keys()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sees = spans.sees_keys().clone()
    assert (("sees keys", None) in spans._refreshed) == kept
    for batch in ([(5, 30), (0, 2)], [(100, 7)], []):
        meta.copy_(cpattn.plan(batch, 1))
        graph.replay()
        tokens = sum(extend for _, extend in batch)
        assert sees.tolist() == [True] * tokens + [False] * (64 - tokens)
