"""When a launch is done whose programs take items in turn."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
import torch

from cpattn.kernels.tile_shapes import stored_shapes, tile_shapes
from cpattn.kernels.tiles import TilesOfSpans, choose
from cpattn.rounds import MOST_ROUNDS, makespan
from cpattn.spans import HostSpans


def greedy(costs: list[int], each: int, programs: int) -> int:
    """One item after another, the longest first, to who is done first."""
    done = [0] * programs
    for cost in sorted(costs * each, reverse=True):
        heapq.heapreplace(done, done[0] + cost)
    return max(done)


@pytest.mark.parametrize("programs", [1, 7, 132])
@pytest.mark.parametrize("each", [1, 8])
def test_it_is_about_when_each_takes_the_next_one(programs: int, each: int) -> None:
    rng = np.random.default_rng(programs)
    for tiles in (0, 1, 2, 13, programs, programs + 1, 3 * programs - 1):
        for most in (1, 30, 1000):
            costs = rng.integers(1, most + 1, size=tiles)
            found, exact = float(makespan(costs, each, programs)), greedy(costs.tolist(), each, programs)
            load, longest = costs.sum() * each / programs, costs.max(initial=0)
            assert max(load, longest) <= found * (1 + 1e-12)
            # Programs are done within an item's time.
            assert found <= (load + longest) * (1 + 1e-12)
            if most == 1 and tiles * each <= MOST_ROUNDS * programs:
                assert found == exact == -(-tiles * each // programs)
            # In rounds each gets one, where in turn who is done early gets several.
            assert abs(found - exact) <= longest


def test_of_many_rows_at_once_it_is_that_of_each() -> None:
    costs = np.random.default_rng(0).integers(0, 50, size=(3, 2, 40))
    found = makespan(costs, 4, 31)
    assert found.shape == (3, 2)
    assert [float(makespan(row, 4, 31)) for row in costs.reshape(-1, 40)] == found.ravel().tolist()


@pytest.mark.parametrize("programs", [132, 148])
@pytest.mark.parametrize("each", [3, 4, 6, 48])
def test_items_that_are_alike_are_dealt_with_as_one(each: int, programs: int) -> None:
    """To the bit, also where what is taken at once has no such divisor."""
    costs = np.random.default_rng(each).integers(1, 1000, size=(20, 5 * programs // each))
    assert np.array_equal(makespan(costs, each, programs), makespan(costs.repeat(each, axis=-1), 1, programs))


@pytest.mark.parametrize(
    ("q_len", "k_len", "heads", "block_m"),
    [
        # 1,388 new tokens over 34,563, of four ranks: 176 tiles of 64 rows would take two rounds, in which 96 of 128 rows take one. It took
        # 594 us on an H100 with the former.
        ([174, 173], [34737, 35951], 32, 128),
        # The same of eight ranks: half as many tiles of 64 rows are one round.
        ([87, 87], [34650, 35951], 32, 64),
        # 979 new tokens over 5,934: 136 tiles of 64 rows took 129 us, where the 128 of other chunks, as many in all, took 84.
        ([115, 129], [6049, 6913], 32, 128),
        ([123, 122], [6057, 6913], 32, 64),
        # A rank's chunks of 1,024 tokens: 256 tiles of 64 rows took 20.2 us on an H200, 128 of 128 rows 18.3.
        ([256, 256], [256, 1024], 32, 128),
    ],
)
def test_tiles_are_larger_where_small_ones_take_a_round_more(q_len: list[int], k_len: list[int], heads: int, block_m: int) -> None:
    queries, ends = np.array(q_len), np.array(k_len)
    spans = HostSpans(queries.cumsum() - queries, queries, 0 * ends, ends, ends - queries + 1, np.arange(len(queries)))
    shape, pack, tiles, _ = choose(spans, tile_shapes(128, 128, torch.bfloat16, (9, 0), True), (1, 4), heads, None, 132)
    assert shape.block_m == block_m
    if block_m == 64:
        assert len(tiles.q_begin) * heads // pack <= 132
    assert len(TilesOfSpans.of(spans, shape.block_m // pack, shape.block_n, None).span) == len(tiles.q_begin)


def test_tiles_are_small_where_large_ones_are_half_full() -> None:
    """A rank's chunks of 768 tokens: 192 tiles of 64 rows, more than programs, took 14.5 us on an H200; 128 of 128 rows, a half of them
    half full, 16.8."""
    queries, ends = np.array([192, 192]), np.array([192, 768])
    spans = HostSpans(queries.cumsum() - queries, queries, 0 * ends, ends, ends - queries + 1, np.arange(2))
    assert choose(spans, tile_shapes(128, 128, torch.bfloat16, (9, 0), True), (1, 4), 32, None, 132)[0].block_m == 64


def test_a_warpgroup_is_left_out_where_it_has_no_rows() -> None:
    """Over fp8, in decoding; not where tiles of prompts are most of the work, which twice as many small ones would be."""
    shapes = stored_shapes(128, 128, torch.bfloat16, torch.float8_e4m3fn)
    for q_len, k_len, warpgroups in ([1] * 48, [4097] * 48, 1), ([2, 16, 5] * 9, [300, 8000, 2000] * 9, 1), ([2048], [2048], 2):
        queries, ends = np.array(q_len), np.array(k_len)
        spans = HostSpans(queries.cumsum() - queries, queries, 0 * ends, ends, ends - queries + 1, np.arange(len(queries)))
        assert choose(spans, shapes, (1, 4), 32, None, 132)[0].warpgroups == warpgroups
    # Of two bytes each, or as wide as this, they need the registers of both.
    assert stored_shapes(128, 128, torch.float16, torch.bfloat16)[1].warpgroups == 2
    assert stored_shapes(256, 256, torch.bfloat16, torch.float8_e4m3fn)[1].warpgroups == 2


def test_the_plain_kernel_is_told_by_its_load() -> None:
    """176 small tiles on 132 processors, each of which has several at a time, are no second round."""
    queries, ends = np.array([174, 173]), np.array([34737, 35951])
    spans = HostSpans(queries.cumsum() - queries, queries, 0 * ends, ends, ends - queries + 1, np.arange(2))
    shapes = tile_shapes(128, 128, torch.bfloat16, (9, 0), True)
    plain = tuple(shape._replace(specialized=False) for shape in shapes)
    assert [choose(spans, each, (1,), 32, None, 132)[0].block_m for each in (shapes, plain)] == [128, 64]
