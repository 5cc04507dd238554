"""The device to measure on, and the clock that fits it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

import cpattn


def device() -> torch.device:
    """The GPU if torch can use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """What is measured on."""
    where = device()
    return torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {"cpattn": cpattn.__version__, "torch": torch.__version__, "numpy": np.__version__, "Python": platform.python_version()}


class Timing(NamedTuple):
    """How long a variant's runs took, in seconds: percentiles, and the number of runs."""

    p20: float
    p50: float
    p80: float
    runs: int


def timings(variants: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Timing]:
    """The times of each variant; they run in turn, for about ``seconds`` in all, three rounds at least."""
    wait = torch.cuda.synchronize if device().type == "cuda" else _nothing
    for run in variants.values():
        run()
    wait()
    times: dict[str, list[float]] = {name: [] for name in variants}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for name, run in variants.items():
            begin = time.perf_counter()
            run()
            wait()
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return {name: _timing(values) for name, values in times.items()}


def _timing(values: list[float]) -> Timing:
    p20, p50, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return Timing(p20, p50, p80, len(values))


def _nothing() -> None:
    pass
