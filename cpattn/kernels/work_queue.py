"""Counters on the device from which the programs of a launch draw their work, each taking what comes next.

A counter is two numbers: what has been drawn, and how many programs have ended. A kernel leaves both at 0, as it found
them. So launches that follow each other can share one, but launches that may run at the same time cannot. Each stream has
a counter of its own, and so has each launch that a CUDA graph captures, as its replays may run beside anything. (A capture has to
begin as ``torch.cuda.graph`` begins it, when the device is done with what came before: with setting counters to 0, too.)
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch
from torch import Tensor

from cpattn.current import is_capturing

# Counters that are made at once, each at a multiple of 16 bytes, for which kernels are compiled; and how few may be left
# before more are made. That is done by launches that no graph captures, as it would capture that as well: what is left
# has to do for one graph.
_MADE = 32768
_LEAST = 16384
_APART = 4
# cudaStreamPerThread: one handle for as many streams as there are threads.
_PER_THREAD = 2

_lock = threading.Lock()
_pools: dict[torch.device, _Pool] = {}
# What graphs have captured is never freed: they do not keep it alive.
_captured: list[Tensor] = []


class _Pool:
    """The counters of one device. Each is taken once; a stream keeps its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.by_stream: dict[Hashable, Tensor] = {}
        self.left = 0
        self.refill()

    def refill(self) -> None:
        """Makes counters, on the current stream. Those before were taken, or are left to nobody: they live on."""
        self._counters = torch.zeros(_MADE * _APART, dtype=torch.int32, device=self._device)
        self._zeroed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._zeroed.record(torch.cuda.current_stream(self._device))
        _captured.append(self._counters)
        self.left = _MADE

    def take(self) -> Tensor | None:
        """A counter that nobody has; None if there is none left."""
        if self.left == 0:
            return None
        self.left -= 1
        return self._counters[self.left * _APART :][:2]

    def take_for_stream(self, stream: Hashable) -> Tensor:
        """For the current stream, at its first launch."""
        torch.cuda.current_stream(self._device).wait_event(self._zeroed)
        counter = self.take()
        assert counter is not None  # there are some at least
        self.by_stream[stream] = counter
        return counter


def counter_for_launch(device: torch.device) -> Tensor:
    """A counter, int32 ``[2]``, for one launch on the device's current stream."""
    pool = _pools.get(device)
    if is_capturing(device):
        with _lock:
            counter = None if pool is None else pool.take()
            if counter is None:
                # One that is made here is set to 0 by every replay.
                counter = torch.zeros(2, dtype=torch.int32, device=device)
                _captured.append(counter)
            return counter
    stream: Hashable = torch._C._cuda_getCurrentRawStream(device.index)
    if stream == _PER_THREAD:
        stream = stream, threading.get_ident()
    if pool is not None and pool.left > _LEAST and stream in pool.by_stream:
        return pool.by_stream[stream]
    with _lock:
        pool = _pools.get(device) or _pools.setdefault(device, _Pool(device))
        if pool.left <= _LEAST:
            pool.refill()
        counter = pool.by_stream.get(stream)
        return pool.take_for_stream(stream) if counter is None else counter
