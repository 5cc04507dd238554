"""Groups in two dimensions: each rank's parts, what they share with the whole, and calls over them that fail."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from inputs.cases import AttentionCase
from programs import split_programs as programs
from programs.failed_calls import Faults, check_partly_failed

import cpattn
from cpattn.testing import SoloCommunicator, run_loopback
from cpattn.transports.in_flight import InFlight

CPU = torch.device("cpu")
ALL_SPLITS = [(size, sizes) for size, splits in programs.SPLITS.items() for sizes in splits] + [(8, (2, 2, 2)), (12, (2, 1, 3, 2))]


@pytest.mark.parametrize(("size", "sizes"), ALL_SPLITS, ids=str)
def test_collectives_along_each_axis(size: int, sizes: tuple[int, ...]) -> None:
    programs.check_axes(size, sizes, run_loopback(lambda group: programs.use_axes(group, sizes, CPU, torch.float32), size))


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q", "pass_q_ring"])
def test_attention_along_each_axis(strategy: str) -> None:
    cases = [AttentionCase([(0, 40), (12, 23)], seed=n) for n in range(3)]
    results = run_loopback(lambda group: programs.attend_along_axes(group, (2, 3), cases, strategy), 6)
    lines: list[list[list[int]]] = [[[0, 3], [1, 4], [2, 5]], [[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4, 5]]]
    for n, (case, parts) in enumerate(zip(cases, lines, strict=True)):
        for ranks in parts:
            case.check([results[rank][n] for rank in ranks], case.plan(len(ranks)), strategy, "cpu")


def test_the_same_sizes_give_the_same_transports() -> None:
    group = cpattn.LoopbackGroup(12).transport(7)
    outer, inner = group.split(3, 4)
    assert group.split(3, 4) == (outer, inner)
    assert group.split(np.int64(3), 2, 2)[0] is outer
    # An axis of all ranks is the group itself; other sizes may have an axis in common, and so may a part's own.
    assert group.split(1, 12)[1] is group.split(12)[0] is group
    assert inner.split(2, 2) == group.split(3, 2, 2)[1:]
    assert inner.split(1, 4)[1] is inner
    assert cpattn.transport(outer) is outer
    assert outer.check_usable() is None  # type: ignore[func-returns-value]
    assert repr(inner).endswith("(rank 3 of 4, ranks 4, 5, 6, 7 of a larger group)")
    assert {part.part for part in group.parts()} == {(3, 7, 11), (4, 5, 6, 7), (7,), (5, 7), (6, 7)}
    assert {part.part for part in inner.parts()} == {(7,), (5, 7), (6, 7)}


def test_a_solo_transport_has_parts() -> None:
    outer, inner = SoloCommunicator(4, 6).split(2, 3)
    assert [(part.rank, part.size) for part in (outer, inner)] == [(1, 2), (1, 3)]
    meta = cpattn.build_metadata([(0, 30)], 3, 1)
    x = torch.randn(10, 2, 8)
    assert cpattn.cp_attention(x, x, x, meta, group=inner).shape == (10, 2, 8)


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ((2, 2), cpattn.GroupError, r"split\(2, 2\) asks for 4 ranks, but the group has 6; the sizes of its axes must multiply to 6"),
        ((7,), cpattn.GroupError, "asks for 7 ranks"),
        ((), cpattn.OptionError, r"split\(\): pass the number of ranks along each axis, integers of at least 1"),
        ((6, 0), cpattn.OptionError, r"split\(6, 0\)"),
        ((-2, -3), cpattn.OptionError, r"split\(-2, -3\)"),
        ((2.0, 3), cpattn.OptionError, r"split\(2.0, 3\)"),
        ((True, 6), cpattn.OptionError, r"split\(True, 6\)"),
        (((2, 3),), cpattn.OptionError, r"split\(\(2, 3\)\)"),
    ],
)
def test_sizes_that_do_not_fit(sizes: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        cpattn.LoopbackGroup(6).transport(0).split(*sizes)


class OfOnesOwn(cpattn.Communicator):
    """As users wrote them before transports had parts."""

    def _all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Any:
        raise NotImplementedError

    _shift = _all_to_all = _all_gather  # type: ignore[assignment]


def test_a_transport_without_parts_says_so() -> None:
    group = OfOnesOwn(0, 4)
    assert group.split(4) == (group,)
    with pytest.raises(cpattn.UnsupportedError, match=r"OfOnesOwn cannot be split: .*PairwiseTransport"):
        group.split(2, 2)


def test_the_whole_starts_what_its_parts_have_prepared() -> None:
    """One call over the group, with transfers along its axes."""

    def program(group: cpattn.Transport) -> list[list[float]]:
        outer, inner = group.split(2, 3)
        x, along, across = torch.zeros(1), torch.zeros(3), torch.zeros(1)
        with InFlight(group, x.device) as in_flight:
            in_flight.expect(lambda: [inner.prepare_all_gather(along, x), outer.prepare_shift(across, x)])
            x.fill_(group.rank)
            for work in [in_flight.start(), in_flight.start()]:
                work.wait()
        assert (group.bytes_sent, outer.bytes_sent, inner.bytes_sent) == (12, 0, 0)
        # And a part what another one or the whole has.
        gathered = torch.zeros(6)
        outer.start(group.prepare_all_gather(gathered, x)).wait()
        outer.start(inner.prepare_all_gather(along, x)).wait()
        assert outer.bytes_sent == 20 + 8
        return [along.tolist(), across.tolist(), gathered.tolist()]

    for rank, results in enumerate(run_loopback(program, 6)):
        first = rank // 3 * 3
        assert results == [[first, first + 1, first + 2], [(rank + 3) % 6], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q", "pass_q_ring"])
@pytest.mark.parametrize("line", [0, 40, 120])
def test_a_rank_that_raises_in_a_part(strategy: str, line: int) -> None:
    """The part's ranks stay in step, those of the other part do not notice, and the whole goes on."""
    case = AttentionCase([(0, 40), (12, 23)])
    run = partial(programs.fail_along_an_axis, sizes=(2, 3), case=case, faults=Faults({4: line}), strategy=strategy)
    results = run_loopback(run, 6, timeout=20)
    plan = case.plan(3)
    for ranks in ([0, 1, 2], [3, 4, 5]):
        check_partly_failed(case, plan, strategy, [results[rank][0] for rank in ranks])
        case.check([results[rank][1] for rank in ranks], plan, strategy, "cpu")
    assert all(results[rank][0] is not None for rank in range(3))
    case.check([result[2] for result in results], case.plan(6), strategy, "cpu")


