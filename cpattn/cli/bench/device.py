"""The device to measure on, and the clock that fits it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

import cpattn


def device() -> torch.device:
    """The GPU if torch can use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """Device and versions, in one line."""
    where = device()
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}; cpattn {cpattn.__version__}, torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}"


def median_seconds(variants: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The median time of each variant; they run in turn, for about ``seconds`` in all, three rounds at least."""
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
    return {name: float(np.median(values)) for name, values in times.items()}


def _nothing() -> None:
    pass
