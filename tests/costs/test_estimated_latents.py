"""What expanding a latent costs, in estimates and in what they decide."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import cpattn
from cpattn.attention.registry import BACKENDS
from cpattn.costs.compare import compared
from cpattn.costs.contenders import contenders
from cpattn.costs.ways import Call, Way
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.ring import RING
from cpattn.machine import H100
from cpattn.metadata.auto_partition import AutoChoice
from cpattn.metadata.laid_out import LaidOut
from cpattn.metadata.needed_keys import View
from cpattn.metadata.pair_costs import PairCosts


def problem_of(plan: cpattn.Plan, **changes: Any) -> cpattn.Problem:
    """DeepSeek-V3's."""
    plain = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 128, 128, 192, 128, latent_dim=576)
    return replace(plain, cache="packed" if plan.num_prefix_tokens else None, **changes)


def test_the_latent_travels_and_expanding_it_takes_time() -> None:
    plan = cpattn.plan([(0, 16384)], 2)
    problem = problem_of(plan)
    latent, plain = cpattn.estimate(plan, problem, H100), cpattn.estimate(plan, replace(problem, latent_dim=None), H100)
    best = latent[0]
    assert (best.strategy, best.transport, best.overlap) == ("all_gather", "peer_memory", 1)
    assert best.bytes_sent == plan.rows * 576 * 2
    ways = {(one.strategy, one.transport, one.overlap, one.backend): one for one in plain}
    beside = ways[best.strategy, best.transport, 1, best.backend]
    # Of each head and key a product of 576 by 320.
    kernel = next(kernel for kernel in H100.kernels if kernel.backend == best.backend)
    numbers = 16384 * 128 * 320
    expected = 2 * 576 * numbers / kernel.flops
    assert best.compute - beside.compute == pytest.approx(expected, rel=0.1)
    assert best.transfer < beside.transfer / 30
    assert {one.overlap for one in latent} == {1}
    assert {"ulysses"} <= set(latent.passed_over)


def test_what_is_shared_is_the_attention_and_not_the_expanding() -> None:
    """Ranks whose queries see all keys expand them all: long prompts gain more from a second rank."""
    ratios = []
    for length in (4096, 32768):
        one, two = (cpattn.estimate(plan, problem_of(plan), H100)[0].graph for plan in (cpattn.plan([(0, length)], n) for n in (1, 2)))
        ratios.append(two / one)
    assert 0.5 < ratios[1] < 0.55 < ratios[0] < 0.7


@pytest.mark.parametrize("batch", [[(0, 8192)], [(8192, 2048)] * 4, [(0, 900)] * 20, [(30720, 2048), (0, 5)], [(0, 40)] * 9], ids=str)
@pytest.mark.parametrize("cp_size", [2, 8])
def test_bounds_leave_what_is_estimated_to_be_the_fastest(batch: list[tuple[int, int]], cp_size: int) -> None:
    plan = cpattn.plan(batch, cp_size)
    problem = problem_of(plan)
    call = Call(plan, problem, H100, "peer_memory", {kernel.backend: kernel for kernel in H100.kernels})
    ways = [Way(one, partial(one.schedule, problem, plan), BACKENDS[name]) for one in (ALL_GATHER, RING) for name in call.kernels]
    left, fastest = contenders(call, ways), compared(call, ways)[0]
    assert any(way is fastest.way for way in left)
    assert compared(call, left)[0] == fastest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 0}, "problem.latent_dim=0; pass the width of the latent, an integer of at least 1, or None"),
        ({"kv_heads": 1}, "problem.latent_dim=576 with kv_heads=1 and v_in_k=False; .* pass kv_heads=128, and no v_in_k"),
        ({"v_in_k": True}, "problem.latent_dim=576 with kv_heads=128 and v_in_k=True"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    plan = cpattn.plan([(0, 100)], 2)
    with pytest.raises(cpattn.OptionError, match=message):
        cpattn.estimate(plan, problem_of(plan, **changes), H100)


def test_partitions_are_chosen_by_it() -> None:
    """A request that is cut is expanded on each of its ranks."""
    batch = [(0, 6000), (0, 5000), (3000, 4000)]
    problem = problem_of(cpattn.plan(batch, 2), rows=0)
    own = H100.only("triton")
    choice, costs = AutoChoice.of(problem, own), PairCosts.of(problem, own, 2)
    (expanded,) = costs.expanded.ravel().tolist()
    more = {}
    for name in ("zigzag", "whole"):
        plan = cpattn.plan(batch, 2, partition=name)
        view = View.of(plan)
        more[name] = choice.pairs(LaidOut(plan), costs) - choice.pairs(LaidOut(plan), costs._replace(expanded=0 * costs.expanded))
        assert 0 < more[name] <= expanded * int((view.prefix + view.new).max())
    assert more["whole"] < 0.8 * more["zigzag"]
    assert cpattn.plan(batch, 2, partition="auto", problem=problem, machine="h100-nvlink").partition == "whole"
    assert not PairCosts.of(replace(problem, latent_dim=None), H100, 2).expanded.any()
    # A product of 576 for each of 320 numbers, in pairs of 320 each.
    assert expanded == pytest.approx(576, abs=1)
