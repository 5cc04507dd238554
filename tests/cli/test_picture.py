"""``cpattn picture``: text in the terminal, a file with -o."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import cpattn
from cpattn.cli.main import main
from cpattn.viz import ring_schedule

BATCH = ["--batch", "0+60, 33+5", "--cp", "3"]


@pytest.mark.parametrize("kind", ["plan", "ring", "work"])
def test_to_a_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.svg"
    assert main(["picture", kind, *BATCH, "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"drawn to {path}\n"
    assert "</svg>" in path.read_text()


def test_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    plan = cpattn.plan([(0, 60), (33, 5)], 3)
    assert main(["picture", "plan", *BATCH]) == 0
    assert capsys.readouterr().out == plan.draw() + "\n"
    assert main(["picture", "ring", *BATCH, "--transfer", "2"]) == 0
    ring = capsys.readouterr().out
    assert ring.count("computes |") == ring.count("sends    |") == 3
    assert f"ranks compute {ring_schedule(plan, 2).busy:.0%} of the time, if a transfer lasts 2 of a mean hop" in ring
    assert main(["picture", "work", *BATCH, "--partition", "contiguous"]) == 0
    work = capsys.readouterr().out
    assert "contiguous partition" in work
    assert "zigzag" not in work
    assert main(["picture", "work", *BATCH]) == 0
    both = capsys.readouterr().out
    assert "zigzag partition" in both
    assert "contiguous partition" in both
    assert "whole partition" in both
    assert main(["picture", "work", *BATCH, "--remainder", "first"]) == 0
    with_first = capsys.readouterr().out
    assert with_first.count("first remainder") == 2
    assert "whole" not in with_first


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("kind", ["plan", "ring", "work"])
def test_text_fits_the_terminal(kind: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("picture", "plan"):
        monkeypatch.setattr(f"cpattn.cli.{module}.columns", lambda: width)
    assert main(["picture", kind, "--batch", "8192+1, 0+4096, 2097152+1048576", "--cp", "16"]) == 0
    bars = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert len(bars) >= 3
    assert width - 12 <= max(map(len, bars)) <= width


@pytest.mark.parametrize("output", [[], ["-o", "ring.svg"]], ids=["text", "file"])
def test_a_ring_of_very_many_ranks_is_refused_at_once(output: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["picture", "ring", "--batch", "0+60", "--cp", "4096", *output]) == 2
    error = capsys.readouterr().err
    assert "a ring over 4096 ranks has as many hops, too many to show; 256 ranks at most" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("transfer", ["inf", "1e400", "nan", "-1", "1e308"])
def test_a_transfer_that_never_ends_is_refused(transfer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["picture", "ring", *BATCH, f"--transfer={transfer}"]) == 2
    assert "it must be at least 0: the time of a transfer, in hops of attention, 1,000,000 at most" in capsys.readouterr().err


def test_very_many_requests_are_drawn_in_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["picture", "plan", "--batch", ",".join(["8+1"] * 256), "--cp", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["128 requests: 8 + 1 |........0|", "128 requests: 8 + 1 |........1|"]


def test_without_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["picture", "work", *BATCH, "-o", str(tmp_path / "work.png")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'cpattn[viz]'" in error
    assert error.count("\n") == 1
    assert main(["plan", *BATCH, "--draw", str(tmp_path / "plan.png")]) == 2
    assert "pip install 'cpattn[viz]'" in capsys.readouterr().err
