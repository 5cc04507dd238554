"""What ``auto`` takes, beside the fastest of the ways that were measured over the memory of peers: its loss on each line.

Tables of before keys came late are computed with a machine whose kernels wait for all keys, as the library was then.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import pytest
import torch
from references.measured_tables import (
    PEERS_TABLES,
    RESULTS,
    Way,
    backends_lines,
    batch_of,
    before_late_keys,
    before_short_messages,
    estimate,
    late_keys_ways,
    number,
    peers_ways,
    problem_of,
    scaling_ways,
    transports_ways,
)

import cpattn
from cpattn.attention import auto
from cpattn.attention.registry import BACKENDS
from cpattn.call.choose import Choice
from cpattn.call.explain_choice import explain_backend, explain_strategy
from cpattn.costs import known_machine
from cpattn.costs.corrections import corrected
from cpattn.costs.decide import Decision, Setting
from cpattn.costs.leading_tiles import LeadingTiles
from cpattn.exchange.auto import candidate_strategies
from cpattn.exchange.resident import RESIDENT
from cpattn.exchange.resident_shards import RESIDENT_SHARDS
from cpattn.machine import H100, H200
from cpattn.metadata.auto_partition import USUAL

MOST_LOSS = 0.02
# Lines on which more is lost: by so much at most.
EXCUSED = {
    # A few us, of graphs whose 20th and 80th percentiles overlap.
    ("transports_2_gpus", "1 x 1k", "graph"): 0.15,
    ("peers_4_gpus", "1 x 1k", "graph"): 0.06,
    # In graphs of 4 layers; in those of 32 it is the other way (peers_2_gpus.csv).
    ("late_keys, 2", "1 x 1k", "graph"): 0.16,
    # As a graph the two are as fast, and so they were eagerly in an earlier run.
    ("peers_2_gpus", "1 x 32k", "eager"): 0.03,
    # The two are estimated to be 1% apart, and were 3%; with late keys neither is taken.
    ("peers_4_gpus", "8 x (8k + 2k)", "graph"): 0.04,
}


# The same where backends were compared: estimates that are 0.2% apart.
EXCUSED_BACKENDS = {("backends_gpu_merging", "1 x 128k, ring of 8"): 0.021}


class Timed(NamedTuple):
    """Ways to serve a batch, with the microseconds that were measured."""

    key: tuple[str, str, str]
    machine: cpattn.Machine
    ways: dict[Way, float]


def tables() -> Iterator[tuple[str, cpattn.Machine, Way, dict[str, str]]]:
    for name, (_, machine) in PEERS_TABLES.items():
        for way, row in peers_ways(name):
            yield name, machine.rested(), way, row
    for way, row in transports_ways():
        yield "transports_2_gpus", before_late_keys(H200.rested()), way, row
    for way, row in scaling_ways():
        yield f"scaling_4_gpus, {way.cp_size}", H100.rested(), way, row
    for way, beside, measured in late_keys_ways():
        if beside:
            yield f"late_keys, {way.cp_size}", before_short_messages(H100), way, {"graph, p50, us": str(measured)}


def timed() -> list[Timed]:
    found: dict[tuple[str, str, str], Timed] = {}
    for name, machine, way, row in tables():
        # Queries travel over sharded caches alone.
        if way.transport == "peer_memory" and not way.strategy.startswith("pass_q"):
            for column in ("graph", "eager"):
                if f"{column}, p50, us" in row:
                    key = name, way.batch, column
                    found.setdefault(key, Timed(key, machine, {})).ways[way] = number(row[f"{column}, p50, us"])
    return [one for one in found.values() if len(one.ways) > 1]


def seconds(way: Way, machine: cpattn.Machine, column: str) -> float:
    one = estimate(way, machine)
    return corrected(way.strategy, one.graph, one.host, as_graph=column == "graph")


def test_no_more_than_2_percent_are_lost_but_where_it_is_said() -> None:
    lines = timed()
    assert len(lines) >= 70
    losses = {}
    for key, machine, ways in lines:
        chosen = min(ways, key=lambda way: seconds(way, machine, key[-1]))
        losses[key] = ways[chosen] / min(ways.values()) - 1
    lost = {key: f"{loss:.1%}" for key, loss in losses.items() if loss > EXCUSED.get(key, MOST_LOSS)}
    assert not lost
    # What is excused is needed, and the figures of the page are these.
    assert all(losses[key] > MOST_LOSS for key in EXCUSED)
    assert sum(losses.values()) / len(losses) < 0.006
    more = [loss for loss in losses.values() if loss > MOST_LOSS]
    page = " ".join((RESULTS.parents[1] / "docs" / "choosing.md").read_text().split())
    assert f"Of {len(lines)} lines {len(lines) - len(more)} lose at most {MOST_LOSS:.0%} to the fastest way. " in page
    assert f"The others lose {100 * min(more):.0f} to {max(more):.0%}, and stand in the test with their reasons." in page


@pytest.mark.parametrize("name", ["backends_gpu_fa3", "backends_gpu_fa4", "backends_gpu_merging"])
def test_backends_of_whole_calls_over_pages_with_sinks_and_in_rings(name: str) -> None:
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in backends_lines(name):
        lines.setdefault((name, line.key[1]), []).append((line.estimated, line.measured))
    for key, ways in lines.items():
        _, chosen = min(ways)
        assert chosen <= min(measured for _, measured in ways) * (1 + EXCUSED_BACKENDS.get(key, MOST_LOSS)), key


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """All backends of a GPU can serve, as on an H100."""
    for module in (auto, known_machine):
        monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    able: dict[str, Any] = {"unavailable": lambda: None, "refuses": lambda problem: None, "how": lambda problem: None}
    for name, backend in BACKENDS.items():
        monkeypatch.setitem(BACKENDS, name, replace(backend, **able, reads_pages=partial(_reads, name != "flash_attn4")))


def _reads(pages: bool, problem: cpattn.Problem) -> bool:
    return pages


def decided(
    batch: str, cp_size: int, *, fixed: bool, transport: str = "peer_memory", machine: cpattn.Machine = H100, **changes: Any
) -> Decision:
    plan = cpattn.plan(batch_of(batch), cp_size)
    problem = replace(problem_of(plan, None), fixed=fixed, **changes)
    return Setting(plan, problem, machine, transport).decide(candidate_strategies("auto", problem, plan), "auto")


def choice_of(decision: Decision) -> Choice:
    way = decision.way
    return Choice(decision.call.problem, way.strategy, way.schedule, way.backend, decision)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("batch", ["1 x 1k", "1 x 8k", "8 x (8k + 2k)", "1 x (120k + 2k)"])
@pytest.mark.parametrize("fixed", [False, True])
def test_it_is_the_least_of_all_that_are_estimated(batch: str, fixed: bool) -> None:
    """Rings that are passed over by what they take at least would have taken no less."""
    decision = decided(batch, 4, fixed=fixed)
    column = "graph" if fixed else "eager"
    every = {
        (strategy, backend): seconds(Way(batch, 4, strategy, "peer_memory", backend), H100, column)
        for strategy in ("all_gather", "ring", "ulysses")
        for backend in ("triton", "flash_attn3", "flash_attn4")
    }
    assert len(decision.compared) == len(every)
    for one in decision.compared:
        exact = every[one.way.strategy.name, one.way.backend.name]
        assert one.seconds <= exact * (1 + 1e-9) if one.at_least else one.seconds == pytest.approx(exact)
    chosen = decision.way.strategy.name, decision.way.backend.name
    assert every[chosen] == min(every.values())


@pytest.mark.usefixtures("on_hopper")
def test_nothing_is_left_of_what_launches_were_estimated_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision is remembered with its batch, and engines keep Python from looking for cycles."""
    made: list[Any] = []
    initialize = LeadingTiles.__init__

    def initialized(tiles: LeadingTiles, *arguments: Any) -> None:
        made.append(ref(tiles))
        initialize(tiles, *arguments)

    monkeypatch.setattr(LeadingTiles, "__init__", initialized)
    gc.disable()
    try:
        decision = decided("8 x 8k", 2, fixed=True)
        left = [tiles for tiles in made if tiles() is not None]
    finally:
        gc.enable()
    assert decision.way in decision.ways
    assert made
    assert not left