def test_a_transfer_that_fails_along_one_axis_gives_up_all_of_them() -> None:
    group = cpattn.LoopbackGroup(4, timeout=0.1).transport(0)
    outer, inner = group.split(2, 2)
    x = torch.zeros(4, 1, 8)
    with pytest.raises(cpattn.GroupError, match="a transfer over it failed"):
        cpattn.cp_attention(x, x, x, cpattn.build_metadata([(0, 8)], 2, 0), group=inner)
    for part in (inner, outer, group):
        meta = cpattn.build_metadata([(0, 4 * part.size)], part.size, 0)
        with pytest.raises(cpattn.GroupError, match="this group cannot be used any more: a transfer over it failed"):
            cpattn.cp_attention(x, x, x, meta, group=part)


def test_a_call_over_a_part_excludes_those_over_the_whole() -> None:
    group = cpattn.LoopbackGroup(4).transport(0)
    _, inner = group.split(2, 2)
    entered, over = threading.Event(), threading.Event()
    said: list[str] = []

    def hold() -> None:
        try:
            with InFlight(inner, CPU):
                entered.set()
                over.wait(10)
        except cpattn.GroupError as error:
            said.append(str(error))

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(10)
    try:
        with pytest.raises(cpattn.GroupError, match="a call is under way on this group, whose memory it uses"):
            cpattn.release(group)
        refused = pytest.raises(cpattn.GroupError, match=r"another call is under way on this group.*or a part of it, is not enough")
        with refused, InFlight(group, CPU):
            pass
    finally:
        over.set()
        thread.join()
    assert "two calls were made on it at once" in said[0]


def test_parts_count_their_own_calls() -> None:
    """With ``check=True``: one part may make more calls than another."""

    def program(group: cpattn.Transport) -> list[list[float]]:
        outer, inner = group.split(2, 2)
        x = torch.full((4, 1), float(group.rank))
        results = []
        for part in [inner] * (1 + group.rank // 2) + [outer, group]:
            meta = cpattn.build_metadata([(0, 4 * part.size)], part.size, part.rank)
            results.append(sorted(set(cpattn.unshard(x, meta, group=part, check=True).flatten().tolist())))
        return results

    results = run_loopback(program, 4)
    assert results[0] == [[0, 1], [0, 2], [0, 1, 2, 3]]
    assert results[3] == [[2, 3], [2, 3], [1, 3], [0, 1, 2, 3]]


def test_a_rank_that_skips_a_call_over_a_part_is_found() -> None:
    def program(group: cpattn.Transport) -> str:
        part = group.split(2, 2)[1]
        meta = cpattn.build_metadata([(0, 8)], 2, part.rank)
        if group.rank == 3:
            part.state.calls[part.part] += 1
        try:
            cpattn.unshard(torch.zeros(4, 1), meta, group=part, check=True)
        except cpattn.DisagreementError as error:
            return str(error)
        return "right"

    results = run_loopback(program, 4)
    assert results[:2] == ["right"] * 2
    assert all("the ranks disagree on the number of calls so far on this group: rank 0: 0; rank 1: 1" in said for said in results[2:])


def test_release_frees_the_parts_memory_too() -> None:
    group = cpattn.LoopbackGroup(4).transport(0)
    outer, inner = group.split(2, 2)
    (alone,) = inner.split(2, 1)[1:]

    def fill() -> None:
        for transport in (group, outer, inner, alone):
            transport.buffer("a", (8,), torch.float32, CPU)

    def sizes() -> list[int]:
        return [sum(map(len, transport.arena.blocks())) for transport in (group, outer, inner, alone)]

    fill()
    assert sizes() == [36] * 4
    cpattn.release(inner)
    assert sizes() == [36, 36, 0, 0]
    fill()
    cpattn.release(group)
    assert sizes() == [0] * 4
    fill()
    cpattn.release()
    assert sizes() == [0] * 4
