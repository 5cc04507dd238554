"""What the benchmark from one GPU to several makes of its times, and the documents that it packs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import bench_scaling
import pytest
from peers.report import Line
from peers.session import Times
from peers.work import Heads
from scaling.documents import DOCUMENTS, packed_documents
from scaling.published import beside_published
from scaling.results import SUMMARY, Results
from scaling.ways import Case, Way, ways_of

import cpattn

CASE = Case([(0, 8192)], Heads(32, 8, 128))
AUTO, ALONE = Way(2, "zigzag", "auto", "auto", "auto"), Way(2, "zigzag", "auto", "no transfer", "auto")
FIXED = Way(2, "zigzag", "all_gather", "collectives", "triton")
# us in a graph and eagerly; None where there is no graph.
TIMES: dict[Way, tuple[float | None, float]] = {
    Way(1, "zigzag", "auto", "auto", "auto"): (1000.0, 1100.0),
    Way(1, "zigzag", "launch alone", "", "triton"): (900.0, 1200.0),
    AUTO: (500.0, 700.0),
    ALONE: (450.0, 640.0),
    Way(2, "zigzag", "launch alone", "", "triton"): (400.0, 410.0),
    FIXED: (625.0, 560.0),
    Way(2, "zigzag", "ring", "collectives", "triton"): (None, 750.0),
}


def results_of(names: list[str]) -> Results:
    """Of the same times over each batch."""
    ways = {str(way): way for way in TIMES}
    lines = []
    for name in names:
        for variant, way in ways.items():
            made = way.variant(CASE)
            line = Line(name, variant, made.kind, made.beside, way="all_gather, triton" if way.strategy == "auto" else "")
            graph, eager = TIMES[way]
            line.add([Times(graph, eager, 7.0), Times(graph and 1.0, 1.0, 7.0)])
            lines.append(line)
        lines.append(Line(name, "all", "fixed", note="the ranks died"))
    return Results(dict.fromkeys(names, CASE), dict.fromkeys(names, ways), lines, cpattn.MACHINES["h100-nvlink"])


def test_a_row_has_efficiency_exposed_time_rate_and_quotients() -> None:
    graph, eager = (
        dict(zip(SUMMARY, row, strict=True)) for row in results_of(["8k"]).summary() if row[1] == "2"
    )  # fmt: skip
    # The fastest on one GPU counts: the launch as a graph, the call eagerly.
    assert (graph["one GPU, us"], graph["auto, us"], graph["efficiency"]) == ("900.0", "500.0", "0.900")
    assert (eager["one GPU, us"], eager["auto, us"], eager["efficiency"]) == ("1,100.0", "700.0", "0.786")
    assert (graph["exposed, us"], eager["exposed, us"]) == ("50.0", "60.0")
    # 4 x 8192 x 8193 / 2 pairs x 32 heads x 128 in 500 us on two GPUs.
    assert graph["TFLOP/s a GPU"] == "550"
    assert (graph["auto / best fixed"], eager["auto / best fixed"]) == ("0.800", "1.250")
    assert graph["which"] == "all_gather, collectives, triton"
    assert graph["launch alone / auto"] == "0.800"


def test_estimates_are_those_of_the_way_that_was_taken() -> None:
    results = results_of(["8k"])
    lines = {line.variant: line for line in results.of("8k")}
    plan = cpattn.plan(CASE.batch, 2)
    found = cpattn.estimate(plan, CASE.problem(plan), results.machine.rested())
    rested = {one.transport: one.graph * 1e6 for one in found if (one.strategy, one.backend, one.overlap) == ("all_gather", "triton", 1)}
    # Less than a card has at its highest clock; auto takes the memory of peers.
    assert results.estimate(lines[str(FIXED)], "graph") == pytest.approx(rested["collectives"])
    assert results.estimate(lines[str(AUTO)], "graph") == pytest.approx(rested["peer_memory"])
    assert results.estimate(lines[str(ALONE)], "graph") is None


def test_rates_stand_beside_the_published_ones() -> None:
    rows = beside_published(results_of(["one", "two"]), [["one"], ["one", "two"]], ranks=2)
    found = {row[0]: row[1:] for row in rows}
    assert found["fastest launch alone"] == ["2", "687", "1.000", "687", "1.000"]
    assert found["cpattn auto, zigzag"] == ["2", "550", "0.800", "550", "0.800"]
    assert found["cpattn auto, whole"] == ["2", "", "", "", ""]
    assert found["MagiAttention's ring (cited)"] == ["8", "421", "", "89", ""]


def test_tables_are_written_with_what_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpu_timing", SimpleNamespace(gpu_machine=lambda: "two cards"))
    monkeypatch.delitem(sys.modules, "gpu_report", raising=False)
    bench_scaling.write(tmp_path / "scaling", results_of(["8k", bench_scaling.CAUSAL]), [1, 2], ["1 x 1M"], prints=False)
    text = (tmp_path / "scaling.md").read_text()
    assert "Not timed, as the time was up: 1 x 1M. 8k: the ranks died." in text
    assert "| 8k | 2 | zigzag | graph | 900.0 | 500.0 |" in text
    assert len((tmp_path / "scaling_all.csv").read_text().splitlines()) == 1 + 2 * len(TIMES)
    assert "MagiAttention, its own exchange (cited)" in (tmp_path / "scaling_published.md").read_text()


def test_every_strategy_and_transport_is_timed_and_the_most_important_first() -> None:
    ways = ways_of(bench_scaling.CASES["64 ragged ~0.9k"], [1, 2, 4], "cuda")
    assert [(way.ranks, way.strategy) for way in ways[:5]] == [(1, "auto"), (4, "auto"), (4, "auto"), (2, "auto"), (2, "auto")]
    timed = {(way.ranks, way.partition, way.strategy, way.transport) for way in ways}
    expected = {
        (ranks, partition, strategy, transport)
        for ranks in (2, 4)
        for partition in ("zigzag", "whole")
        for strategy in cpattn.STRATEGIES
        for transport in ("peer_memory", "collectives", "no transfer")
    }
    assert timed >= expected
    assert len({str(way) for way in ways}) == len(ways)


def test_a_pack_is_full_and_has_documents_as_often_as_they_are_counted() -> None:
    packs = [packed_documents(65536, seed) for seed in range(40)]
    lengths = [length for pack in packs for _, length in pack]
    assert all(sum(length for _, length in pack) == 65536 for pack in packs)
    assert max(lengths) == 16384
    assert packed_documents(65536, 3) == packs[3] != packs[4]
    # Pieces of a document that was cut count too: ten for each of the longest.
    pieces = sum(count * -(-(sum(ends) // 2) // 16384) for ends, count in DOCUMENTS.items())
    short = sum(count for (_, last), count in DOCUMENTS.items() if last <= 1024)
    assert sum(length <= 762 for length in lengths) / len(lengths) == pytest.approx(short / pieces, abs=0.05)
