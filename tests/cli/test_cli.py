from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from cpattn import BACKENDS, STRATEGIES
from cpattn.cli.demo import comparison
from cpattn.cli.demo.place import Place
from cpattn.cli.demo.setting import setting_for
from cpattn.cli.main import main, parser


def test_demo_runs_and_is_exact(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    batch = tmp_path / "batch.json"
    batch.write_text('[[0, 60], {"prefix_len": 33, "extend_len": 5, "note": "short"}, [4, 0]]')
    options = ["--cp", "3", "--heads", "4", "--head-dim", "32", "--dtype", "float32", "--seed", "3"]
    assert main(["demo", "--batch", str(batch), *options]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    check_demo(out, "3 processes over gloo on the CPU")
    for text in ("rank", "query-key pairs", "all_gather", "ring", "relative RMSE", "bytes sent", "as exact as one device's"):
        assert text in out
    # 22 rows a rank, 1 head of K and V, 32 wide, fp32, to 2 other ranks
    assert f"{22 * 2 * 32 * 4 * 2:,}" in out


def test_the_demo_is_the_same_where_ranks_are_threads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The path of GPUs, but for the device and NCCL."""
    monkeypatch.setattr("cpattn.cli.demo.place_for", lambda device, cp_size: Place("cpu", "loopback", 3))
    assert main(["demo", "--batch", "0+60, 33+5, 4+0", "--heads", "4/2", "--head-dim", "32", "--dtype", "float32"]) == 0
    check_demo(capsys.readouterr().out, "3 threads on the CPU")


def check_demo(text: str, ranks: str) -> None:
    """Each strategy has a line, is exact, and was timed."""
    assert ranks in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if "FLOP/s" in line}
    for strategy in STRATEGIES:
        assert lines[strategy][1] == "cpu"
        assert lines[strategy][5] == "yes"
        assert float(lines[strategy][7]) >= 0
        assert lines[strategy][8] in ("GFLOP/s", "TFLOP/s")


def test_rounded_partial_results_may_have_their_own_error_and_that_of_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without a backend that gives them in fp32."""
    place = Place("cpu", "loopback", 2)
    setting = setting_for(parser().parse_args(["demo", "--batch", "0+60", "--head-dim", "16"]), place)
    bounds = {outcome.name: outcome.bound for outcome in comparison.measure(setting, place)}
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], fp32_out=False))
    rounded = {outcome.name: outcome for outcome in comparison.measure(setting, place)}
    assert rounded["ring"].bound > 1.3 * bounds["ring"]
    assert rounded["all_gather"].bound == bounds["all_gather"]
    assert all(outcome.fine for outcome in rounded.values())


def test_demo_exits_with_1_if_an_output_is_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    honest = comparison.in_order

    def with_two_tokens_swapped(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = honest(*arguments)
        out[[3, 4]] = out[[4, 3]]
        return out, lse

    monkeypatch.setattr(comparison, "in_order", with_two_tokens_swapped)
    monkeypatch.setattr("cpattn.cli.demo.place_for", lambda device, cp_size: Place("cpu", "loopback", 2))
    assert main(["demo", "--cp", "2", "--heads", "2", "--head-dim", "8"]) == 1
    assert "an output is OFF" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "cannot read the batch file", id="no file"),
        pytest.param("[[0, 1", "is not a JSON file", id="not JSON"),
        pytest.param('{"a": 1}', "holds a JSON dict; a batch file is a list", id="not a list"),
        pytest.param("[[0, 1], [2]]", r"request 1 is [2]", id="not a pair"),
        pytest.param('[{"prefix_len": 3}]', "request 0 has no extend_len", id="missing key"),
        pytest.param("[[0, -1]]", "request 0 has extend_len=-1; a length cannot be negative", id="negative"),
        pytest.param("[[0, 1.5]]", "extend_len=1.5 (float), which is not an integer", id="not an integer"),
    ],
)
def test_a_bad_batch_file_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    batch = tmp_path / "batch.json"
    if content is not None:
        batch.write_text(content)
    assert main(["demo", "--batch", str(batch)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_refusal_is_the_exit_code_of_the_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["cpattn", "demo", "--batch", "none.json"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("cpattn", run_name="__main__")
    error = capsys.readouterr().err
    assert "cannot read the batch file" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cp", "0"], "cp_size=0; it must be an integer of at least 1"),
        (["--cp", "100"], "would start as many processes"),
        (["--heads", "6", "--kv-heads", "4"], "query heads must be a multiple"),
        (["--head-dim", "0"], "it must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_choice_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--dtype", "int8"])
    assert "invalid choice" in capsys.readouterr().err