@pytest.mark.usefixtures("on_hopper")
def test_small_eager_batches_take_the_least_host_time_and_graphs_the_fastest_on_the_device() -> None:
    """Without flash_attn3, which is fast at both."""
    taken = {}
    for batch in ("1 x 1k", "1 x 8k", "1 x 32k"):
        for fixed in (False, True):
            compared = decided(batch, 2, fixed=fixed).compared
            taken[batch, fixed] = next(one.way.backend.name for one in compared if one.way.backend.name != "flash_attn3")
    eager, graph = ([taken[batch, fixed] for batch in ("1 x 1k", "1 x 8k", "1 x 32k")] for fixed in (False, True))
    assert eager == ["triton", "triton", "flash_attn4"]
    assert graph == ["triton", "triton", "flash_attn4"]


@pytest.mark.usefixtures("on_hopper")
def test_what_is_done_to_results_for_sinks_counts() -> None:
    """flash_attn3 has none of its own."""
    for batch, backend in (("1 x 32k", "flash_attn4"), ("64 x 512", "triton")):
        assert decided(batch, 2, fixed=True, transport="collectives", sinks=True).way.backend.name == backend


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("batch", "taken"), [([(131071, 1)], "flash_attn3"), ([(30720, 2048)], "triton")], ids=["decode", "prefill"])
def test_what_attends_to_pages_alone_is_estimated_too(batch: list[tuple[int, int]], taken: str) -> None:
    """Of one rank, and of two that hold a shard each."""
    for cp_size, strategy in ((1, RESIDENT), (2, RESIDENT_SHARDS)):
        shards = None if cp_size == 1 else [[prefix // 2, prefix - prefix // 2] for prefix, _ in batch]
        plan = cpattn.plan(batch, cp_size, prefix_shards=shards)
        setting = Setting(plan, replace(problem_of(plan, 64), fixed=True), H100, "peer_memory")
        assert setting.decide([[strategy]], "auto").way.backend.name == taken


@pytest.mark.usefixtures("on_hopper")
def test_a_first_chunk_over_pages_goes_to_a_kernel_that_is_slower_there() -> None:
    """It sees keys in order, and the pages are written after it; but in a bucket, whose next batch may have cached ones."""
    for fixed, backend in ((False, "flash_attn3"), (True, "triton")):
        decision = decided("1 x 32k", 2, fixed=fixed, machine=H100.only("triton", "flash_attn3"), cache="paged", page_size=256)
        choice = choice_of(decision)
        assert (choice.strategy.name, choice.backend.name) == ("all_gather", backend)
        assert choice.writes_pages_after(choice.problem, decision.call.plan) == (not fixed)


@pytest.mark.usefixtures("on_hopper")
def test_over_slow_links_a_ring_hides_what_travels() -> None:
    """As kernels leave room for those of the transfers."""
    slow = cpattn.MACHINES["h100-infiniband"]
    assert decided("1 x 32k", 4, fixed=True, transport="collectives", machine=slow).way.strategy.name == "ring"
    assert decided("1 x 32k", 4, fixed=True).way.strategy.name == "all_gather"


@pytest.mark.usefixtures("on_hopper")
def test_heads_are_divided_where_that_is_clearly_faster_by_the_model() -> None:
    """A long prompt over eight ranks, whose keys all would read of one after the other; not where it takes the host longer, nor over pages,
    which want all heads, nor of fewer heads than ranks."""
    assert decided("1 x 32k", 8, fixed=True).way.strategy.name == "ulysses"
    assert decided("1 x 1k", 8, fixed=False).way.strategy.name == "all_gather"
    assert decided("1 x 32k", 8, fixed=True, q_heads=4, kv_heads=1).way.strategy.name != "ulysses"
    assert decided("1 x 32k", 8, fixed=True, cache="paged", page_size=64).way.strategy.name != "ulysses"


def test_a_gpu_that_is_not_known_takes_the_first_of_its_order(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (auto, known_machine):
        monkeypatch.setattr(module, "capability", lambda device: (10, 0))
    machine = known_machine.machine_of(torch.device("cuda"))
    assert machine.name == "h100-nvlink, as this machine is unknown"
    decision = decided("1 x 8k", 2, fixed=False, machine=machine)
    assert decision.way.backend.name == "flash_attn4"
    assert [one.way.strategy.name for one in decision.compared] == ["all_gather", "ring", "ulysses"]


@pytest.mark.usefixtures("on_hopper")
def test_explain_names_what_was_compared() -> None:
    plan = cpattn.plan(batch_of("8 x (8k + 2k)"), 2)
    problem = problem_of(plan, None)
    decision = Setting(plan, problem, H100, "peer_memory").decide(candidate_strategies("auto", problem, plan), "auto")
    choice = choice_of(decision)
    backends, strategies = explain_backend(choice), explain_strategy(choice, plan)
    assert list(backends)[:3] == ["triton", "flash_attn3", "flash_attn4"]
    assert re.fullmatch(r"chosen, estimated [\d,]+ us", backends["triton"])
    assert re.fullmatch(r"able, estimated [\d,]+ us", backends["flash_attn4"])
    assert backends["torch_flash"] == "able, its time is not estimated"
    ways = r"all_gather with triton estimated [\d,]+ us, \w+ with \w+ (estimated|at least) [\d,]+ us"
    assert re.fullmatch(rf"chosen, {ways}: eagerly over peer_memory on h100-nvlink", strategies["all_gather"])
    assert re.fullmatch(r"able, (estimated|at least) [\d,]+ us", strategies["ring"])


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("batch", "cp_size", "said"), [("1 x 8k", 2, ""), ("1 x 8k", 8, "Over collectives"), ("64 x 512", 8, "")], ids=str)
def test_explain_says_where_the_model_has_collectives_faster(batch: str, cp_size: int, said: str) -> None:
    """Where ranks share memory it is taken, whatever the model says of more of them than were measured."""
    plan = cpattn.plan(batch_of(batch), cp_size)
    # Of fewer heads than ranks none can be divided.
    problem = replace(problem_of(plan, None), q_heads=4, kv_heads=1, fixed=True)
    decision = Setting(plan, problem, H100, "peer_memory").decide(candidate_strategies("auto", problem, plan), "auto")
    text = explain_strategy(choice_of(decision), plan)[decision.way.strategy.name]
    expected = (
        rf"{said} it is estimated at \d+ us, and the memory of peers is taken wherever ranks share it: more than 4 GPUs were not measured, "
        "and how they crowd at one of them is a guess"
    )
    assert re.search(expected, text) if said else "collectives" not in text


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("NVIDIA H200 NVL", "h200-nvlink"),
        ("NVIDIA H100 80GB HBM3", "h100-nvlink"),
        ("NVIDIA GH200 480GB", "h100-nvlink, as this machine is unknown"),
    ],
)
def test_machines_are_known_by_name(name: str, machine: str, on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert known_machine.machine_of(torch.device("cuda")).name == machine


def test_a_machine_for_a_problem_has_the_backends_that_can_serve_it(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(**changes: Any) -> list[str]:
        return [kernel.backend for kernel in cpattn.machine_for(replace(USUAL, **changes)).kernels]

    assert names() == ["triton", "flash_attn4", "flash_attn3"]
    assert names(dtype=torch.float32) == ["triton"]
    missing = replace(BACKENDS["flash_attn3"], unavailable=lambda: "it is not installed")
    monkeypatch.setitem(BACKENDS, "flash_attn3", missing)
    assert names() == ["triton", "flash_attn4"]
    assert names(device=torch.device("cpu")) == ["triton"]


def test_choosing_is_pure(on_hopper: None) -> None:
    first, second = (decided("64 ragged + ~4k prefix", 4, fixed=False) for _ in range(2))
    assert [(one.way.strategy.name, one.way.backend.name, one.seconds) for one in first.compared] == [
        (one.way.strategy.name, one.way.backend.name, one.seconds) for one in second.compared
    ]
