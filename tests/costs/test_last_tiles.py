"""When the last tiles of launches end, beside all of their tiles taken one by one."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest
import torch

import cpattn
from cpattn.costs import launches
from cpattn.costs.hop_spans import RankSpans, spans_of
from cpattn.costs.last_tiles import until_last
from cpattn.costs.launches import Launches
from cpattn.costs.tile_costs import TileCosts
from cpattn.machine import H100
from cpattn.rounds import MOST_ROUNDS

BATCHES = {
    "long prefix": [(34_563, 1_388)],
    "a rank has none": [(5, 1), (9_000, 700), (0, 0), (70_000, 3)],
    "ragged": [(30_602, 814), (2_791, 9_530), (0, 187), (17, 1)],
}


def one_by_one(spans: RankSpans, costs: TileCosts, form: int, heads: int) -> tuple[int, float]:
    """How many items one rank's spans have, and when the last of them ends, in what tiles are counted in."""
    tokens, kernel = int(costs.tokens[form, 0]), costs.kernels[0]
    items = []
    for q_len, k_len, diagonal in zip(spans.q_len, spans.k_len, spans.diagonal, strict=True):
        for first in range(0, int(q_len), tokens) if k_len else ():
            count = min(tokens, int(q_len) - first)
            blocks = -(-min(int(k_len), int(diagonal) + first + count - 1) // costs.block_n)
            items += [(blocks + kernel.tile) * int(costs.last[0, form, count])] * heads
    done = [0] * costs.multiprocessors
    for item in sorted(items, reverse=True):
        heapq.heapreplace(done, done[0] + item)
    return len(items), max(done)


@pytest.mark.parametrize("size", [1, 3, 4, 7])
@pytest.mark.parametrize("batch", BATCHES)
def test_it_is_when_tiles_that_are_taken_in_turn_are_done(batch: str, size: int) -> None:
    plan = cpattn.plan(BATCHES[batch], size, partition="uncut" if "none" in batch else "zigzag")
    problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 32, 8, 128, 128, cache="packed")
    (hop,) = cpattn.STRATEGIES["all_gather"].schedule(problem, plan)
    ((spans, _),) = spans_of(plan, hop)
    order = spans.rank.argsort(kind="stable")
    spans = RankSpans._make([column[order] for column in spans])
    begins = np.flatnonzero(np.append(True, spans.rank[1:] != spans.rank[:-1]))
    costs = TileCosts.of(problem, H100, H100.kernels)
    found, alone = until_last(spans, begins, problem, costs, 1, False), costs.rates(problem, 1, False)[1][0, 0, 0]
    compared = 0
    for number, rank in enumerate(spans.rank[begins]):
        mine = RankSpans._make([column[spans.rank == rank] for column in spans])
        for form in range(len(costs.forms)):
            items, last = one_by_one(mine, costs, form, 32 // costs.forms[form].pack)
            if costs.multiprocessors < items <= MOST_ROUNDS * costs.multiprocessors:
                assert found[0, form, number] == pytest.approx(last * alone, rel=0.15)
                compared += 1
            else:
                assert found[0, form, number] == 0
    # Of kernels whose programs do not stay nothing is said.
    assert not found[1:].any()
    assert compared or batch != "ragged" or size == 1


def test_a_few_tiles_too_many_take_a_round_more() -> None:
    """As measured: one rank of four took 129 us with chunks of 115 and 129 tokens, and another 84 with 123 and 122 (whole and zigzag)."""
    chunks: Any = {"whole": (115, 129), "zigzag": (123, 122)}
    seconds = {}
    for name, lengths in chunks.items():
        batch = [(6_049 - lengths[0], lengths[0]), (6_913 - lengths[1], lengths[1])]
        plan = cpattn.plan(batch, 1)
        problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 32, 8, 128, 128, cache="packed")
        (hop,) = cpattn.STRATEGIES["all_gather"].schedule(problem, plan)
        seconds[name] = float(Launches(plan, problem, H100).slowest(hop, H100.kernels[0]))
    assert 1.2 < seconds["whole"] / seconds["zigzag"] < 1.6


@pytest.mark.parametrize("size", [2, 8, 64])
@pytest.mark.parametrize("batch", [[(34_563, 1_388)], [(0, 262_144)], [(30_602, 814), (2_791, 9_530), (0, 187), (17, 1)]])
def test_forms_that_take_no_less_before_are_not_looked_at(batch: list[tuple[int, int]], size: int, monkeypatch: Any) -> None:
    plan = cpattn.plan(batch, size)
    cache: Any = "packed" if plan.num_prefix_tokens else None
    problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 32, 8, 128, 128, cache=cache)
    looked_at: dict[bool, int] = {}

    def estimated(heeds: bool) -> list[cpattn.Estimate]:
        def counted(*arguments: Any) -> Any:
            found = until_last(*(arguments if heeds else arguments[:-1]))
            looked_at[heeds] = looked_at.get(heeds, 0) + int((found > 0).sum())
            return found

        monkeypatch.setattr(launches, "until_last", counted)
        return list(cpattn.estimate(plan, problem, H100))

    assert estimated(True) == estimated(False)
    assert looked_at[True] <= looked_at[False]
    # A long request's rings would have thousands of them.
    assert (size, batch) != (64, [(0, 262_144)]) or 2_000 < looked_at[True] < 0.75 * looked_at[False]
