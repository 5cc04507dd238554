"""Who holds each token of a sharded cache, as pictures show it: the counts of the plan, and of its rule the positions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.strategies import Batch, batches

import cpattn
from cpattn.metadata.holders import holder_of


def even(batch: Batch, cp_size: int) -> list[list[int]]:
    return [[prefix // cp_size + (rank < prefix % cp_size) for rank in range(cp_size)] for prefix, _ in batch]


def scattered(batch: Batch, cp_size: int) -> list[list[int]]:
    return [[position * position % cp_size for position in range(prefix)] for prefix, _ in batch]


@given(
    batches(max_requests=4, max_prefix=30, max_extend=30), st.integers(1, 5), st.sampled_from(["striped", "prefix_shards", "prefix_ranks"])
)
@settings(deadline=None)
def test_the_counts_are_those_of_the_plan(batch: Batch, cp_size: int, rule: str) -> None:
    if rule == "striped":
        plan = cpattn.plan(batch, cp_size, owner=cpattn.Striped(3))
    elif rule == "prefix_shards":
        plan = cpattn.plan(batch, cp_size, prefix_shards=even(batch, cp_size))
    else:
        plan = cpattn.plan(batch, cp_size, prefix_ranks=scattered(batch, cp_size))
    for request, (prefix, extend) in enumerate(batch):
        holder, total = holder_of(plan, request), prefix + extend
        ranks = [holder(position, position + 1) for position in range(total)]
        assert [Counter(ranks)[rank] for rank in range(cp_size)] == plan.held_lens[request].tolist()
        if rule == "striped":
            assert ranks == cpattn.Striped(3).ranks(np.arange(total), cp_size).tolist()
        if rule == "prefix_ranks":
            assert ranks[:prefix] == scattered(batch, cp_size)[request]
        for begin in range(0, total, 4):
            some = set(ranks[begin : begin + 4])
            assert holder(begin, min(begin + 4, total)) == (some.pop() if len(some) == 1 else None)


def test_a_second_line_says_who_holds_what() -> None:
    _, legend, *lines = cpattn.plan([(5, 3), (0, 1)], 2, owner=cpattn.Striped(2)).draw().splitlines()
    assert "held by: the rank whose cache holds a token" in legend
    assert lines[1::2] == ["  held by        |00110011|", "  held by        |0|"]
    lines = cpattn.plan([(8, 8)], 2, prefix_shards=[(5, 3)], partition="contiguous").draw(width=8).splitlines()
    assert lines[2].startswith("of cached tokens only counts are known")
    assert lines[4] == "  held by        |00*10011|"


@pytest.mark.parametrize("spread", [False, True])
def test_requests_share_a_line_where_the_same_ranks_hold_as_much(spread: bool) -> None:
    shards = [(1, 3) if spread and number % 2 else (2, 2) for number in range(40)]
    lines = cpattn.plan([(4, 0)] * 40, 2, prefix_shards=shards).draw().splitlines()[3:]
    assert [line.partition("|")[2] for line in lines[1::2]] == (["0011|", "0111|"] if spread else ["0011|"])


def test_the_summary_says_what_ranks_hold() -> None:
    lines = cpattn.plan([(5, 3)], 2, owner=cpattn.Striped(4)).summary().splitlines()
    assert lines[0] == "1 request: 3 new tokens over 5 cached ones, owner=Striped(interleave=4)"
    assert [line.split()[-1] for line in lines[3:] if line][:5] == ["held", "----", "4", "4", "8"]
