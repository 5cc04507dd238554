"""``cpattn demo``: what it refuses before it starts a process, and its help where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cpattn
from cpattn.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0+2000000000"], "too large for the demo, which computes it in float64 on the CPU; give it fewer tokens"),
        (["--batch", "0+400000"], "too large for the demo"),
        (["--batch", "0+9", "--heads", "1000000000"], "--heads 1000000000: it can be 1,048,576 at most"),
        (["--batch", "0+9", "--seed", "9" * 30], "it must fit into 64 bits"),
        (["--cp", "4096"], "--cp 4096 would start as many processes; the demo starts 64 at most"),
    ],
)
def test_what_it_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def demo_help(packages: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cpattn", "demo", "--help"],
        cwd=packages,
        env=os.environ | {"PYTHONPATH": str(packages), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    return " ".join(done.stdout.split())


def test_help_names_the_batch_that_runs(tmp_path: Path) -> None:
    """A wheel has no examples beside the package."""
    package = Path(cpattn.__file__).parent
    assert "(default: examples/batches/mixed.json)" in demo_help(package.parent)
    shutil.copytree(package, tmp_path / "cpattn", ignore=shutil.ignore_patterns("__pycache__"))
    text = demo_help(tmp_path)
    assert "mixed.json" not in text
    assert "(default: 0+600, 512+130, 0+7, 997+1, 64+0, 0+1)" in text
