"""Transport: the three collectives that the exchange needs, and the memory that they send from and to.

A message is a contiguous tensor of any dtype; it travels as bytes, so that nothing below has to know the dtype.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from cpattn.current import is_capturing
from cpattn.transports.group_state import GroupState

T = TypeVar("T")


_living: WeakSet[Transport] = WeakSet()
# Another thread may make one while they are counted.
_living_changes = threading.Lock()
# A graph may outlive whoever captured it, and the memory that it replays over must not be freed.
_with_captured: set[Transport] = set()


class Work:
    """A transfer in flight. Neither its source may be written nor its destination read before :meth:`wait`."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def wait(self) -> None:
        """Returns when the transfer is done; on CUDA, when all later work of the current stream will come after it."""
        self._wait()


class Transfer(NamedTuple):
    """A transfer between two messages that stay where they are; :meth:`Transport.start` starts it, again and again.

    Attributes:
        begin: ``begin(transport, *arguments)``. It is kept with the transport's buffers, and so has no reference to it.
        nbytes: that are sent.
        fill_missing: writes what stands for the message if this rank could not make it: NaN. None where it is there before
            the call, or was received from another rank.
    """

    begin: Callable[..., Work]
    nbytes: int
    arguments: tuple[Any, ...]
    fill_missing: Callable[[], object] | None = None


class Transport(ABC):
    """One rank's end of a context-parallel group.

    Every rank must make the same calls in the same order with the same sizes. One call of ``cp_attention`` uses a
    transport at a time; its buffers are reused by the next.

    Attributes:
        rank, size: within the group.
        state: of the group, as far as this process knows it.
        call_captures: whether a CUDA graph captures the call that is under way; None between calls.
        bytes_sent: what this rank has sent to others so far; a broadcast counts once for each receiver.
    """

    state: GroupState

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.state = GroupState()
        self.bytes_sent = 0
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        # What was last made of them under each name, for which sizes; see reuse.
        self._made: dict[str, tuple[Hashable, Any]] = {}
        self._captured: list[Tensor] = []
        self.call_captures: bool | None = None
        with _living_changes:
            _living.add(self)

    def check_usable(self) -> None:  # noqa: B027 - most groups last as long as their transports
        """Raises GroupError where what it sends over is gone."""

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """Starts to bring every rank's ``x`` to every rank: ``out`` is ``[size * len(x), ...]``, in the order of ranks."""
        return self.start(self.prepare_all_gather(out, x))

    def shift(self, out: Tensor, x: Tensor, by: int = 1) -> Work:
        """Starts to send ``x`` to the rank that comes ``by`` ranks later around the ring, the next one by default, and to
        receive into ``out`` from the one that comes as many before. ``by`` is no multiple of the size."""
        return self.start(self.prepare_shift(out, x, by))

    def all_to_all(self, out: Tensor, x: Tensor) -> Work:
        """Starts to send part r of ``x`` to rank r and to receive rank r's part for this rank as part r of ``out``; both
        are ``[size, ...]``."""
        return self.start(self.prepare_all_to_all(out, x))

    def prepare_all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        """An :meth:`all_gather` of these two, to be started any number of times: to view a message as bytes takes the host
        several microseconds, and all layers of a batch send from and to the same memory."""
        return Transfer(type(self)._all_gather, (self.size - 1) * x.nbytes, (_as_bytes(out), _as_bytes(x)))

    def prepare_shift(self, out: Tensor, x: Tensor, by: int = 1) -> Transfer:
        """A :meth:`shift` of these two, to be started any number of times."""
        return Transfer(type(self)._shift, x.nbytes, (_as_bytes(out), _as_bytes(x), by % self.size))

    def prepare_all_to_all(self, out: Tensor, x: Tensor) -> Transfer:
        """An :meth:`all_to_all` of these two, to be started any number of times."""
        parts = _as_bytes(out).view(self.size, -1), _as_bytes(x).view(self.size, -1)
        return Transfer(type(self)._all_to_all, x.nbytes // self.size * (self.size - 1), parts)

    def start(self, transfer: Transfer) -> Work:
        """Starts what this transport has prepared."""
        self.bytes_sent += transfer.nbytes
        return transfer.begin(self, *transfer.arguments)

    @abstractmethod
    def _all_gather(self, out: Tensor, x: Tensor) -> Work: ...

    @abstractmethod
    def _shift(self, out: Tensor, x: Tensor, by: int) -> Work: ...

    @abstractmethod
    def _all_to_all(self, out: Tensor, x: Tensor) -> Work: ...

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory of that shape, kept under ``name`` and given again to whoever asks for that name.

        What a CUDA graph has captured is never freed, even where a larger batch has since needed more.
        """
        key = shape, dtype, device
        return self.reuse(f"buffer {name}", key, device, lambda: self._view_of_buffer(name, shape, dtype, device))

    def _view_of_buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = dtype.itemsize
        for length in shape:
            size *= length
        kept = self._buffers.get((name, device))
        if kept is None or len(kept) < size:
            if kept is not None:
                self.state.keep_until_done(kept)
            # A little more than asked for, so that slowly growing batches do not allocate at every step.
            kept = self._buffers[name, device] = torch.empty(size + size // 8, dtype=torch.uint8, device=device)
            # Views of what it replaces would keep that alive.
            self._made.clear()
        if self._captures(device) and not any(kept is x for x in self._captured):
            self._captured.append(kept)
            _with_captured.add(self)
        return kept[:size].view(dtype).view(shape)

    def reuse(self, name: str, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """``make()``, or what it returned when it was last called under that name, if that was for an equal key.

        For views of :meth:`buffer` and transfers between them, which are the same in all layers of a batch: each view takes
        the host a microsecond or two. What a CUDA graph captures is made anew, so that its buffers are known.

        Args:
            key: all that the result depends on.
            make: asks for buffers and makes views of them; nothing else.
        """
        last = self._made.get(name)
        if last is not None and last[0] == key and not self._captures(device):
            made: T = last[1]
            return made
        # Memory made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            made = make()
        self._made[name] = key, made
        return made

    def _captures(self, device: torch.device) -> bool:
        """Whether a CUDA graph captures; within a call it was asked as it began, as asking takes the host half a microsecond."""
        return is_capturing(device) if self.call_captures is None else self.call_captures

    def release(self) -> None:
        """Frees the buffers that no CUDA graph has captured; the next call makes them anew."""
        for memory in self._buffers.values():
            self.state.keep_until_done(memory)
        self._buffers.clear()
        self._made.clear()


# The name that it had first, for those who use or subclass it.
Communicator = Transport


def living_transports() -> list[Transport]:
    """All of this process."""
    with _living_changes:
        return list(_living)


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
