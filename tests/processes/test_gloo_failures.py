"""Calls that fail in real processes over gloo: raising ranks leave the group in step, dead and stopped ones are found out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from inputs.cases import EXCHANGES, AttentionCase
from programs import fault_programs as programs
from programs.failed_calls import Faults, check_partly_failed

from cpattn.testing import ProcessRanks

MIXED = [(0, 131), (64, 57), (0, 3), (97, 1), (30, 0), (0, 1)]


@pytest.fixture(scope="module")
def ranks() -> Iterator[ProcessRanks]:
    """Of one size, as tests of failures take seconds; others are in test_failed_calls.py, over loopback."""
    with ProcessRanks(3, timeout=60) as started:
        yield started


@pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)
def test_a_fault_anywhere_keeps_ranks_in_step(ranks: ProcessRanks, strategy: str, cache: str) -> None:
    """Many calls one after another over one group, with faults on one rank, on some, and on all at different points."""
    draw = random.Random(f"{strategy} {cache} {ranks.size}")
    cases: list[dict[str, Any]] = []
    faults = []
    for seed in range(8):
        cases.append({"batch": MIXED, "heads": 4, "kv_heads": 4, "cache": cache, "overlap": draw.choice([1, 2, 4]), "seed": seed})
        failing = draw.sample(range(ranks.size), draw.choice([1, 1, ranks.size]))
        faults.append(Faults({rank: draw.randrange(300) for rank in failing}))
    results = ranks.run(programs.fail_and_go_on, cases, faults, strategy, "cpu")
    for n, fields in enumerate(cases):
        case = AttentionCase(**fields)
        plan = case.plan(ranks.size)
        check_partly_failed(case, plan, strategy, [result[n][0] for result in results])
        case.check([result[n][1] for result in results], plan, strategy, "cpu")


@pytest.mark.parametrize(
    ("strategy", "fault", "when"), [("all_gather", "stopped", "before"), ("ring", "killed", "during"), ("ring", "stopped", "during")]
)
def test_a_rank_that_is_gone_is_found_out_once_and_for_all(strategy: str, fault: str, when: str) -> None:
    """The others get a GroupError at the first call that needs it, and the same one at every later call, at once. All
    combinations, over NCCL as well, are in the table that ``make faults`` prints."""
    timeout = 3
    with ProcessRanks(3, timeout=timeout) as ranks:
        outcomes = ranks.outcomes(programs.go_on, strategy, 1, fault, when, "cpu")
    assert not outcomes[1][0]
    for rank in (0, 2):
        done, seen = outcomes[rank]
        assert done, seen
        failed = [call for call in seen if not call.what.startswith("the right result")]
        # A stopped rank may have sent all that the first call needs, but no more.
        assert len(failed) >= len(seen) - 1
        assert len({call.what for call in failed}) == 1
        assert failed[0].what.startswith("GroupError: this group cannot be used any more: a transfer over it failed (")
        assert failed[0].seconds < 3 * timeout
        assert all(call.seconds < 1 for call in failed[1:])


def test_a_rank_that_raises_without_making_the_call(ranks: ProcessRanks) -> None:
    """Its next call would be taken for it; by their labels all find out at once."""
    results = ranks.run(programs.go_on, "ring", 1, "raises", "before", "cpu", True)
    assert "an error of this rank's own" in results[1][0].what
    whats = [seen[1 if rank == 1 else 0].what for rank, seen in enumerate(results)]
    assert len(set(whats)) == 1
    assert "DisagreementError: the ranks disagree on the label of this call: rank" in whats[0]


@pytest.mark.parametrize("raises", [False, True], ids=["in a wait", "while it settles"])
@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q_ring"])
def test_ctrl_c_leaves_a_group_that_works(ranks: ProcessRanks, strategy: str, raises: bool) -> None:
    """The peers come in time for what it still owes."""
    results = ranks.run(programs.go_on_after_ctrl_c, strategy, 1.5, raises)
    (first, *others), seconds = results[0]
    assert first == "KeyboardInterrupt: "
    assert seconds < 8
    assert others == ["the right result"] * 2
    for seen, _ in results[1:]:
        assert "wrong" not in seen[0]
        assert seen[1:] == ["the right result"] * 2


def test_ctrl_c_waits_for_five_seconds_at_most() -> None:
    """Then the group is given up, on this rank at once and on the others when they come."""
    with ProcessRanks(2, timeout=6) as ranks:
        (first, seconds), (late, _) = ranks.run(programs.go_on_after_ctrl_c, "ring", 7.0, False)
    assert first[0] == "KeyboardInterrupt: "
    assert 5 < seconds < 8
    assert all(what.startswith("GroupError: this group cannot be used any more: a call was interrupted") for what in first[1:])
    assert "a wrong result" not in late
    assert all(what.startswith("GroupError") for what in late[1:])


def test_two_threads_on_one_group_are_found_out(ranks: ProcessRanks) -> None:
    """However many communicators of their own they make; a group of their own is what works."""
    for messages, is_right in ranks.run(programs.use_from_two_threads):
        assert any("another call is under way on this group" in message for message in messages)
        assert is_right
