"""``cpattn demo`` on GPUs: over NCCL with one for each rank, and as threads where there are fewer."""

from __future__ import annotations

import pytest
import torch

import cpattn
from cpattn.cli.main import main


@pytest.mark.parametrize("more", [0, 1], ids=["a GPU each", "more ranks than GPUs"])
def test_every_output_is_exact(more: int, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = torch.cuda.device_count()
    assert main(["demo", "--batch", "0+2k, 1k+512, 512+1 x 3, 0+7, 9+0", "--cp", str(gpus + more)]) == 0
    text = capsys.readouterr().out
    assert ("share one GPU" if more else "over NCCL, a GPU each") in text
    assert torch.cuda.get_device_name(0) in text
    for strategy in cpattn.STRATEGIES:
        line = next(line for line in text.splitlines() if line.startswith(f"{strategy} ") and "FLOP/s" in line)
        assert line.split()[5] == "yes"


def test_the_cpu_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--batch", "0+60", "--device", "cpu", "--cp", "2"]) == 0
    assert "2 processes over gloo on the CPU" in capsys.readouterr().out
