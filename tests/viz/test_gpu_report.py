"""The figures of decode in the results, and the plot that is drawn from them, without a GPU."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DECODE = "256 x (8k + 1), cp 4"


@pytest.fixture
def bench_attention(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, which imports its neighbours as scripts do."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    import bench_attention

    yield bench_attention
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def test_decode_has_its_bandwidth_and_nothing_else_has() -> None:
    """64 requests of a rank, each with 8,193 keys and values of 8 heads of 128 in bf16, over the median time."""
    with (RESULTS / "attention_gpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    read = 64 * 8193 * 8 * (128 + 128) * 2
    expected = [f"{read / (float(line['p50, ms']) / 1e3) / 1e9:.0f}" if line["batch"] == DECODE else "" for line in lines]
    assert [line["GB/s of K and V"] for line in lines] == expected
    assert any(expected)
    written = (RESULTS / "attention_gpu.md").read_text()
    assert all(f"| {line['batch']} | {line['backend']} | {' | '.join(list(line.values())[2:])} |" in written for line in lines)


def test_the_benchmark_counts_the_same_bytes(bench_attention: Any) -> None:
    assert bench_attention.BATCHES[DECODE].bytes_read() == 64 * 8193 * 8 * (128 + 128) * 2
    assert bench_attention.bandwidth("32 x 1k, cp 4", 1.0) == ""


def test_decode_is_drawn_on_an_axis_of_its_own(bench_attention: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: axes.extend(figure.axes))
    (tmp_path / "attention_gpu.csv").write_text((RESULTS / "attention_gpu.csv").read_text())
    bench_attention.draw(tmp_path)
    work, memory = axes
    assert (work.get_ylabel(), memory.get_ylabel()) == ("TFLOP/s of causal work", "GB/s of keys and values read")
    assert [label.get_text() for label in memory.get_xticklabels()] == [DECODE]
    assert DECODE not in [label.get_text() for label in work.get_xticklabels()]
    # The same colours for the same names.
    colours = [{bars.get_label(): bars[0].get_facecolor() for bars in axis.containers} for axis in axes]
    assert colours[1] == {name: colours[0][name] for name in colours[1]}
