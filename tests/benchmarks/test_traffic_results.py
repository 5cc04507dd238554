"""Batches of traffic, and what the benchmark over them makes of its times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from peers.report import Line
from peers.session import Times
from traffic.batches import ANSWER, BUDGETS, LONGEST, MOST_CACHED, serving_batches
from traffic.choices import AUTO, AUTO_UNEVEN, CHOICES, ONE_GPU, Choice
from traffic.results import HEADER, Row, read, row_of, summary


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
    row = row_of(3, [(0, 600)], 2, lines, lambda choice, line: 5.0 * (choice.strategy == "ring"))
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


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_choices_lay_a_batch_out(choice: Choice) -> None:
    plan = choice.plan([(0, 600), (50, 1)], 2)
    assert plan.num_tokens == 601
    assert (max(plan.rank_tokens) == 301) or not choice.keeps_even
