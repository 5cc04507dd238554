"""The examples with a GPU for each process: over NCCL, and right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def output_of(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        ("quickstart", []),
        ("custom_model", []),
        ("custom_model", ["--compile"]),
        ("hugging_face", []),
        ("hf_generate", []),
        ("perplexity", ["--tokens", "20011"]),
    ],
)
def test_an_example_takes_the_gpus(example: str, arguments: list[str]) -> None:
    if example in ("hugging_face", "hf_generate", "perplexity"):
        pytest.importorskip("transformers")
    gpus = torch.cuda.device_count()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    printed = output_of(*launch, f"examples/{example}.py", *arguments)
    for rank in range(gpus):
        assert f"rank {rank} of {gpus} on cuda:{rank}: " in printed


def test_more_processes_than_gpus_take_the_cpu() -> None:
    processes = torch.cuda.device_count() + 1
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    assert output_of(*launch, "examples/quickstart.py").count(" on cpu: ") == processes


def test_the_engine_takes_the_gpus() -> None:
    pytest.importorskip("transformers")
    gpus = torch.cuda.device_count()
    printed = output_of("examples/mini_engine.py", "--cp", str(gpus), "--new-tokens", "3", "--budget", "256")
    assert f"{gpus} processes on cuda: " in printed
    assert printed.count("27 of 27 tokens equal those of generate") == 2
