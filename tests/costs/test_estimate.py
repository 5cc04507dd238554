"""What cpattn.estimate promises: which ways it has, in which order, and what it refuses."""

from __future__ import annotations

import time
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

import cpattn
from cpattn.exchange.schedule import bytes_sent
from cpattn.exchange.traveling_keys import traveling_keys

H100 = cpattn.MACHINES["h100-nvlink"]


def problem_of(plan: cpattn.Plan, **changes: Any) -> cpattn.Problem:
    plain: dict[str, Any] = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "v_head_dim": 128}
    return cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, **plain | changes)


def ways(found: cpattn.Estimates) -> set[tuple[str, str, int, str]]:
    return {(one.strategy, one.transport, one.overlap, one.backend) for one in found}


def test_all_ways_the_fastest_first() -> None:
    plan = cpattn.plan([(0, 8192)], 4)
    found = cpattn.estimate(plan, problem_of(plan), "h100-nvlink")
    backends, transports = ("triton", "flash_attn4", "flash_attn3"), ("collectives", "peer_memory")
    expected = {("all_gather", transport, overlap, backend) for transport in transports for overlap in (1, 2, 4, 8) for backend in backends}
    expected |= {
        (strategy, transport, 1, backend)
        for strategy in ("ring", "pass_q", "pass_q_ring", "ulysses")
        for transport in transports
        for backend in backends
    }
    assert ways(found) == expected
    assert len(found) == len(expected)
    assert [one.graph for one in found] == sorted(one.graph for one in found)
    assert found[0] == min(found, key=lambda one: one.graph)
    assert found[:2] == list(found)[:2]
    assert found.passed_over == {}
    with pytest.raises(FrozenInstanceError):
        found[0].compute = 0.0  # type: ignore[misc]


def test_the_parts_of_an_estimate() -> None:
    plan = cpattn.plan([(0, 8192)], 4)
    problem = problem_of(plan)
    for one in cpattn.estimate(plan, problem, "h100-nvlink"):
        schedule = cpattn.STRATEGIES[one.strategy].schedule(replace(problem, overlap=one.overlap), plan)
        assert one.bytes_sent == bytes_sent(schedule).max()
        assert 0 < one.exposed <= one.transfer
        assert one.graph == one.compute + one.moves + one.exposed
        assert one.eager == max(one.graph, one.host)
        assert one.launches > 1


def test_equal_ones_are_in_the_order_of_their_names() -> None:
    """Nothing new: no launch takes time but for its kernels' overhead, which is made the same."""
    plan = cpattn.plan([(10, 0)], 2)
    h100 = cpattn.MACHINES["h100-nvlink"]
    alike = replace(h100, kernels=tuple(replace(kernel, host=0.0) for kernel in h100.kernels))
    found = cpattn.estimate(plan, problem_of(plan, cache="packed"), alike)
    names = [(round(one.graph * 1e9), one.strategy, one.backend, one.overlap, one.transport) for one in found]
    assert names == sorted(names)
    assert len({name[0] for name in names}) < len(names)


