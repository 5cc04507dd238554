"""``cpattn picture``: text in the terminal, a file with -o."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import cpattn
from cpattn.cli.main import main
from cpattn.cli.more_even import more_even
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
    *work, last = capsys.readouterr().out.splitlines()
    assert "contiguous partition" in work[0]
    assert not any("zigzag" in line for line in work)
    contiguous = cpattn.plan([(0, 60), (33, 5)], 3, partition="contiguous")
    assert last == f"more even than contiguous: zigzag, {plan.pair_imbalance:.2f} times the mean instead of {contiguous.pair_imbalance:.2f}"
    assert main(["picture", "work", *BATCH]) == 0
    both = capsys.readouterr().out
    assert "zigzag partition" in both
    assert "contiguous partition" in both
    assert "whole partition" in both
    assert "more even" not in both
    assert main(["picture", "work", *BATCH, "--remainder", "first"]) == 0
    with_first = capsys.readouterr().out
    assert with_first.count("first remainder") == 2
    assert "whole" not in with_first


SHARDED = {
    "striped": (["--owner", "striped"], {"owner": cpattn.Striped()}),
    "striped by four": (["--owner", "striped:4"], {"owner": cpattn.Striped(4)}),
    "computed": (["--sharded"], {"prefix_shards": [(0, 0, 0), (12, 11, 11)]}),
}


@pytest.mark.parametrize(("arguments", "options"), SHARDED.values(), ids=SHARDED)
def test_a_sharded_cache(arguments: list[str], options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = cpattn.plan([(0, 60), (34, 5)], 3, **options)
    command = ["plan", "--batch", "0+60, 34+5", "--cp", "3", *arguments]
    assert main(["picture", *command]) == 0
    picture = capsys.readouterr().out
    assert picture == plan.draw() + "\n"
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fingerprint"] == plan.fingerprint
    assert [rank["held"] for rank in found["ranks"]] == plan.held_lens.sum(axis=0).tolist()
    assert main([*command, "--compare"]) == 0
    assert "the other keys" not in capsys.readouterr().out
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert picture in printed
    assert "all_gather" not in printed
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize(
    ("rule", "why"), [("stripes", "invalid rule: 'stripes'"), ("striped:", "invalid rule"), ("striped:0", "from 1 to")]
)
def test_a_rule_that_there_is_not(rule: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["picture", "plan", *BATCH, "--owner", rule])
    assert why in capsys.readouterr().err


MORE_EVEN = {
    "a partition that leaves whole": ([(1000, 1), (10, 1)] * 2, {}, "zigzag: whole"),
    "a sharded cache": ([(4096, 1)], {"partition": "whole"}, 'whole: a sharded cache with queries="all"'),
    "one that is sharded": ([(4096, 1)], {"owner": cpattn.Striped(2)}, 'zigzag: a sharded cache with queries="all"'),
    "a rule for the remainder": ([(900, 1), (900, 1)], {"remainder": "first"}, "zigzag with remainder first: zigzag"),
    "nothing": ([(0, 4096)], {}, None),
    "nothing by more than 2%": ([(0, 120), (100, 1)], {}, None),
    "what has too many rows passed over": ([(0, 2**30 + 2**29)], {"partition": "contiguous"}, "contiguous: zigzag"),
    "no work": ([(7, 0)], {}, None),
}


@pytest.mark.parametrize(("batch", "options", "said"), MORE_EVEN.values(), ids=MORE_EVEN)
def test_what_would_be_more_even(batch: list[tuple[int, int]], options: dict[str, Any], said: str | None) -> None:
    found = more_even(cpattn.plan(batch, 2, **options))
    assert found is None if said is None else found is not None and found.startswith(f"more even than {said}, ")


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
