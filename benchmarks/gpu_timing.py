"""Timing on a GPU: variants as CUDA graphs, interleaved, each replay timed by events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import triton

from cpattn.attention.flash_varlen import missing


def gpu_seconds(variants: Mapping[str, Callable[[], Any]], rounds: int = 15, graph: bool = True) -> dict[str, np.ndarray]:
    """The GPU time of each variant, in seconds, ``rounds`` times each.

    A graph leaves out what the host needs to launch. Every round runs each variant once, after a flush of the L2 cache.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    replays: dict[str, Callable[[], Any]] = {}
    for name, run in variants.items():
        replays[name] = _captured(run) if graph else run
    events = {name: [(_event(), _event()) for _ in range(rounds)] for name in variants}
    for _ in range(2):
        for replay in replays.values():
            replay()
    for round_ in range(rounds):
        for name, replay in replays.items():
            flush.zero_()
            start, end = events[name][round_]
            start.record()
            replay()
            end.record()
    torch.cuda.synchronize()
    return {name: np.array([start.elapsed_time(end) * 1e-3 for start, end in pairs]) for name, pairs in events.items()}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        graph.replay()

    return replay


def gpu_machine() -> str:
    """The device and the versions, in one line."""
    from importlib.metadata import version

    fa4 = "not installed" if missing("flash_attn.cute", "") else version("flash-attn-4")
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}, flash-attn-4 {fa4}"
    return f"{torch.cuda.get_device_name()}; {versions}"
