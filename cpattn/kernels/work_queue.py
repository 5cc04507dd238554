"""Counters on the device from which the programs of a launch draw their work, each taking what comes next.

A kernel leaves its counter at 0, as it found it. So launches that follow each other can share one, but launches that may run
at the same time can not: each stream has a counter of its own, and so has each launch that a CUDA graph captures, as its
replays may run beside anything.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Counters that are made at once, each at a multiple of 16 bytes, for which kernels are compiled.
_POOL = 16384
_APART = 4

_lock = threading.Lock()
_pools: dict[torch.device, _Pool] = {}
# What graphs have captured is never freed: they do not keep it alive.
_captured: list[Tensor] = []


class _Pool:
    """The counters of one device, made outside of any capture."""

    def __init__(self, device: torch.device) -> None:
        self._counters = torch.zeros(_POOL * _APART, dtype=torch.int32, device=device)
        self._zeroed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._zeroed.record(torch.cuda.current_stream(device))
        self._taken = 0
        self.by_stream: dict[int, Tensor] = {}

    def take(self) -> Tensor | None:
        """A counter that nobody has; None if there is none left."""
        if self._taken == _POOL:
            return None
        self._taken += 1
        return self._counters[self._taken * _APART - _APART :][:1]

    def take_for_stream(self, device: torch.device, stream: int) -> Tensor:
        """The current stream's, at its first launch."""
        torch.cuda.current_stream(device).wait_event(self._zeroed)
        counter = self.take()
        self.by_stream[stream] = torch.zeros(1, dtype=torch.int32, device=device) if counter is None else counter
        return self.by_stream[stream]


def counter_for_launch(device: torch.device) -> Tensor:
    """A counter, int32 ``[1]``, for one launch on the device's current stream."""
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            pool = _pools.get(device)
            counter = None if pool is None else pool.take()
            # One that is made here is set to 0 by every replay.
            _captured.append(torch.zeros(1, dtype=torch.int32, device=device) if counter is None else counter)
            return _captured[-1]
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    pool = _pools.get(device)
    counter = None if pool is None else pool.by_stream.get(stream)
    if counter is not None:
        return counter
    with _lock:
        if device not in _pools:
            _pools[device] = _Pool(device)
        counter = _pools[device].by_stream.get(stream)
        return _pools[device].take_for_stream(device, stream) if counter is None else counter
