"""What the benchmark beside peers makes of its times."""

from __future__ import annotations

from pathlib import Path

import pytest
from peers import report
from peers.bench import last_words
from peers.ours import ON_GPUS
from peers.report import Line
from peers.session import Times
from peers.variants import Kind, all_variants

BATCHES = {"1 x 1k": [(0, 1024)], "8 x 8k": [(0, 8192)] * 8}
# us in a graph and eagerly; None where there is no graph.
TIMES: dict[str, tuple[float | None, float]] = {
    "cpattn auto": (110.0, 210.0),
    "cpattn auto, no transfer": (100.0, 200.0),
    "cpattn auto, partition auto": (90.0, 170.0),
    "cpattn ring, collectives, triton": (120.0, 190.0),
    "cpattn ring, no transfer, triton": (95.0, 150.0),
    "launch alone, triton": (80.0, 140.0),
    "one GPU, triton": (165.0, 250.0),
    "Ulysses as USP": (None, 420.0),
}


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    variants, made = all_variants("cuda", ON_GPUS), []
    for batch in BATCHES:
        for name, (graph, eager) in TIMES.items():
            line = Line(batch, name, variants[name].kind, variants[name].beside)
            # Of two ranks, whose slower one counts.
            for factor in (1.0, 3.0, 0.5):
                slower = Times(graph and graph * factor, eager * factor, 7.0)
                line.add([slower, slower._replace(eager=1.0)])
            made.append(line)
    return made


def test_exposed_is_told_by_the_same_call_without_transfers(lines: list[Line]) -> None:
    exposed = {line.variant: report.exposed(line, lines, "eager") for line in lines[: len(TIMES)]}
    told = {name: time for name, time in exposed.items() if time is not None}
    assert told == {"cpattn auto": 10.0, "cpattn ring, collectives, triton": 40.0, "Ulysses as USP": 270.0}


@pytest.mark.parametrize(
    ("kind", "fastest"), [("auto", ("cpattn auto", 110.0)), ("launch", ("launch alone, triton", 80.0)), ("peer", None)], ids=str
)
def test_the_fastest_of_a_kind_as_a_graph(lines: list[Line], kind: Kind, fastest: tuple[str, float] | None) -> None:
    assert report.best(lines, "1 x 1k", kind, "graph") == fastest


def test_tables_say_times_quotients_and_speedups(lines: list[Line]) -> None:
    text = report.summaries(lines, BATCHES)
    assert "| 8 x 8k | 140.0 | 210.0 | 170.0 | 190.0 | ring, collectives, triton | 420.0 | 1.500 | 1.105 | 0.500 |" in text
    assert "| 8 x 8k | 80.0 | 110.0 | 90.0 | 120.0 | ring, collectives, triton |  | 1.375 | 0.917 |  |" in text
    assert "| 1 x 1k | 165.0 | 110.0 | 1.50 | 10.0 |" in text
    assert text.count("| 165.0 |") == 1, "the batch of many requests has no speed-up by length"


def test_results_are_read_as_they_were_written(lines: list[Line], tmp_path: Path) -> None:
    report.write(tmp_path / "results" / "peers", "# Title", lines, BATCHES)
    read = report.read(tmp_path / "results" / "peers")
    assert [(line.variant, line.kind, line.median("graph"), line.median("eager")) for line in read] == [
        (line.variant, line.kind, line.median("graph"), line.median("eager")) for line in lines
    ]


def test_a_failure_is_told_in_one_line() -> None:
    first = "Traceback (most recent call last):\n  File 'a.py', line 1\n    f()\nKeyError: 1\n\nAnd then:\n\n"
    second = "Traceback (most recent call last):\n  File 'b.py', line 2\nValueError: too | long\n  by two lines\n"
    assert last_words(first + second) == "ValueError: too / long"
    assert last_words("the process died with exit code 3") == "the process died with exit code 3"
    assert last_words("Traceback (most recent call last):\n  x\npeers.work.Unserved: no prefix") == "no prefix"
