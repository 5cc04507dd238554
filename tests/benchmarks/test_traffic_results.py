"""Batches of traffic, and what the benchmark over them makes of its times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peers import ours
from peers.report import Line
from peers.session import Times
from peers.work import Heads
from traffic.batches import ANSWER, BUDGETS, LONGEST, MOST_CACHED, serving_batches
from traffic.choices import AUTO, AUTO_UNEVEN, CHOICES, FIXED, ONE_GPU, Choice, messages_us, of_one_rank, problem_of
from traffic.results import HEADER, Row, read, row_of, summary
from traffic.slowest import slowest_ranks

import cpattn
from cpattn.exchange.divided_heads import shares_of
from cpattn.machine import H100


def test_batches_are_steps_of_an_engine() -> None:
    batches = serving_batches(200)
    assert batches[:9] == serving_batches(9)
    for batch in batches:
        assert batch
        assert min(new for _, new in batch) > 0
        # With one decode more than fit.
        assert sum(new for _, new in batch) <= max(BUDGETS) + len(batch)
        assert sum(cached for cached, new in batch if new == 1) <= MOST_CACHED
        assert max(map(sum, batch)) <= LONGEST + 2 * ANSWER + 1
    prompts = [request for batch in batches for request in batch if request[1] > 1]
    assert 20 < sum(any(sum(request) >= 32768 and request[1] > 1 for request in batch) for batch in batches) < 60
    assert 50 < sum(any(new == 1 for _, new in batch) for batch in batches) < 150
    # Hits, and what goes on that did not fit.
    assert 0.4 < np.mean([cached > 0 for cached, _ in prompts]) < 0.7


def lines_of(times: dict[Choice | str, tuple[str, list[float]]]) -> list[Line]:
    lines = []
    for name, (way, samples) in times.items():
        line = Line("0", str(name), "fixed", way=way)
        for sample in samples:
            line.add([Times(sample, None, None), Times(sample - 1, None, None)])
        lines.append(line)
    return lines


def test_calls_that_are_the_same_are_taken_together(tmp_path: Path) -> None:
    """One short prompt is cut in two as whole has it, in four by zigzag, and lies on one rank uncut."""
    whole, zigzag, uncut = Choice("whole", "all_gather"), Choice("zigzag", "all_gather"), Choice("uncut", "all_gather")
    gathered = "all_gather, triton"
    lines = lines_of(
        {
            AUTO: (gathered, [100.0, 104.0]),
            whole: (gathered, [96.0]),
            zigzag: (gathered, [120.0]),
            Choice("whole", "ring"): ("ring, triton", [80.0]),
            AUTO_UNEVEN: (gathered, [50.0]),
            uncut: (gathered, [52.0]),
            ONE_GPU: (gathered, [40.0]),
        }
    )
    lines[2].note = "cannot be captured"
    of = {choice: (str(choice),) for choice in CHOICES}
    row = row_of(3, [(0, 600)], 2, lines, of, lambda choice, line: 5.0 * (choice.strategy == "ring"))
    assert row.times == {
        **{str(choice): 100.0 for choice in (AUTO, whole)},
        str(zigzag): 120.0,
        "whole, ring": 85.0,
        **{str(choice): 51.0 for choice in (AUTO_UNEVEN, uncut)},
        ONE_GPU: 40.0,
    }
    assert row.taken == ("whole", gathered)
    assert row.note == "zigzag, all_gather: cannot be captured"
    assert (row.even, row.uneven, row.beyond_one_gpu) == (100 / 85, 1.0, 41 / 40)
    other = Row(4, "one", ("whole", gathered), {str(choice): 10.0 for choice in CHOICES})
    assert (other.even, other.uneven, other.beyond_one_gpu) == (1.0, 1.0, None)
    text = summary([row, other])
    assert "| auto over the best of zigzag and whole | 2 | 50.0% | 50.0% | 1.088 | 1.176 |" in text
    assert "| the same less 10 us, over one GPU | 1 | 0.0% | 100.0% | 1.025 | 1.025 |" in text
    assert "| 1 prefills, 600 new over 0, longest 600; 0 decodes | whole | all_gather, triton | 1.176 | whole, ring | 85.0 |" in text
    path = tmp_path / "found"
    assert read(path) == []
    path.with_suffix(".csv").write_text("\n".join(",".join(f'"{cell}"' for cell in cells) for cells in (HEADER, row.cells, other.cells)))
    assert read(path) == [row, other]


HEADS, ON_H100 = Heads(32, 8, 128), H100.only("triton")
# A prompt, and decodes over long caches.
MIXED = [(0, 2048), (60_000, 1), (50_000, 1), (300, 1)]


def test_of_a_choice_the_slowest_rank_counts() -> None:
    whole, ring = Choice("whole", "all_gather"), Choice("whole", "ring")
    lines = lines_of({"first": ("all_gather, triton", [10.0, 12.0]), "second": ("all_gather, triton", [30.0, 31.0, 32.0])})
    of = {whole: ("first", "second"), AUTO: ("first", "second"), ring: ("first", "missing")}
    row = row_of(0, MIXED, 4, lines, of, lambda choice, line: 1.0)
    assert row.times == {str(AUTO): 32.0, str(whole): 32.0}
    assert row.taken[1] == "all_gather, triton"


@pytest.mark.parametrize("size", [3, 4, 7, 8])
def test_ranks_that_read_the_most_keys_are_timed_beside_those_with_the_most_pairs(size: int) -> None:
    """A decode of 60,000 keys is a thirtieth of the pairs of the prompt, and takes longer."""
    plan = cpattn.plan(MIXED, size, partition="uncut")
    problem = problem_of(MIXED, plan.rows, HEADS)
    holder = {request: rank for request, _, _, rank in zip(*plan.chunk_table, strict=True)}
    assert set(slowest_ranks("all_gather", plan, problem, ON_H100)) == {holder[0], holder[1]}
    assert slowest_ranks("ring", plan, problem, ON_H100) == slowest_ranks("all_gather", plan, problem, ON_H100)
    # Each rank has all rows, and some more heads than others where they are uneven.
    (rank,) = slowest_ranks("ulysses", plan, problem, ON_H100)
    heads = [share.q_heads for share in shares_of(problem, size)]
    assert heads[rank] == max(heads)
    timed = of_one_rank(MIXED, size, HEADS, ON_H100)
    assert set(timed.of) == set(CHOICES)
    uncut = timed.of[Choice("uncut", "all_gather")]
    assert uncut == tuple(f"uncut, all_gather, rank {rank}" for rank in slowest_ranks("all_gather", plan, problem, ON_H100))
    assert {name for names in timed.of.values() for name in names} == set(timed.variants) - {ONE_GPU}


def test_ranks_that_are_alike_are_timed_once() -> None:
    prompt = [(0, 8192)]
    timed = of_one_rank(prompt, 4, HEADS, ON_H100)
    assert all(len(names) == 1 for names in timed.of.values())
    # What auto takes is one of the others.
    assert len(timed.variants) <= len(FIXED) + 1


def test_what_is_copied_around_messages_is_that_of_their_transport() -> None:
    """Over the memory of peers keys come to their places in one launch; what a rank by itself copies more is taken off."""
    batch, size = [(0, 23_749)], 4
    plan = cpattn.plan(batch, size)
    found = cpattn.estimate(plan, problem_of(batch, plan.rows, HEADS), ON_H100)
    ways = {one.transport: one for one in found if (one.strategy, one.overlap) == ("all_gather", 1)}
    peers, collectives = ways["peer_memory"], ways["collectives"]
    assert peers.graph < collectives.graph
    expected = 1e6 * (peers.exposed + peers.moves - collectives.moves)
    for backend in ("triton", "unknown"):
        assert messages_us("all_gather", backend, plan, batch, HEADS, ON_H100) == pytest.approx(expected)
    assert messages_us("all_gather", "triton", cpattn.plan(batch, 1), batch, HEADS, ON_H100) == 0.0


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_choices_lay_a_batch_out(choice: Choice) -> None:
    plan = choice.plan([(0, 600), (50, 1)], 2)
    assert plan.num_tokens == 601
    assert (max(plan.rank_tokens) == 301) or not choice.keeps_even


def test_messages_are_left_out_of_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ours._alone(ours._Unheard, 1, 3)
    message, came = torch.arange(8.0), torch.zeros(3, 8)
    transfer = alone.prepare_all_gather(came, message)
    alone.start(transfer).wait()
    assert (came == message).all()
    message.zero_()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    alone.start(transfer).wait()
    assert (came == torch.arange(8.0)).all()
