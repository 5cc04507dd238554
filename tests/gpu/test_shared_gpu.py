"""Processes that share one GPU: their kernels take turns, and so come to what each other waits for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from inputs.cases import AttentionCase
from programs import peer_programs as programs

from cpattn.testing import ProcessRanks

ALLOWS = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
BATCHES = [[(0, 777), (640, 300), (0, 3), (97, 1), (64, 0)], [(0, 1)], [(0, 13)] * 7]


@pytest.fixture(scope="module")
def ranks() -> Iterator[ProcessRanks]:
    """Over gloo, as NCCL refuses them; all on the first GPU. Torch reads what allows it at each use."""
    with ProcessRanks(3, timeout=120) as started:
        yield started


def cases_of(cache: str) -> list[AttentionCase]:
    return [AttentionCase(batch, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda", cache=cache) for batch in BATCHES]


def test_they_are_refused_unless_torch_allows_them(ranks: ProcessRanks) -> None:
    for value in (None, "0"):
        for said in ranks.run(programs.refusal_where, ALLOWS, value):
            assert "ranks 0 and 1 share a GPU (give each its own, or set TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 on all ranks" in said


@pytest.mark.parametrize(
    ("strategy", "cache"), [("all_gather", "packed"), ("all_gather", "paged"), ("ring", "packed"), ("pass_q", "sharded")], ids=str
)
def test_they_are_right(ranks: ProcessRanks, strategy: str, cache: str) -> None:
    cases = cases_of(cache)
    by_rank = ranks.run(programs.attend_where, ALLOWS, "1", cases, strategy)
    for n, case in enumerate(cases):
        outputs = [(out.cuda(), lse.cuda()) for out, lse in (results[n] for results in by_rank)]
        case.check(outputs, case.plan(ranks.size), strategy, "triton")


def test_a_graph_of_each_replays_it(ranks: ProcessRanks) -> None:
    for differences in ranks.run(programs.replay_where, ALLOWS, "1"):
        assert differences == [0.0] * 4
