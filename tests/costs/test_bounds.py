"""Bounds of what a call takes, beside the estimate of it: what they leave out could not have been taken."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import cpattn
from cpattn.attention.registry import BACKENDS
from cpattn.costs.bounds import Bounds
from cpattn.costs.compare import compared
from cpattn.costs.contenders import contenders
from cpattn.costs.launches import Launches, seconds_of
from cpattn.costs.order_or_pages import attends_over_pages
from cpattn.costs.ways import Call, Way
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.ring import RING
from cpattn.exchange.ulysses import ULYSSES
from cpattn.machine import A100, H100, MACHINES, Machine

RAGGED = [(0, 5000), (700, 1), (3, 130), (9000, 800), (64, 16), (0, 0), (300, 77), (12, 5), (4096, 2048), (0, 33)]
BATCHES = {
    "prompt": [(0, 8192)],
    "alike": [(8192, 2048)] * 4,
    "ragged": RAGGED,
    "decode": [(7000, 1), (31, 1), (100_000, 1)],
    "short": [(0, 40)] * 9,
    "nothing": [(5, 0)],
}


def calls(batch: str, machine: Machine, cp_size: int, **changes: Any) -> tuple[Call, list[Way]]:
    """A call, and its ways with all backends that the machine knows: by all-gather first, and by ring last."""
    plan = cpattn.plan(BATCHES[batch], cp_size, partition=changes.pop("partition", "zigzag"))
    cache: Any = changes.pop("cache", "packed" if plan.num_prefix_tokens else None)
    page_size = 64 if cache == "paged" else None
    problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 32, 8, 128, 128, cache=cache, page_size=page_size)
    problem = replace(problem, **changes)
    call = Call(plan, problem, machine, "peer_memory", {kernel.backend: kernel for kernel in machine.kernels})
    by_heads = [ULYSSES] if ULYSSES.refusal(problem, plan) is None else []
    strategies = (ALL_GATHER, *by_heads, RING)
    ways = [Way(one, partial(one.schedule, problem, plan), BACKENDS[name]) for one in strategies for name in call.kernels]
    return call, ways


CASES: list[dict[str, Any]] = [
    {"cp_size": 2},
    {"cp_size": 8, "fixed": True},
    {"cp_size": 4, "partition": "uncut", "cache": "paged"},
    {"cp_size": 2, "cache": "paged"},
    # Heads of which three share a key, and tiles and key blocks that do not divide each other.
    {"cp_size": 3, "q_heads": 24, "partition": "whole"},
    {"cp_size": 4, "q_heads": 16, "kv_heads": 1, "head_dim": 256, "v_head_dim": 256, "partition": "contiguous"},
    # Keys that kernels are slower over, or get a copy of.
    {"cp_size": 4, "cache": "paged", "kv_dtype": torch.float8_e4m3fn, "scales": "token"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_launches_lie_between_their_bounds(batch: str, case: dict[str, Any]) -> None:
    for machine in (H100, A100):
        call, ways = calls(batch, machine, **case)
        in_pages = {
            name: attends_over_pages(call.problem, call.plan, machine, kernel, BACKENDS[name]) for name, kernel in call.kernels.items()
        }
        bounds, exact = Bounds(call.launches, in_pages), Launches(call.plan, call.problem, machine)
        for number, kernel in enumerate(machine.kernels):
            name = kernel.backend
            seconds = exact.slowest(ways[0].schedule[0], kernel, over_pages=in_pages[name])
            least, closer, most = bounds.at_least(name), bounds.at_least_by_tiles(name), bounds.at_most_in_rounds(name)
            assert least <= closer * (1 + 1e-9)
            assert closer <= seconds <= most <= bounds.at_most(name)
            # So close that something is gained, with tiles that are full as with reading.
            if batch in ("prompt", "alike") and call.plan.partition == "zigzag" and not (in_pages[name] and kernel.paged > 1):
                assert most < 1.1 * least
            hops = sum(exact.slowest(hop, kernel, over_pages=in_pages[name] and hop.keys == "prefix") for hop in ways[-1].schedule)
            assert bounds.ring_at_least(name) <= hops
            by_heads = [way for way in ways if way.strategy is ULYSSES]
            if by_heads:
                assert bounds.at_least_by_heads(name) <= call.tally(by_heads[number], kernel, exact).compute


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_estimates_are_the_same_with_what_bounds_have_worked_out(batch: str, case: dict[str, Any]) -> None:
    for machine in (H100, A100):
        call, _ = calls(batch, machine, **case)
        leading = call.launches.leading
        parts = [(leading.tiles.spans, leading.tiles.begins, 1)]
        for over_pages in {False, call.problem.cache == "paged"}:
            arguments = parts, call.plan.cp_size, call.problem, call.launches.costs, 1, over_pages
            assert (seconds_of(*arguments, leading) == seconds_of(*arguments)).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_what_is_left_has_what_is_estimated_to_be_the_fastest(batch: str, case: dict[str, Any]) -> None:
    call, ways = calls(batch, H100, **case)
    left, fastest = contenders(call, ways), compared(call, ways)[0]
    assert any(way is fastest.way for way in left)
    assert compared(call, left)[0] == fastest


def test_a_ring_that_hides_its_messages_is_not_left_out() -> None:
    """They are carried by kernels, beside which some backends leave place and others do not."""
    machine = MACHINES["h100-infiniband"]
    plan = cpattn.plan([(0, 20_970)], 2, partition="whole")
    problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 32, 16, 128, 128)
    call = Call(plan, problem, machine, "collectives", {kernel.backend: kernel for kernel in machine.kernels if not kernel.stays})
    ways = [Way(one, partial(one.schedule, problem, plan), BACKENDS[name]) for one in (ALL_GATHER, RING) for name in call.kernels]
    attention = Launches(plan, problem, machine, tuple(call.kernels.values()))
    tallies = [call.tally(way, call.kernels[way.backend.name], attention) for way in ways]
    seconds = [call.seconds(way, tally.seconds, tally.host) for way, tally in zip(ways, tallies, strict=True)]
    fastest = ways[seconds.index(min(seconds))]
    assert fastest.strategy is RING
    assert compared(call, contenders(call, ways))[0].way is fastest


RINGS: dict[str, tuple[list[tuple[int, int]], int, dict[str, Any]]] = {
    # Requests that lie whole on a rank: a ring has nothing to attend to but in the first hop.
    "whole": ([(0, length) for length in (1039, 47, 64, 3178, 1101, 77, 32, 2324)], 4, {"head_dim": 256, "v_head_dim": 256}),
    # As in most hops of a few tokens' ring, of which estimates look at some.
    "tiny": ([(0, 3)], 32, {"fixed": True}),
    # Over whose pages one kernel is slower than over keys in order.
    "first chunk": ([(0, 59_390)], 2, {"cache": "paged", "page_size": 16, "q_heads": 7, "kv_heads": 7, "fixed": True}),
}


@pytest.mark.parametrize("case", RINGS)
def test_a_ring_is_passed_over_for_no_more_than_it_takes(case: str) -> None:
    batch, cp_size, changes = RINGS[case]
    plan = cpattn.plan(batch, cp_size, partition="zigzag" if case == "tiny" else "uncut")
    problem = replace(cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 32, 8, 128, 128, cache="packed"), **changes)
    call = Call(plan, problem, H100, "collectives", {kernel.backend: kernel for kernel in H100.kernels})
    ways = [Way(one, partial(one.schedule, problem, plan), BACKENDS[name]) for one in (ALL_GATHER, RING) for name in call.kernels]
    tallies = {way: call.tally(way, call.kernels[way.backend.name], call.launches) for way in ways}
    seconds = {way: call.seconds(way, tally.seconds, tally.host) for way, tally in tallies.items()}
    found = compared(call, ways)
    assert any(one.at_least for one in found)
    assert all(one.seconds <= seconds[one.way] for one in found)
    assert round(seconds[found[0].way] * 1e9) == round(min(seconds.values()) * 1e9)


def test_most_ways_are_left_out_without_an_estimate() -> None:
    call, ways = calls("alike", H100, cp_size=8)
    assert [(way.strategy.name, way.backend.name) for way in contenders(call, ways)] == [("all_gather", "triton")]
    windowed, ways = calls("alike", H100, cp_size=8, window=64)
    assert contenders(windowed, ways) == ways
