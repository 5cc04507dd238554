"""``cpattn bench``: every line is there, on whatever machine; the figures are its own affair."""

from __future__ import annotations

import pytest
import torch

import cpattn
from cpattn.cli.bench.device import median_seconds
from cpattn.cli.bench.sizes import batches, flops, sizes
from cpattn.cli.main import main


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize(
    ("kind", "words", "lines"),
    [("attention", ["backend"], 3), ("layer", list(cpattn.STRATEGIES), 3 * len(cpattn.STRATEGIES)), ("metadata", ["cp_size"], 12)],
)
def test_it_prints_a_table(capsys: pytest.CaptureFixture[str], kind: str, words: list[str], lines: int, tokens: int) -> None:
    assert main(["bench", kind, "--tokens", str(tokens), "--seconds", "0.01"]) == 0
    text = capsys.readouterr().out
    for word in [*words, torch.__version__, cpattn.__version__, "benchmarks/results/", "medians"]:
        assert word in text
    table = text.split("\n\n")[2].splitlines()
    assert len(table) >= 2 + lines


def test_bad_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--tokens", "0"], ["--seconds", "0"], ["--seconds", "nan"]):
        assert main(["bench", "layer", *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_variants_run_in_turn() -> None:
    calls: list[str] = []
    median_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0)
    assert calls == ["a", "b"] * 4


def test_flops_of_one_request_alone() -> None:
    """n (n + 1) / 2 pairs, two products of a multiply and an add for each of the head's dimensions."""
    used = sizes()
    assert flops(cpattn.plan([(0, 4)], 1), 0, used) == 10 * 4 * used.head_dim * used.heads
    assert list(batches(64).values())[1] == [(64, 64)]