def test_it_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same again to the last bit, whatever is installed here and without a look at a device."""
    batch = [(0, 8192), (500, 77)]
    first, second = ((plan := cpattn.plan(batch, 4), problem_of(plan, cache="packed")) for _ in range(2))
    before = list(cpattn.estimate(*first, "h200-nvlink"))
    monkeypatch.setattr(torch, "cuda", None)
    assert list(cpattn.estimate(*second, "h200-nvlink")) == before


def test_it_prints_as_a_table() -> None:
    plan = cpattn.plan([(0, 8192)], 2)
    first, header, _, *lines = repr(cpattn.estimate(plan, problem_of(plan), "h200-nvlink")).splitlines()
    assert first == "on h200-nvlink; times in us"
    assert header.split() == [
        *("strategy", "transport", "overlap", "backend", "graph", "eager", "compute", "moves", "exposed", "transfer", "host", "sent"),
        "launches",
    ]
    assert lines[0].split()[:2] == ["all_gather", "peer_memory"]


def test_peer_memory_is_for_one_host() -> None:
    plan = cpattn.plan([(0, 65536)], 16)
    assert {one.transport for one in cpattn.estimate(plan, problem_of(plan), "h100-nvlink")} == {"collectives"}
    pair = cpattn.plan([(0, 65536)], 2)
    assert {one.transport for one in cpattn.estimate(pair, problem_of(pair), "h100-infiniband")} == {"collectives"}


def test_one_rank_sends_nothing() -> None:
    plan = cpattn.plan([(0, 4096), (9, 1)], 1)
    for one in cpattn.estimate(plan, problem_of(plan, cache="packed"), "h100-nvlink"):
        assert one.bytes_sent == one.transfer == one.exposed == 0
        assert one.compute > 0


def test_an_empty_batch() -> None:
    plan = cpattn.plan([], 2)
    assert all(one.compute == one.transfer == 0 for one in cpattn.estimate(plan, problem_of(plan), "h100-nvlink"))


def test_pages_that_one_rank_has_all_keys_for_before_the_attention() -> None:
    """Others get the rest beside it, which takes no less than nothing."""
    plan = cpattn.plan([(1724, 0), (244, 2), (1982, 1), (647, 17)], 8, partition="whole", pad_to=8)
    problem = problem_of(plan, cache="paged", page_size=64)
    travels = traveling_keys(problem, plan)
    assert travels.what == "needed"
    assert max(travels.needed, int(travels.sent.max())) == plan.num_tokens - min(plan.rank_tokens)
    assert travels.rest > 0
    assert min(one.exposed for one in cpattn.estimate(plan, problem, "h100-infiniband")) >= 0


def test_strategies_that_cannot_serve_are_passed_over() -> None:
    plan = cpattn.plan([(100, 5)], 2, prefix_shards=[[50, 50]])
    found = cpattn.estimate(plan, problem_of(plan, cache="paged", page_size=64), "h100-nvlink")
    assert {one.strategy for one in found} == {"ring", "pass_q", "pass_q_ring"}
    assert found.passed_over["all_gather"] == "it would bring the whole of a sharded cache to every rank"
    assert set(found.passed_over) == {"all_gather", "ulysses"}


def test_backends_that_cannot_serve_are_passed_over_whatever_is_installed() -> None:
    plan = cpattn.plan([(0, 500)], 2)
    found = cpattn.estimate(plan, problem_of(plan, head_dim=64, v_head_dim=64, softcap=20.0, window=100), "a100-nvlink")
    assert {one.backend for one in found} == {"flash_attn2"}
    assert found.passed_over["all_gather, torch_flash"] == "it has no softcap"
    assert found.passed_over["ring"] == "with a window its hops are not estimated"


def test_head_dims_are_refused_by_the_rules_of_a_gpu_that_is_not_here() -> None:
    plan = cpattn.plan([(0, 500)], 2)
    found = cpattn.estimate(plan, problem_of(plan, head_dim=128, v_head_dim=64), "h100-nvlink")
    assert {one.backend for one in found} == {"triton", "flash_attn4"}
    assert found.passed_over["ring, flash_attn3"].startswith("of head dims that differ it takes up to 64 and 512")


@pytest.mark.parametrize(("page_size", "copied"), [(64, {"flash_attn4"}), (16, set())])
def test_packed_copies_of_pages_are_counted(page_size: int, copied: set[str]) -> None:
    """Once for one rank: each key is read and written."""
    plan, h100 = cpattn.plan([(8192, 1)] * 8, 1), cpattn.MACHINES["h100-nvlink"]
    problem = problem_of(plan, cache="paged", page_size=page_size)
    moves = {one.backend: one.moves for one in cpattn.estimate(plan, problem, h100) if one.strategy == "all_gather"}
    copy = h100.launch + 2 * 8 * 8193 * problem.key_bytes / h100.copy
    assert moves == {name: pytest.approx(moves["triton"] + (copy if name in copied else 0)) for name in moves}


def test_a_window_takes_less() -> None:
    plan = cpattn.plan([(0, 65536)], 2)
    whole, window = (
        {one.backend: one.compute for one in cpattn.estimate(plan, problem_of(plan, window=window), "h100-nvlink") if one.overlap == 1}
        for window in (None, 1024)
    )
    assert all(window[name] < whole[name] / 10 for name in window)


def test_decoding_with_a_window_reads_the_window() -> None:
    """As long as decoding after as many tokens as are seen: one more or less makes no tile."""
    h100 = cpattn.MACHINES["h100-nvlink"]
    estimates = (
        cpattn.estimate(plan, problem_of(plan, cache="packed", window=window), h100)
        for plan, window in ((cpattn.plan([(1023, 1)] * 64, 1), None), (cpattn.plan([(131072, 1)] * 64, 1), 1024))
    )
    wide, windowed = ({one.backend: one.compute for one in found if one.strategy == "all_gather"} for found in estimates)
    overhead = {kernel.backend: kernel.overhead for kernel in h100.kernels}
    assert {name: windowed[name] - overhead[name] for name in wide} == {
        name: pytest.approx(wide[name] - overhead[name], rel=0.15) for name in wide
    }


def test_a_thousand_ranks_take_seconds() -> None:
    plan = cpattn.plan([(0, 131072)], 1024)
    begin = time.perf_counter()
    assert cpattn.estimate(plan, problem_of(plan), "h100-nvlink")
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize(
    ("changes", "machine", "error", "message"),
    [
        ({}, "h100", cpattn.UnknownNameError, "machine='h100' is unknown; choose one of 'h100-nvlink', .* or pass a cpattn.Machine"),
        ({}, 3, cpattn.OptionError, "machine=3; pass a cpattn.Machine, or the name of one"),
        ({"rows": 3}, "h100-nvlink", cpattn.OptionError, r"problem.rows=3, but the plan's ranks have 50; pass rows=plan.rows"),
        ({"kv_heads": 0}, "h100-nvlink", cpattn.OptionError, "problem.kv_heads=0; it must be an integer of at least 1"),
        ({"head_dim": 64.5}, "h100-nvlink", cpattn.OptionError, "problem.head_dim=64.5; it must be an integer of at least 1"),
        ({"window": 0}, "h100-nvlink", cpattn.OptionError, "problem.window=0; pass the number of keys that a query sees"),
        ({"cache": "sharded"}, "h100-nvlink", cpattn.OptionError, "problem.cache='sharded'; it must be 'packed', 'paged' or None"),
        ({"cache": "paged"}, "h100-nvlink", cpattn.OptionError, "page_size=None with cache='paged'; pass the tokens of a page"),
        ({"cache": "paged", "page_size": 0}, "h100-nvlink", cpattn.OptionError, "page_size=0 with cache='paged'; pass the tokens"),
        ({"page_size": 16}, "h100-nvlink", cpattn.OptionError, "page_size=16, but there are no pages with cache=None; leave it out"),
        ({"kv_heads": 5}, "h100-nvlink", cpattn.HeadCountError, "q_heads=32 is no multiple of kv_heads=5"),
        ({"dtype": torch.float32}, "h100-nvlink", cpattn.UnsupportedError, "dtype=torch.float32; estimates are for torch.b"),
        ({"head_dim": 576, "v_head_dim": 512}, "h100-nvlink", cpattn.UnsupportedError, "head_dim=576; estimates are for"),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, Any], machine: Any, error: type[Exception], message: str) -> None:
    plan = cpattn.plan([(0, 100)], 2)
    with pytest.raises(error, match=message):
        cpattn.estimate(plan, replace(problem_of(plan), **changes), machine)


def test_prefixes_need_a_cache() -> None:
    plan = cpattn.plan([(9, 7)], 2)
    with pytest.raises(cpattn.PrefixError, match="cache=None, but the batch has 9 prefix tokens; pass cache='packed' or 'paged'"):
        cpattn.estimate(plan, problem_of(plan), "h100-nvlink")


def test_a_backend_that_is_no_backend() -> None:
    plan, h100 = cpattn.plan([(0, 7)], 2), cpattn.MACHINES["h100-nvlink"]
    other = replace(h100, name="my own", kernels=(replace(h100.kernels[0], backend="mine"),))
    with pytest.raises(
        cpattn.UnknownNameError, match=r"'my own' has constants for backend='mine', which is unknown; .* one of 'flash_attn4'"
    ):
        cpattn.estimate(plan, problem_of(plan), other)


@pytest.mark.parametrize(
    ("costs", "name", "value", "message"),
    [
        (H100, "kernels", (), r"Machine.kernels=\(\); pass a KernelCosts for each backend, one at least"),
        (H100, "kernels", H100.kernels[:1] * 2, "Machine.kernels are of 'triton', 'triton'; pass one of each backend"),
        (H100, "multiprocessors", 0, "Machine.multiprocessors=0; it must be a finite number, more than 0"),
        (H100, "multiprocessors", 132.5, "Machine.multiprocessors=132.5; it must be a whole number"),
        (H100.kernels[0], "backend", 3, "KernelCosts.backend=3; pass the name of one of cpattn.BACKENDS"),
        (H100.kernels[0], "flops", float("nan"), "KernelCosts.flops=nan; it must be a finite number, more than 0"),
        (H100.kernels[0], "fp8_of_tokens", 0, "KernelCosts.fp8_of_tokens=0; it must be a finite number, more than 0"),
        (H100.kernels[0], "overhead", -1e-6, "KernelCosts.overhead=-1e-06; it must be a finite number, at least 0"),
        (H100.collectives, "gather", "fast", "LinkCosts.gather='fast'; it must be a finite number, more than 0"),
        (H100.collectives, "hides_shift", 2, "LinkCosts.hides_shift=2; it is a part, of 1 at most"),
    ],
)
def test_constants_that_no_machine_has(costs: Any, name: str, value: Any, message: str) -> None:
    with pytest.raises(cpattn.OptionError, match=message):
        replace(costs, **{name: value})


def test_a_link_over_nothing_known() -> None:
    with pytest.raises(cpattn.UnknownNameError, match="transport='nccl' is unknown; choose one of 'peer_memory', 'collectives'"):
        cpattn.MACHINES["h100-nvlink"].link("nccl", 2)


def test_nothing_known_can_serve() -> None:
    plan = cpattn.plan([(9, 7)], 2, prefix_shards=[[4, 5]])
    h100 = cpattn.MACHINES["h100-nvlink"]
    with pytest.raises(
        cpattn.UnsupportedError, match="nothing that is known of 'h100-nvlink' can serve this call: all_gather: prefix_shards say how"
    ):
        cpattn.estimate(plan, problem_of(plan, cache="packed", window=3), h100)


def test_what_is_no_plan_or_problem() -> None:
    plan = cpattn.plan([(0, 100)], 2)
    with pytest.raises(cpattn.OptionError, match=r"plan is a list; pass what cpattn.plan\(batch, cp_size\) returns"):
        cpattn.estimate([(0, 100)], problem_of(plan), "h100-nvlink")  # type: ignore[arg-type]
    with pytest.raises(cpattn.OptionError, match=r"problem is a dict; pass a cpattn.Problem"):
        cpattn.estimate(plan, {}, "h100-nvlink")  # type: ignore[arg-type]
