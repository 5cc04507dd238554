"""Calls that fail in real processes over gloo: raising ranks leave the group in step, dead and stopped ones are found out."""

from __future__ import annotations

import random

import pytest
import rank_programs as programs
from cases import AttentionCase
from failed_calls import Faults, check_partly_failed

from cpattn.testing import ProcessRanks

EXCHANGES = [
    ("all_gather", "packed"),
    ("all_gather", "paged"),
    ("ring", "packed"),
    ("ring", "sharded"),
    ("pass_q", "sharded"),
    ("pass_q_ring", "packed"),
    ("pass_q_ring", "sharded"),
]
MIXED = [(0, 131), (64, 57), (0, 3), (97, 1), (30, 0), (0, 1)]


@pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)
def test_a_fault_anywhere_keeps_ranks_in_step(ranks: ProcessRanks, strategy: str, cache: str) -> None:
    """Many calls one after another over one group, with faults on one rank, on some, and on all at different points."""
    draw = random.Random(f"{strategy} {cache} {ranks.size}")
    cases, faults = [], []
    for seed in range(12):
        cases.append(AttentionCase(MIXED, heads=4, kv_heads=4, cache=cache, overlap=draw.choice([1, 2, 4]), seed=seed))
        failing = draw.sample(range(ranks.size), draw.choice([1, 1, ranks.size]))
        faults.append(Faults({rank: draw.randrange(300) for rank in failing}))
    results = ranks.run(programs.fail_and_go_on, cases, faults, strategy)
    for n, case in enumerate(cases):
        plan = case.plan(ranks.size)
        check_partly_failed(case, plan, strategy, [result[n][0] for result in results])
        case.check([result[n][1] for result in results], plan, strategy, "cpu")


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_that_is_gone_is_found_out_once_and_for_all(strategy: str, how: str) -> None:
    """The others get a GroupError at the call, and the same one at every later call, at once."""
    with ProcessRanks(3, timeout=4) as ranks:
        outcomes = ranks.outcomes(programs.go_on_without, 1, how, strategy)
    assert not outcomes[1][0]
    for rank in (0, 2):
        done, (messages, seconds) = outcomes[rank]
        assert done, messages
        assert len(messages) == 3
        assert len(set(messages)) == 1
        assert messages[0].startswith("GroupError: this group cannot be used any more: a transfer over it failed (")
        assert seconds[0] < 12
        assert max(seconds[1:]) < 1


def test_two_threads_on_one_group_are_found_out(ranks: ProcessRanks) -> None:
    """However many communicators of their own they make; a group of their own is what works."""
    for messages, is_right in ranks.run(programs.use_from_two_threads):
        assert any("another call is under way on this group" in message for message in messages)
        assert is_right
