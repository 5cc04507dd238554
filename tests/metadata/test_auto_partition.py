"""Partition "auto": whichever of zigzag and whole is estimated to be faster, the same on every rank."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.strategies import Batch, batches

import cpattn
from cpattn.kernels.tile_shapes import tile_shapes
from cpattn.kernels.tiles import block_costs
from cpattn.machine import H100
from cpattn.metadata import pair_costs
from cpattn.metadata.auto_partition import CANDIDATES, USUAL, USUAL_MACHINE, explain_partition
from cpattn.metadata.laid_out import LaidOut, Zigzag
from cpattn.metadata.layout_costs import Attention, Transfers, least_pairs
from cpattn.metadata.pair_costs import PairCosts

SHORT = [(0, 900)] * 40
LONG = [(0, 65536)]


@pytest.mark.parametrize(
    ("batch", "cp_size", "taken"),
    [
        pytest.param(LONG, 8, "whole", id="one long"),
        pytest.param(SHORT, 8, "whole", id="many short"),
        pytest.param([*LONG, *SHORT], 4, "whole", id="one long beside short ones"),
        pytest.param([(7092, 1276), (0, 772)], 2, "zigzag", id="a round of tiles less"),
        pytest.param([(10523, 1792), (10385, 256)], 4, "zigzag", id="a round less of four"),
        pytest.param([(8192, 1)] * 64, 8, "whole", id="equal decodes"),
        pytest.param(SHORT, 1, "whole", id="one rank"),
        pytest.param([], 4, "whole", id="no requests"),
    ],
)
def test_it_is_one_of_the_partitions_that_have_names(batch: Batch, cp_size: int, taken: str) -> None:
    plan = cpattn.plan(batch, cp_size, partition="auto", pad_to=8)
    assert plan == cpattn.plan(batch, cp_size, partition=taken, pad_to=8)
    assert plan.fingerprint == pickle.loads(pickle.dumps(plan)).fingerprint
    assert cpattn.required_rows(batch, cp_size, partition="auto", pad_to=8) == plan.rows
    assert cpattn.required_rows(batch, cp_size, partition="auto", pad_to=8, machine="a100-nvlink") == plan.rows
    assert cpattn.build_metadata(batch, cp_size, 0, partition="auto", pad_to=8).plan == plan


def test_sharded_caches_are_planned_as_well() -> None:
    shards = [[4, 0, 0, 0], [0, 0, 0, 4]]
    plan = cpattn.plan([(4, 900), (4, 900)], 4, partition="auto", prefix_shards=shards)
    assert plan == cpattn.plan([(4, 900), (4, 900)], 4, partition=plan.partition, prefix_shards=shards)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_taken_is_nearly_the_fastest_by_the_full_estimate(seed: int) -> None:
    """Log-normal prompts, some of them with prefixes, a long one and decodes among them."""
    rng = np.random.default_rng(seed)
    count, cp_size = int(rng.integers(1, 30)), int(rng.choice([2, 4, 8]))
    extends = np.minimum(np.exp(rng.normal(6.5, 1.2, count)).astype(int) + 1, 32768).tolist()
    batch = [(int(np.exp(rng.normal(7, 1.2))) * int(rng.random() < 0.4), extend) for extend in extends]
    batch += [(4096 * seed, 16384)] * (seed % 3 == 0) + [(int(prefix), 1) for prefix in rng.integers(1, 9000, 5 * (seed % 4))]
    cache: dict[str, Any] = {"cache": "packed"} if seed % 2 else {"cache": "paged", "page_size": 64}

    def seconds(plan: cpattn.Plan) -> float:
        problem = replace(USUAL, rows=plan.rows, **cache)
        found = cpattn.estimate(plan, problem, "h100-nvlink")
        return min(one.graph for one in found if (one.strategy, one.overlap, one.backend) == ("all_gather", 1, "triton"))

    best = min(seconds(cpattn.plan(batch, cp_size, partition=name)) for name in CANDIDATES)
    assert seconds(cpattn.plan(batch, cp_size, partition="auto", problem=replace(USUAL, **cache))) <= 1.02 * best


@pytest.mark.parametrize("seed", range(6))
def test_the_backends_that_a_machine_has_count(seed: int) -> None:
    """FlashAttention-3 splits long rows of decodes, whose packed prefixes a ring need not copy."""
    rng = np.random.default_rng(seed)
    cp_size = int(rng.choice([2, 4, 8]))
    batch = [(0, int(np.exp(rng.normal(7, 1.5))) + 2)] + [(int(prefix), 1) for prefix in rng.integers(1, 30000, 25)]
    problem = replace(USUAL, cache="packed")

    def seconds(plan: cpattn.Plan) -> float:
        found = cpattn.estimate(plan, replace(problem, rows=plan.rows), H100)
        return min(one.graph for one in found if one.strategy in ("all_gather", "ring") and one.overlap == 1)

    best = min(seconds(cpattn.plan(batch, cp_size, partition=name)) for name in CANDIDATES)
    assert seconds(cpattn.plan(batch, cp_size, partition="auto", problem=problem, machine=H100)) <= 1.02 * best


def test_a_machine_with_some_of_its_backends() -> None:
    assert [kernel.backend for kernel in H100.only("flash_attn3").kernels] == ["flash_attn3"]
    with pytest.raises(cpattn.UnknownNameError, match="'h100-nvlink' has no constants of 'torch_flash'; it has those of 'triton'"):
        H100.only("torch_flash")
    with pytest.raises(cpattn.OptionError, match="pass a KernelCosts for each backend, one at least"):
        H100.only()


@given(batch=batches(), cp_size=st.integers(2, 6), pad_to=st.sampled_from([1, 4]))
@settings(max_examples=60, deadline=None)
def test_zigzag_in_closed_form_is_what_its_plan_has(batch: Batch, cp_size: int, pad_to: int) -> None:
    plan = cpattn.plan(batch, cp_size, pad_to=pad_to)
    planned, closed = LaidOut(plan), Zigzag(cpattn.plan(batch, cp_size, partition="whole", pad_to=pad_to))
    assert (planned.rows, planned.most_tokens) == (closed.rows, closed.most_tokens)
    assert planned.received(None, True) == closed.received(None, True)
    for mine, other in zip((*planned.view, planned.chunks.bounds), (*closed.view, closed.chunks.bounds), strict=True):
        assert mine.tolist() == other.tolist()
    for first, end in pairwise(planned.chunks.bounds.tolist()):
        chunks = [sorted(zip(of.chunks.length[first:end], of.chunks.before[first:end], strict=True)) for of in (planned, closed)]
        assert chunks[0] == chunks[1]


@given(batch=batches(), cp_size=st.integers(2, 6), cache=st.sampled_from(["packed", "paged"]))
@settings(max_examples=60, deadline=None)
def test_no_partition_takes_less_than_its_floor(batch: Batch, cp_size: int, cache: Any) -> None:
    problem = replace(USUAL, cache=cache, page_size=64 if cache == "paged" else None)
    costs = PairCosts.of(problem, H100, cp_size)
    for name in (*CANDIDATES, "uncut"):
        plan = cpattn.plan(batch, cp_size, partition=name)
        laid_out = LaidOut(plan)
        attention = Attention(laid_out, problem, costs).least
        taken = np.add(attention, Transfers(laid_out, problem, costs).beside(attention))
        # Whole may cut nothing.
        assert (taken >= least_pairs(plan, problem, costs, cuts=name == "zigzag")).all() or name == "whole"


def test_tiles_are_those_of_the_kernel() -> None:
    full, half = tile_shapes(128, 128, torch.bfloat16, (9, 0), specialized=True)
    assert (full.block_m, full.block_n, half.block_m) == (pair_costs.TILE_ROWS, pair_costs.TILE_KEYS, full.block_m // 2)
    of_full, of_half = block_costs(np.array([full.block_m, half.block_m]), full)
    assert round(pair_costs.FULL * of_half / of_full) == pair_costs.HALF_FULL


@pytest.mark.parametrize(
    ("batch", "token_cost", "taken"),
    [
        ([(0, 300)], 1000, "uncut"),
        ([(0, 300)], 100_000, "whole"),
        ([(0, 20_000)], 0, "whole"),
        ([(0, 300)] * 3, 1000, "uncut"),
    ],
)
def test_evenness_gives_way_where_tokens_cost_little(batch: Batch, token_cost: int, taken: str) -> None:
    plan = cpattn.plan(batch, 8, partition="auto", token_cost=token_cost)
    assert plan == cpattn.plan(batch, 8, partition=taken)
    assert cpattn.required_rows(batch, 8, partition="auto", token_cost=token_cost) == plan.rows
    # With a sharded cache one rank would hold all of a request. Whatever the rule, rows are as many.
    owner, shards = cpattn.Striped(16), [[0] * 8] * len(batch)
    sharded = cpattn.plan(batch, 8, partition="auto", token_cost=token_cost, prefix_shards=shards)
    assert sharded.partition != "uncut"
    assert cpattn.required_rows(batch, 8, partition="auto", token_cost=token_cost, owner=owner) == sharded.rows
    assert cpattn.plan(batch, 8, partition="auto", token_cost=token_cost, owner=owner).rows == sharded.rows


def test_that_ranks_crowd_at_one_counts() -> None:
    """All read the keys of a lone request in the same order; cut it then takes longer than on one rank."""
    h100 = cpattn.MACHINES["h100-nvlink"]
    assert h100.peer_memory is not None
    apart = replace(h100, peer_memory=replace(h100.peer_memory, from_one=None))
    taken = [cpattn.plan([(0, 2048)], 4, partition="auto", token_cost=0, machine=machine).partition for machine in (h100, apart)]
    assert taken == ["uncut", "whole"]


def test_in_a_bucket_what_ranks_read_of_each_other_counts() -> None:
    """Over collectives messages have the bucket's size whatever is cut, and then a short prompt is faster on all ranks."""
    h100, problem = cpattn.MACHINES["h100-nvlink"].only("triton"), replace(USUAL, fixed=True)
    machines = h100, replace(h100, peer_memory=None)
    options: dict[str, Any] = {"partition": "auto", "token_cost": 0, "problem": problem}
    assert [cpattn.plan([(0, 1024)], 4, machine=machine, **options).partition for machine in machines] == ["uncut", "whole"]


