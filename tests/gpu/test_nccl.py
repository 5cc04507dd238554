"""Real NCCL transfers: ranks that share a GPU where there are too few, each on its own where there are enough."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from inputs.cases import AttentionCase
from programs import page_programs, split_heads, split_programs
from programs import rank_programs as programs
from torch import Tensor

import cpattn
from cpattn.call.arguments import StrategyChoice
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.testing import ProcessRanks


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} processes")
def ranks(request: pytest.FixtureRequest) -> Iterator[ProcessRanks]:
    with ProcessRanks(request.param, timeout=120, transport="nccl") as started:
        yield started


def attend(
    ranks: ProcessRanks, case: AttentionCase, plan: cpattn.Plan, strategy: StrategyChoice, backend: str
) -> list[tuple[Tensor, Tensor]]:
    """Every rank's result, on this process's GPU."""
    return [(out.cuda(), lse.cuda()) for out, lse in ranks.run(programs.attend_on_gpu, case, plan, strategy, backend)]


def test_each_rank_has_its_tensors_on_its_own_gpu(ranks: ProcessRanks) -> None:
    case = AttentionCase([(5, 30)], device="cuda")
    assert len(case.expected[0]) == 30
    for rank, devices in enumerate(ranks.run(programs.where_tensors_are, case)):
        assert devices == {torch.device("cuda", rank % torch.cuda.device_count())}


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q", "pass_q_ring", "ulysses"])
@pytest.mark.parametrize("backend", ["triton", "torch_flash", "flash_attn3", "reference"])
def test_attention_over_nccl(ranks: ProcessRanks, strategy: str, backend: str) -> None:
    reason = cpattn.BACKENDS[backend].unavailable()
    if reason:
        pytest.skip(reason)
    case = AttentionCase(
        [(0, 777), (640, 300), (0, 3), (997, 1), (64, 0)], heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    plan = cpattn.plan(case.batch, ranks.size, pad_to=8)
    outputs = attend(ranks, case, plan, strategy, backend)
    merges = strategy not in ("all_gather", "ulysses")
    case.check(outputs, plan, strategy, backend, rounded_partials=merges and not cpattn.BACKENDS[backend].fp32_out)


@pytest.mark.parametrize("cache", ["packed", "paged"])
@pytest.mark.parametrize("backend", ["triton", "torch_flash"])
def test_only_keys_that_are_needed_travel_over_nccl(ranks: ProcessRanks, backend: str, cache: str) -> None:
    """Before the attention; and beside it, into pages, the rest."""
    for batch, what in (([(9, 1500), *[(9, 400)] * 9], "needed"), ([(7, 64)] * 8, "nothing")):
        case = AttentionCase(
            batch, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda", overlap=2, cache=cache, page_size=16
        )
        plan = cpattn.plan(case.batch, ranks.size, partition="whole")
        assert traveling_keys(case.problem(plan), plan).what == what
        case.check(attend(ranks, case, plan, "all_gather", backend), plan, "all_gather", backend)


@pytest.mark.parametrize("strategy", ["ring", "pass_q", "pass_q_ring"])
@pytest.mark.parametrize("cache", ["packed", "sharded"])
def test_rings_and_pass_q_send_what_is_needed_over_nccl(ranks: ProcessRanks, strategy: str, cache: str) -> None:
    """Of the one batch something, of the other nothing, but for a cache that lies anywhere."""
    for batch in ([(9, 1500), *[(9, 400)] * 9], [(7, 64)] * 8):
        case = AttentionCase(batch, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda", cache=cache, page_size=16)
        plan = case.plan(ranks.size, partition="whole")
        case.check(attend(ranks, case, plan, strategy, "triton"), plan, strategy, "triton")


@pytest.mark.parametrize("window", [None, 100])
def test_graphs_bring_the_rest_into_pages(ranks: ProcessRanks, window: int | None) -> None:
    for bucket in (False, True):
        for same in ranks.run(page_programs.replay_into_pages, "collectives", window, bucket):
            assert all(same), same


@pytest.mark.parametrize(
    ("strategy", "cache"), [("all_gather", "paged"), ("ring", "sharded"), ("pass_q", "sharded"), ("pass_q_ring", "sharded")]
)
def test_pages_over_nccl(ranks: ProcessRanks, strategy: str, cache: str) -> None:
    batch = [(0, 777), (640, 300), (0, 3), (997, 1), (64, 0)]
    case = AttentionCase(batch, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda", cache=cache, page_size=16)
    plan = case.plan(ranks.size, pad_to=8)
    case.check(attend(ranks, case, plan, strategy, "triton"), plan, strategy, "triton")


@pytest.mark.parametrize("across", ["ring", "all_gather"])
@pytest.mark.parametrize(("cache", "heads"), [("packed", (8, 2)), ("own pages", (8, 4)), ("own packed", (7, 7))])
def test_hybrids_over_nccl(ranks: ProcessRanks, across: str, cache: str, heads: tuple[int, int]) -> None:
    """All ranks divide heads, or half of them do, and across those all keys travel, or those that are needed."""
    for within, (batch, partition) in product(
        {2, ranks.size}, (([(0, 777), (640, 300), (0, 3), (997, 1), (64, 0)], "zigzag"), ([(9, 3000), *[(9, 400)] * 12], "whole"))
    ):
        case = AttentionCase(
            batch, *heads, head_dim=64, dtype=torch.bfloat16, device="cuda", cache=cache, within=within, sinks=True, window=500
        )
        plan, strategy = case.plan(ranks.size, pad_to=8, partition=partition), cpattn.hybrid(within, across)
        case.check(attend(ranks, case, plan, strategy, "triton"), plan, strategy, "triton")


def test_parts_that_have_nothing_to_send_over_nccl(ranks: ProcessRanks) -> None:
    results = ranks.run(split_programs.send_in_one_part_alone, torch.device("cuda"))
    assert results == [[0, 1, 2] if rank == ranks.size // 2 else [] for rank in range(ranks.size)]


@pytest.mark.parametrize("cache", ["packed", "paged"])
def test_two_levels_over_nccl(ranks: ProcessRanks, cache: str) -> None:
    """All rows, and those that are needed."""
    for batch, partition in (([(0, 777), (640, 300), (0, 3)], "zigzag"), ([(9, 1500), *[(9, 400)] * 9], "whole")):
        case = AttentionCase(batch, head_dim=64, dtype=torch.bfloat16, device="cuda", cache=cache)
        plan, strategy = case.plan(ranks.size, pad_to=8, partition=partition), cpattn.two_level(2)
        case.check(attend(ranks, case, plan, strategy, "triton"), plan, strategy, "triton")


@pytest.mark.parametrize("cache", ["striped", "sharded"])
def test_queries_split_by_heads_over_nccl(ranks: ProcessRanks, cache: str) -> None:
    batch = [(0, 777), (640, 300), (0, 3), (997, 1), (64, 0)]
    case = AttentionCase(batch, 8 * ranks.size, 2, 64, dtype=torch.bfloat16, device="cuda", cache=cache, page_size=16, interleave=4)
    plan = case.plan(ranks.size, queries="all", pad_to=8)
    outputs = ranks.run(programs.attend_by_heads, case, plan, "triton")
    split_heads.check(case, plan, [[x.cuda() for x in output] for output in outputs], "triton")


def test_check_over_nccl(ranks: ProcessRanks) -> None:
    for error in ranks.run(programs.disagree_on_gpu):
        assert "the ranks disagree on the plan" in error


def test_collectives_along_each_axis_over_nccl(ranks: ProcessRanks) -> None:
    for sizes in split_programs.SPLITS[ranks.size]:
        results = ranks.run(split_programs.in_group, ranks.size, split_programs.use_axes, sizes, torch.device("cuda"), torch.float32)
        split_programs.check_axes(ranks.size, sizes, results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reduce_scatter_over_nccl(ranks: ProcessRanks, dtype: torch.dtype) -> None:
    """The bits of any other transport, and what torch's own gives up to the order of its sum."""
    results = ranks.run(split_programs.in_group, ranks.size, split_programs.reduce_scatter, torch.device("cuda"), dtype)
    for (out, sent), want in zip(results, split_programs.reduce_scatter_sums(ranks.size, dtype), strict=True):
        assert torch.equal(out, want)
        assert sent == (ranks.size - 1) * want.nbytes
    xs = torch.stack(split_programs.reduce_scatter_inputs(ranks.size, dtype)).double()
    # Each of the sum's steps rounds once, to a number no larger than the sum of magnitudes.
    bound = ranks.size * torch.finfo(dtype).eps * xs.abs().sum(0)
    for theirs, exact, most in zip(ranks.run(split_programs.reduce_scatter_as_torch_does, dtype), xs.sum(0), bound, strict=True):
        assert ((theirs.double() - exact).abs() <= most).all()


def test_a_graph_along_an_axis(ranks: ProcessRanks) -> None:
    """It replays over memory that was released, and grown over, after it was captured."""
    n = 2 if ranks.size == 2 else ranks.size // 2
    for seen in ranks.run(split_programs.replay_along_an_axis, (ranks.size // n, n)):
        assert seen == [[float(n * turn)] * 3 for turn in range(1, 4)]
