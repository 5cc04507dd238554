"""All ranks of a group in one process, a thread each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from cpattn.errors import GroupError
from cpattn.metadata.batch import is_integer
from cpattn.transports.transport import Transport, Work


class LoopbackGroup:
    """All ranks in one process, a thread each: what tests and single-device benchmarks run on.

    >>> import torch
    >>> group = LoopbackGroup(1)
    >>> out = torch.empty(2)
    >>> group.transport(0).all_gather(out, torch.tensor([1.0, 2.0])).wait()
    >>> out
    tensor([1., 2.])

    Transfers are copies, made when the receiver waits. On CUDA all ranks must use one stream.
    ``timeout`` (seconds) bounds every wait; :meth:`abort` makes all waiting ranks raise at once.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        given: Any = size
        if not is_integer(given) or given < 1:
            raise GroupError(f"size={size!r}; pass the number of ranks of a loopback group, an integer of at least 1")
        self.size = size
        self.timeout = timeout
        self._changed = threading.Condition()
        # A message and the ranks that have yet to read it, by collective and sender.
        self._posted: dict[tuple[int, int], tuple[Tensor, set[int]]] = {}
        self._aborted = False
        # Collectives that each rank has begun.
        self._begun = [0] * size
        self._transports: WeakValueDictionary[int, Transport] = WeakValueDictionary()

    def __repr__(self) -> str:
        return f"LoopbackGroup({self.size} ranks, timeout {self.timeout:g} s{', aborted' if self._aborted else ''})"

    def transport(self, rank: int) -> Transport:
        """The end of one rank, to be used by one thread; the same one each time."""
        given: Any = rank
        if not is_integer(given) or not 0 <= rank < self.size:
            raise GroupError(f"rank {rank!r} of a loopback group of {self.size}; it must be from 0 to {self.size - 1}")
        with self._changed:
            transport = self._transports.get(rank)
            if transport is None:
                transport = self._transports[rank] = _LoopbackTransport(self, rank)
            return transport

    def communicator(self, rank: int) -> Transport:
        """:meth:`transport`, under the name that it had first."""
        return self.transport(rank)

    def abort(self) -> None:
        """Makes every rank that waits, now or later, raise: for when one of them has failed."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def post(self, rank: int, x: Tensor, readers: set[int]) -> int:
        """Offers a rank's message to these ranks; returns the number of the collective."""
        with self._changed:
            call = self._begun[rank]
            self._begun[rank] += 1
            self._posted[call, rank] = (x, readers)
            self._changed.notify_all()
            return call

    def read(self, call: int, rank: int, reader: int, out: Tensor, part: int | None = None) -> None:
        """Waits for a rank's message and copies it, or one part of it, for the rank ``reader``."""
        with self._changed:
            self._await(lambda: (call, rank) in self._posted, f"rank {rank}'s message")
            posted, readers = self._posted[call, rank]
            x = posted if part is None else posted[part]
            if x.shape != out.shape:
                raise RuntimeError(f"rank {rank} sent {len(x)} bytes in collective {call}, where {len(out)} were expected")
            out.copy_(x)
            readers.discard(reader)
            self._changed.notify_all()

    def retire(self, call: int, rank: int) -> None:
        """Waits until all have read a rank's message, so that its memory is free again."""
        with self._changed:
            self._await(lambda: not self._posted[call, rank][1], f"the readers of rank {rank}'s message")
            del self._posted[call, rank]

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        if self._changed.wait_for(lambda: condition() or self._aborted, self.timeout):
            if not condition():
                raise RuntimeError("another rank of this loopback group has failed")
        else:
            raise TimeoutError(f"waited {self.timeout} s for {what}; do all ranks make the same calls in the same order?")


class _LoopbackTransport(Transport):
    def __init__(self, group: LoopbackGroup, rank: int) -> None:
        super().__init__(rank, group.size)
        self._group = group

    def _all_gather(self, out: Tensor, x: Tensor) -> Work:
        parts = out.view(self.size, -1)
        everyone = range(self.size)
        return self._start(x, set(everyone), {rank: parts[rank] for rank in everyone})

    def _shift(self, out: Tensor, x: Tensor, by: int) -> Work:
        return self._start(x, {(self.rank + by) % self.size}, {(self.rank - by) % self.size: out})

    def _all_to_all(self, out: Tensor, x: Tensor) -> Work:
        return self._start(x, set(range(self.size)), dict(enumerate(out)), part=self.rank)

    def _start(self, x: Tensor, readers: set[int], receive: dict[int, Tensor], part: int | None = None) -> Work:
        call = self._group.post(self.rank, x, readers)
        left = list(receive.items())

        def wait() -> None:
            # An interrupted wait goes on where it was.
            while left:
                rank, out = left[-1]
                self._group.read(call, rank, self.rank, out, part)
                left.pop()
            self._group.retire(call, self.rank)

        return Work(wait)