def test_uncut_requests_go_where_there_is_least() -> None:
    plan = cpattn.plan([(0, 10), (0, 3), (5, 0), (0, 4), (5, 1)], 2, partition="uncut")
    assert [tuple(chunk) for chunk in plan.chunks] == [(0, 0, 10, 0), (1, 0, 3, 1), (3, 0, 4, 1), (4, 0, 1, 1)]
    assert cpattn.required_rows(plan.batch, 2, partition="uncut") == plan.rows == 10
    # Of equal ranks the one that holds the least of the request.
    assert cpattn.plan([(6, 1)], 3, partition="uncut", prefix_shards=[[3, 2, 1]]).chunks[0].rank == 2


def test_what_is_asked_for_decides() -> None:
    """With a window few keys are seen and fewer travel, so that the sizes of chunks count for more."""
    batch = [(0, 6000), (0, 3500), (0, 2000), (0, 8000)]
    assert cpattn.plan(batch, 4, partition="auto", machine="h200-nvlink").partition == "zigzag"
    assert cpattn.plan(batch, 4, partition="auto", problem=replace(USUAL, window=128)).partition == "whole"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"problem": 3}, cpattn.OptionError, r"problem is a int; pass a cpattn.Problem"),
        ({"problem": replace(USUAL, kv_heads=0)}, cpattn.OptionError, "problem.kv_heads=0; it must be an integer of at least 1"),
        ({"problem": replace(USUAL, kv_heads=5)}, cpattn.HeadCountError, "q_heads=32 is no multiple of kv_heads=5"),
        ({"machine": "abacus"}, cpattn.UnknownNameError, "machine='abacus' is unknown; choose one of 'h100-nvlink'"),
        ({"token_cost": -1}, cpattn.OptionError, "token_cost=-1; pass what the rest of a layer pays for a token, in query-key pairs"),
        ({"partition": "whole", "token_cost": 0}, cpattn.PlanError, "token_cost= beside partition='whole'"),
        ({"remainder": "first"}, cpattn.PlanError, "remainder='first' beside partition='auto', which goes with 'balanced' alone"),
        ({"partition": "whole", "problem": USUAL}, cpattn.PlanError, "problem= beside partition='whole', which does not look at it"),
        ({"partition": "zigzag", "machine": "h100-nvlink"}, cpattn.PlanError, "machine= beside partition='zigzag'"),
    ],
)
def test_mistakes(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for ask in (cpattn.plan, cpattn.required_rows):
        with pytest.raises(error, match=message):
            ask(SHORT, 2, **{"partition": "auto"} | options)
        with pytest.raises(cpattn.PlanError, match=r"owner=3; pass cpattn.Striped\(interleave\), or None"):
            ask(SHORT, 2, owner=3)  # type: ignore[arg-type]


def test_explain_says_what_it_takes_and_why() -> None:
    meta = cpattn.build_metadata(SHORT, 4, 0)
    q, k = torch.zeros(meta.rows, 8, 16), torch.zeros(meta.rows, 2, 16)
    said = cpattn.explain(q, k, k, meta)["partition"]
    assert said.startswith("zigzag; 'auto' takes whole: a layer's attention on h100-nvlink is estimated at ")
    assert cpattn.explain(q[:9], k[:9], k[:9], cpattn.build_metadata([(0, 9)], 1, 0))["partition"] == "zigzag: there is one rank"


@pytest.mark.parametrize(
    ("partition", "sharded", "token_cost", "says", "times"),
    [
        ("uncut", False, None, "uncut; 'auto' takes whole, without token_cost: a layer's attention on", 3),
        ("uncut", False, 0, "uncut; 'auto' takes uncut: a layer's attention, with token_cost=0 for the rest of it, on", 3),
        ("uncut", True, None, "uncut; 'auto' takes whole: a layer's attention on", 3),
        ("whole", True, 0, "whole; 'auto' takes whole: a layer's attention, with token_cost=0 for the rest of it, on", 2),
        ("contiguous", False, None, "contiguous; 'auto' takes whole: a layer's attention on", 2),
    ],
)
def test_what_it_says_of_a_plan_is_what_it_takes(partition: str, sharded: bool, token_cost: int | None, says: str, times: int) -> None:
    owner = cpattn.Striped() if sharded else None
    plan = cpattn.plan([(0, 300)], 8, partition=partition, owner=owner)
    taken = cpattn.plan(plan.batch, 8, partition="auto", owner=owner, token_cost=token_cost).partition
    said = explain_partition(plan, replace(USUAL, rows=plan.rows), USUAL_MACHINE, token_cost)
    assert said.startswith(says)
    assert f"'auto' takes {taken}" in said
    assert said.count(" us with ") == times


def test_it_says_nothing_of_what_would_have_too_many_rows() -> None:
    plan = cpattn.plan([(0, 8_500_000)], 256)
    said = explain_partition(plan, replace(USUAL, rows=plan.rows, window=4096), token_cost=0)
    assert said.count(" us with ") == 2


def test_a_pool_takes_it_by_itself() -> None:
    pool = cpattn.KVPool(64, 16, 1, kv_heads=2, head_dim=16, cp_size=2)
    for name in range(8):
        pool.admit(name)
    assert pool.plan([(name, 100) for name in range(8)]).partition == "whole"
    assert pool.plan([(0, 20)], partition="contiguous").partition == "contiguous"
    with pytest.raises(cpattn.PlanError, match="machine= beside partition='zigzag'"):
        pool.plan([(0, 1)], partition="zigzag", machine="h100-nvlink")


def test_what_would_have_too_many_rows_is_passed_over() -> None:
    """Of a request that is not cut 256 ranks would have 8.5 million rows each."""
    with pytest.raises(cpattn.PlanError):
        cpattn.plan([(0, 8_500_000)], 256, partition="uncut")
    problem = replace(USUAL, window=4096)
    assert cpattn.plan([(0, 8_500_000)], 256, partition="auto", problem=problem, token_cost=0).partition in CANDIDATES
