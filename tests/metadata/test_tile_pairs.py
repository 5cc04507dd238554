"""What tiles take on each rank in the coarse form by which partition "auto" chooses, beside all tiles taken one by one."""

from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.strategies import Batch, batches

import cpattn
from cpattn.machine import H100
from cpattn.metadata.auto_partition import USUAL
from cpattn.metadata.laid_out import LaidOut
from cpattn.metadata.pair_costs import FULL, Form, PairCosts
from cpattn.metadata.tile_pairs import Launch, TilePairs
from cpattn.rounds import MOST_ROUNDS

FORMS = ("leading", "halves", "unpacked")


def costs_with(programs: int) -> PairCosts:
    """On an H100 of so many multiprocessors."""
    return PairCosts.of(USUAL, replace(H100, multiprocessors=programs), 2)


# So few that some hundred tokens have several rounds.
COSTS = costs_with(8)


def tiles_of(length: int, before: int, form: Form, window: int | None) -> list[int]:
    """What each tile of a chunk costs by the first kernel, in keys of a full one."""
    beside, half_full = int(COSTS.beside[0, 0]), int(COSTS.half_full[0, 0])
    found = []
    for first in range(0, length, form.tokens):
        tokens = min(form.tokens, length - first)
        keys = before + first + tokens
        if window is not None:
            keys = min(keys, window + form.tokens)
        is_half = form.is_half or 2 * tokens <= form.of_full
        found.append((keys + beside) * half_full // FULL if is_half else keys + beside)
    return found


def one_by_one(tiles: list[int], form: Form, programs: int) -> int:
    """Until the last of all heads' tiles ends, in keys."""
    done = [0] * programs
    for cost in sorted(tiles * form.each, reverse=True):
        heapq.heapreplace(done, done[0] + cost)
    return max(done)


@given(batch=batches(), size=st.integers(1, 5), partition=st.sampled_from(["whole", "zigzag", "uncut"]), name=st.sampled_from(FORMS))
@settings(max_examples=60, deadline=None)
def test_it_is_what_tiles_one_by_one_take(batch: Batch, size: int, partition: str, name: str) -> None:
    chunks = LaidOut(cpattn.plan(batch, size, partition=partition)).chunks
    form, key = getattr(COSTS, name), int(COSTS.tile_key[0, 0])
    found = TilePairs(Launch.of(chunks, None, COSTS), form)
    until_last, ranks = found.until_last(0, 0), 0
    for begin, end in pairwise(chunks.bounds.tolist()):
        if begin == end:
            continue
        of_chunks = [tiles_of(int(chunks.length[n]), int(chunks.before[n]), form, None) for n in range(begin, end)]
        reading = [int((chunks.before[n] + chunks.length[n]) * COSTS.read[0, 0]) for n in range(begin, end)]
        load = sum(max(form.of_full * sum(of), least) for of, least in zip(of_chunks, reading, strict=True))
        tiles = list(chain(*of_chunks))
        # Of a chunk of half tiles what they cost is rounded down once.
        assert abs(found.loads[0, ranks] - load) <= form.of_full * len(tiles) * form.is_half
        # As if the longest full one were the chunk's last.
        assert 0 <= found.longest[0, ranks] - key * max(tiles) < key * form.tokens
        assert found.least[0, ranks] == max(found.loads[0, ranks], found.longest[0, ranks])
        if COSTS.programs < len(tiles) * form.each <= MOST_ROUNDS * COSTS.programs:
            exact = max(key * one_by_one(tiles, form, COSTS.programs), int(found.least[0, ranks]))
            assert abs(until_last[ranks] - exact) <= found.longest[0, ranks]
        else:
            assert until_last[ranks] == found.least[0, ranks]
        ranks += 1
    assert ranks == len(until_last)


@pytest.mark.parametrize("name", FORMS)
def test_tiles_that_are_alike_take_a_round_more(name: str) -> None:
    """Behind a long prefix, where what a tile sees hardly differs."""
    form: Form = getattr(COSTS, name)
    # As many programs as a tile has items: each tile is a round.
    costs = costs_with(form.each)

    def of(tiles: int) -> TilePairs:
        plan = cpattn.plan([(10**6, tiles * form.tokens)], 1, partition="whole")
        return TilePairs(Launch.of(LaidOut(plan).chunks, None, costs._replace(read=0 * costs.read)), form)

    for tiles in range(1, MOST_ROUNDS + 1):
        assert of(tiles).until_last(0, 0)[0] == pytest.approx(tiles * int(of(1).longest[0, 0]), rel=0.01)
    # As many programs and half as many more.
    costs = costs_with(2 * form.each // 3)
    assert of(1).until_last(0, 0)[0] == pytest.approx(2 * int(of(1).longest[0, 0]), rel=0.01)
    assert of(1).least[0, 0] < 1.7 * of(1).longest[0, 0]
    # What is no later than that however they are taken, or than others, is not looked at.
    assert of(1).until_last(0, 10**12).tolist() == of(1).until_last(0, 0, np.array([0])).tolist() == of(1).least[0].tolist()


def test_a_window_bounds_what_tiles_see() -> None:
    chunks = LaidOut(cpattn.plan([(300, 500), (0, 90)], 1, partition="whole")).chunks
    form, window = COSTS.leading, 64
    of_chunks = [tiles_of(int(length), int(before), form, window) for length, before in zip(chunks.length, chunks.before, strict=True)]
    tiles = list(chain(*of_chunks))
    found = TilePairs(Launch.of(chunks, window, COSTS), form)
    assert found.loads[0, 0] == pytest.approx(form.of_full * sum(tiles), rel=0.02)
    costs = costs_with(50)
    exact = int(costs.tile_key[0, 0]) * one_by_one(tiles, form, 50)
    assert TilePairs(Launch.of(chunks, window, costs), form).until_last(0, 0)[0] == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("group", [1, 4, 40, 71, 128])
def test_tiles_of_half_as_many_rows_are_no_less_work(group: int) -> None:
    """Of more heads than those have rows, fewer share one."""
    costs = PairCosts.of(replace(USUAL, q_heads=2 * group, kv_heads=2), H100, 2)
    launch = Launch.of(LaidOut(cpattn.plan([(1000, 1000), (0, 1)], 2, partition="whole")).chunks, None, costs)
    leading, halves = (TilePairs(launch, form) for form in (costs.leading, costs.halves))
    assert np.all(halves.loads >= leading.loads)
