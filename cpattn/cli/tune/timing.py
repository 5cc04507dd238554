"""Timing kernels on a GPU: variants in turn, each launch between two events, medians."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

_LEAST_ROUNDS, _MOST_ROUNDS = 3, 200
# Larger than any L2 cache. Writing it also takes longer than the host takes for a launch, which then never is waited for.
_FLUSH_BYTES = 2**28
_K = TypeVar("_K", bound=Hashable)


def gpu_median_seconds(variants: Mapping[_K, Callable[[], Any]], seconds: float) -> dict[_K, float]:
    """The median time of each variant on the current GPU, each time with an empty cache; for about ``seconds`` in all,
    three rounds at least. All must have run before, so that nothing is compiled here."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs: dict[_K, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in variants}
    begin, end = _event(), _event()
    shuffled = random.Random(0)

    def one_round() -> None:
        # In an order of its own, as at its power limit a card is as fast as what ran before let it be.
        for name in shuffled.sample(list(variants), len(variants)):
            flush.zero_()
            pair = _event(), _event()
            pair[0].record()
            variants[name]()
            pair[1].record()
            pairs[name].append(pair)

    one_round()
    begin.record()
    one_round()
    end.record()
    torch.cuda.synchronize()
    for of_variant in pairs.values():
        of_variant.clear()
    for _ in range(min(_MOST_ROUNDS, max(_LEAST_ROUNDS, int(seconds / (begin.elapsed_time(end) * 1e-3)) - 2))):
        one_round()
    torch.cuda.synchronize()
    return {name: float(np.median([start.elapsed_time(stop) for start, stop in of_variant])) * 1e-3 for name, of_variant in pairs.items()}


def wait() -> None:
    """For all that was launched; raises what went wrong there."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
