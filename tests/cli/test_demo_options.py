"""``cpattn demo``: where its ranks run, what it refuses before it starts one, and its help where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cpattn
from cpattn.cli.demo.place import Place, place_for
from cpattn.cli.demo.setting import setting_for
from cpattn.cli.main import main, parser


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0+2000000000"], "too large for the demo, which computes it in float64 on one device; give it fewer tokens"),
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


@pytest.fixture
def _gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many GPUs, of which nothing is used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU of a test")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)


@pytest.mark.usefixtures("_gpus")
@pytest.mark.parametrize(
    ("_gpus", "device", "cp_size", "place"),
    [
        (0, "auto", None, ("cpu", "gloo", 4)),
        (0, "cpu", 3, ("cpu", "gloo", 3)),
        (1, "auto", None, ("cuda", "loopback", 4)),
        (1, "auto", 1, ("cuda", "nccl", 1)),
        (2, "auto", None, ("cuda", "nccl", 2)),
        (2, "cuda", 3, ("cuda", "loopback", 3)),
        (8, "auto", None, ("cuda", "nccl", 8)),
        (8, "auto", 4, ("cuda", "nccl", 4)),
        (8, "cpu", None, ("cpu", "gloo", 4)),
    ],
    indirect=["_gpus"],
)
def test_gpus_are_taken_where_there_are_some(device: str, cp_size: int | None, place: tuple[str, str, int]) -> None:
    found = place_for(device, cp_size)
    assert tuple(found) == place
    assert found.num_devices == (found.cp_size if found.transport == "nccl" else 1)
    words = {"gloo": "processes over gloo on the CPU", "nccl": "over NCCL, a GPU each: GPU of a test", "loopback": "share one GPU"}
    assert words[found.transport] in str(found)


@pytest.mark.parametrize("_gpus", [2], indirect=True)
@pytest.mark.usefixtures("_gpus")
def test_without_nccl_ranks_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert place_for("auto", None) == Place("cuda", "loopback", 2)


@pytest.mark.parametrize("_gpus", [0], indirect=True)
@pytest.mark.usefixtures("_gpus")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert f"--device cuda: torch {torch.__version__} sees no CUDA GPU here" in error
    assert "--device cpu needs none" in error


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sizes_are_those_of_the_device(device: str) -> None:
    def shape_of(*arguments: str) -> tuple[int, ...]:
        return tuple(setting_for(parser().parse_args(["demo", *arguments]), Place(device, "loopback", 2)).shape[:4])

    assert shape_of() == {"cpu": (8, 2, 64, 64), "cuda": (32, 8, 128, 128)}[device]
    assert shape_of("--heads", "6/3", "--head-dim", "16", "--batch", "0+9") == (6, 3, 16, 16)


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


def test_help_names_the_batch_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A wheel has no examples beside the package."""
    package = Path(cpattn.__file__).parent
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    beside_examples = " ".join(capsys.readouterr().out.split())
    assert "(default: examples/batches/mixed.json; on GPUs: 0+16k, 8k+4k, 4k+1 x 4, 0+7)" in beside_examples
    shutil.copytree(package, tmp_path / "cpattn", ignore=shutil.ignore_patterns("__pycache__"))
    text = demo_help(tmp_path)
    assert "mixed.json" not in text
    assert "(default: 0+600, 512+130, 0+7, 997+1, 64+0, 0+1; on GPUs: " in text
