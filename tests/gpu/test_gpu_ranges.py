"""A profiler's trace of a GPU has a call's ranges, and NVTX has them too."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile

import cpattn
from cpattn.testing import SoloCommunicator


def call() -> None:
    meta = cpattn.build_metadata([(0, 100)], 2, 1, "cuda")
    x = torch.randn(meta.rows, 2, 64, device="cuda", dtype=torch.bfloat16)
    cpattn.cp_attention(x, x, x, meta, group=SoloCommunicator(1, 2), strategy="ring")


def test_kernels_and_ranges_are_in_one_trace() -> None:
    call()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    # A range stands once among the host's events, and once over the kernels on the GPU's own timeline.
    names = [event.name for event in trace.events() or [] if event.device_type.name == "CPU"]
    assert [names.count(f"cpattn::{name}") for name in ("ring hop 0/2", "ring hop 1/2", "send", "wait")] == [1, 1, 1, 1]


def test_ranges_are_made_for_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    honest = profiler.record_function

    def noted(name: str) -> profiler.record_function:
        made.append(name)
        return honest(name)

    monkeypatch.setattr(profiler, "record_function", noted)
    with profiler.emit_nvtx():  # type: ignore[no-untyped-call]
        call()
    assert made.count("cpattn::ring hop 1/2") == 1
