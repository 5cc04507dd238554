"""Real NCCL transfers: ranks that share a GPU where there are too few, each on its own where there are enough."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import rank_programs as programs
import torch
from cases import AttentionCase

import cpattn
from cpattn.testing import ProcessRanks


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} processes")
def ranks(request: pytest.FixtureRequest) -> Iterator[ProcessRanks]:
    with ProcessRanks(request.param, timeout=120, transport="nccl") as started:
        yield started


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q", "pass_q_ring"])
@pytest.mark.parametrize("backend", ["triton", "torch_flash", "reference"])
def test_attention_over_nccl(ranks: ProcessRanks, strategy: str, backend: str) -> None:
    case = AttentionCase(
        [(0, 777), (640, 300), (0, 3), (997, 1), (64, 0)], heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    plan = cpattn.plan(case.batch, ranks.size, pad_to=8)
    outputs = ranks.run(programs.attend_on_gpu, case, plan, strategy, backend)
    case.check(outputs, plan, strategy, backend, rounded_partials=strategy != "all_gather" and not cpattn.BACKENDS[backend].fp32_out)


@pytest.mark.parametrize(
    ("strategy", "cache"), [("all_gather", "paged"), ("ring", "sharded"), ("pass_q", "sharded"), ("pass_q_ring", "sharded")]
)
def test_pages_over_nccl(ranks: ProcessRanks, strategy: str, cache: str) -> None:
    batch = [(0, 777), (640, 300), (0, 3), (997, 1), (64, 0)]
    case = AttentionCase(batch, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda", cache=cache, page_size=16)
    plan = case.plan(ranks.size, pad_to=8)
    case.check(ranks.run(programs.attend_on_gpu, case, plan, strategy, "triton"), plan, strategy, "triton")


def test_check_over_nccl(ranks: ProcessRanks) -> None:
    for error in ranks.run(programs.disagree_on_gpu):
        assert "the ranks disagree on the plan" in error
