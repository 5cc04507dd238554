"""What a profiler's trace shows of a call: its hops, transfers and launches, by name; and nothing of it where nobody profiles."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs.cases import EXCHANGES, AttentionCase
from inputs.first_strategy import ulysses
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile

import cpattn
from cpattn import Transport
from cpattn.call.arguments import StrategyChoice
from cpattn.call.prepared import PreparedCall
from cpattn.exchange.strategy import Strategy
from cpattn.ranges import profiler_runs
from cpattn.testing import run_loopback

BATCH = [(0, 40), (24, 9), (16, 1)]


def profiled(case: AttentionCase, cp_size: int, strategy: StrategyChoice, backend: str = "reference") -> tuple[Any, PreparedCall]:
    """The events of rank 0's trace, and the call that it made."""
    plan = case.plan(cp_size)

    def program(transport: Transport) -> tuple[Any, PreparedCall] | None:
        meta = plan.metadata(transport.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        cache = case.prefix if case.cache == "packed" else case.pages(plan, transport.rank).cache
        options: dict[str, Any] = {"group": transport, "kv_cache": cache, "strategy": strategy, "backend": backend}
        call = cpattn.prepare(q, k, v, meta, overlap=case.overlap, window=case.window, **options)
        if transport.rank:
            call(q, k, v, cache)
            return None
        # A profiler of torch records the thread that starts it.
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            call(q, k, v, cache)
        return trace.events(), call

    found = run_loopback(program, cp_size)[0]
    assert found is not None
    return found


def names(events: Any) -> Counter[str]:
    return Counter(event.name for event in events if event.name.startswith("cpattn::"))


def expected(call: PreparedCall, launches: int) -> Counter[str]:
    """A range for each hop, transfer and launch, with the name of each."""
    hops = [f"cpattn::{call.strategy.name} hop {hop}/{len(call.schedule)}" for hop in range(len(call.schedule))]
    transfers = len(call.transfers())
    counts = Counter(hops) + Counter({"cpattn::send": transfers, "cpattn::wait": transfers})
    return counts + Counter({f"cpattn::attend {call.backend.name}": launches})


@pytest.mark.parametrize("cp_size", [1, 3])
@pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)
def test_every_hop_transfer_and_launch_is_a_range(strategy: str, cache: str, cp_size: int) -> None:
    events, call = profiled(AttentionCase(BATCH, cache=cache), cp_size, strategy)
    # Every hop of this batch has keys, and so one launch.
    assert names(events) == expected(call, launches=len(call.schedule))


def test_launches_lie_within_their_hops() -> None:
    events, _ = profiled(AttentionCase(BATCH), 3, "ring")
    launches = [event for event in events if event.name == "cpattn::attend reference"]
    assert [event.cpu_parent.name for event in launches] == [f"cpattn::ring hop {hop}/4" for hop in range(4)]
    assert all(event.cpu_parent is None for event in events if event.name in ("cpattn::send", "cpattn::wait"))


def test_groups_of_heads_are_one_hop() -> None:
    events, _ = profiled(AttentionCase(BATCH, overlap=2), 3, "all_gather")
    assert names(events) == {"cpattn::all_gather hop 0/1": 2, "cpattn::attend reference": 2, "cpattn::send": 2, "cpattn::wait": 2}


def test_a_hop_of_several_launches_is_as_many_ranges() -> None:
    """With a window a shard takes a launch for each of an owner's chunks."""
    events, call = profiled(AttentionCase([(0, 60)], window=20), 2, "ring")
    assert [hop.results for hop in call.schedule] == [2, 2]
    found = names(events)
    assert [found[f"cpattn::ring hop {hop}/2"] for hop in range(2)] == [2, 2]


def test_a_strategy_of_ones_own_has_ranges() -> None:
    strategy: Strategy = ulysses()
    events, call = profiled(AttentionCase([(0, 40), (0, 9)]), 2, strategy)
    found = names(events)
    assert found["cpattn::send"] == found["cpattn::wait"] == len(call.transfers())
    assert found["cpattn::ulysses hop 0/1"] == found["cpattn::attend reference"] == 1


def test_other_calls_have_their_transfers() -> None:
    def program(transport: Transport) -> Any:
        meta = cpattn.plan([(0, 8)], 2).metadata(transport.rank)
        x = torch.randn(meta.rows, 2)
        if transport.rank:
            return cpattn.unshard(x, meta, group=transport)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            cpattn.unshard(x, meta, group=transport)
        return trace.events()

    assert names(run_loopback(program, 2)[0]) == {"cpattn::send": 1, "cpattn::wait": 1}


def test_a_profiled_call_gives_the_same_bits() -> None:
    case = AttentionCase(BATCH)
    plan = case.plan(1)
    out, lse = case.on_rank(plan, 0, None, "ring", "reference")
    with profile(activities=[ProfilerActivity.CPU]):
        again, lse_again = case.on_rank(plan, 0, None, "ring", "reference")
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


def test_nobody_profiles_and_no_range_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    honest = profiler.record_function

    def counted(name: str) -> Any:
        made.append(name)
        return honest(name)

    monkeypatch.setattr(profiler, "record_function", counted)
    case = AttentionCase(BATCH)
    case.check_loopback(case.plan(3), "ring", "reference")
    assert not made
    with profile(activities=[ProfilerActivity.CPU]):
        case.on_rank(case.plan(1), 0, None, "ring", "reference")
    assert made


def test_without_torchs_flag_there_are_no_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(profiler, "_is_profiler_enabled")
    assert not profiler_runs()


def test_the_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "profiling.md").read_text()
    code, printed = re.findall(r"^```(?:python|text)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[:2]
    exec(compile(code, "profiling.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_attend_over_pages_is_one_hop() -> None:
    meta = cpattn.build_metadata([(2, 1)], cp_size=1, cp_rank=0)
    pages = torch.randn(4, 16, 2, 8)
    cache = cpattn.PagedKV(pages, pages, torch.tensor([[2]], dtype=torch.int32))
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        cpattn.attend(torch.randn(1, 4, 8), cache, meta, backend="reference")
    assert names(trace.events()) == {"cpattn::resident hop 0/1": 1, "cpattn::attend reference": 1}
