"""Timing on a GPU: variants as CUDA graphs, interleaved in random order, each replay timed by events."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import triton

from cpattn.attention.flash_varlen import missing
from cpattn.attention.registry import BACKENDS

# How long the card rests before a replay, in times of what the last one took. At full load an H200 reaches its power limit
# within milliseconds and lowers its clock: without a rest a variant is as fast as the one before it was economical, and the
# same launch of 25 ms takes 28 (632 or 752 TFLOP/s). Long rests are no better: short launches then meet a card asleep.
_REST = 2.0


def gpu_seconds(variants: Mapping[str, Callable[[], Any]], rounds: int = 15, graph: bool = True) -> dict[str, np.ndarray]:
    """The GPU time of each variant, in seconds, ``rounds`` times each.

    A graph leaves out what the host needs to launch. Every round runs each variant once, in an order of its own, each after
    a rest and a flush of the L2 cache.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    replays = {name: _captured(run) if graph else run for name, run in variants.items()}
    shuffled = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    last = 0.0
    for round_ in range(-2, rounds):
        for name in shuffled.sample(list(replays), len(replays)):
            # A sleep of less would take longer than it says.
            if last * _REST > 1e-3:
                time.sleep(last * _REST)
            flush.zero_()
            start, end = _event(), _event()
            start.record()
            replays[name]()
            end.record()
            end.synchronize()
            last = start.elapsed_time(end) * 1e-3
            if round_ >= 0:
                seconds[name].append(last)
    return {name: np.array(values) for name, values in seconds.items()}


def sustained_seconds(variants: Mapping[str, Callable[[], Any]], seconds: float = 0.25) -> dict[str, float]:
    """The mean GPU time of each variant where nothing else runs, replayed as a graph for about so long without a rest: at
    the clock that the card can hold."""
    means = {}
    for name, run in variants.items():
        replay = _captured(run)
        start, middle, end = _event(), _event(), _event()
        start.record()
        replay()
        middle.record()
        middle.synchronize()
        replays = max(3, round(seconds / (start.elapsed_time(middle) * 1e-3)))
        # The first half heats the card.
        for i in range(2 * (replays // 2)):
            if i == replays // 2:
                middle.record()
            replay()
        end.record()
        end.synchronize()
        means[name] = middle.elapsed_time(end) * 1e-3 / (replays // 2)
        time.sleep(seconds)
    return means


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
    fa3 = BACKENDS["flash_attn3"].describe() or "not installed"
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "triton": triton.__version__, "flash-attn-4": fa4}
    parts = [f"{name} {found}" for name, found in versions.items()]
    return f"{torch.cuda.get_device_name()}; {', '.join(parts)}; FlashAttention-3: {fa3}"
