"""The memory that the ranks of a group share: heaps that all of them make, grow and release together, that stay as long as a CUDA graph
may replay over them, and that say what has gone wrong."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from cpattn.current import is_capturing
from cpattn.errors import GroupError, OptionError, UnsupportedError, in_a_line
from cpattn.kernels.peer_layout import BOARDS, OTHER_MESSAGE
from cpattn.transports.group_state import GroupState
from cpattn.transports.peer_heap import PeerHeap, synchronize
from cpattn.transports.posted import Posted

MOST_MESSAGE_BYTES = 8 * 2**30
_MOST_SECONDS = 24 * 3600
# Before the number of a fault, in what ranks say to each other.
_FAULT_FOUND = "has found fault "
# What a graph has captured stays, also where it outlives its transport.
_of_graphs: list[PeerHeap] = []


class Sharers(Protocol):
    """What ranks do together to share memory, as one of them has it."""

    state: GroupState

    def told_by_all(self, what: Any) -> list[Any]:
        """What each rank says to all, in the order of ranks. A collective of their hosts."""

    def allocate_shared(self, nbytes: int, device: torch.device) -> Tensor:
        """Memory that can be shared, uint8 of at least that many bytes; each rank by itself."""

    def make_heap(self, memory: Tensor, seal: int) -> PeerHeap:
        """Of what each rank has allocated, with a seal of each one's own in it. A collective of their hosts."""

    def on_device(self) -> AbstractContextManager[Any]:
        """Within which kernels are launched on the messages' device."""


class SharedMemory:
    """One rank's part of it. What takes ``ranks`` takes its transport, to which it keeps no reference.

    Attributes:
        device: that it is on; None as long as no call has needed it.
        heap: that calls post in; None as long as there is none.
        captured: heaps that graphs have captured, the present one among them or not.
        too_large: what could not be made, in bytes, and why.
        limit: seconds that a device waits for another rank.
    """

    def __init__(self, limit: float) -> None:
        self.device: torch.device | None = None
        self.heap: PeerHeap | None = None
        self.captured: list[PeerHeap] = []
        self.too_large: tuple[int, str] | None = None
        self.set_limit(limit)

    def set_limit(self, seconds: float) -> None:
        """How long devices wait; holds for graphs that are captured already. Raises OptionError."""
        given: Any = seconds
        if isinstance(given, bool) or not isinstance(given, Real) or not 0 < float(given) <= _MOST_SECONDS:
            raise OptionError(f"limit={seconds!r}; pass seconds, more than 0 and at most {_MOST_SECONDS:,}")
        if self.device is not None and is_capturing(self.device):
            raise OptionError("limit= would be set at each replay of the graph that captures; set it before")
        self.limit = float(seconds)
        for heap in self.heaps():
            heap.set_limit(self.limit)

    def heaps(self) -> list[PeerHeap]:
        """All that calls or graphs may be using. A device that waits over one knows nothing of a fault in another until its host looks:
        it waits no longer than its own limit, and what it reads then is right or NaN."""
        if self.heap is None or self.heap in self.captured:
            return self.captured
        return [*self.captured, self.heap]

    def takes(self, nbytes: int) -> bool:
        """Whether there may be room for a message of that size, as far as can be said before it has a place."""
        return nbytes > 0 and (self.too_large is None or nbytes < self.too_large[0])

    def look_for_fault(self, ranks: Sharers) -> None:
        """See :meth:`Transport.look_for_fault`."""
        # In every call, in which there is one heap as a rule.
        fault = 0 if self.heap is None else self.heap.fault
        if not fault and self.captured:
            fault = next((heap.fault for heap in self.captured if heap.fault), 0)
        if fault:
            # What waits within graphs over other memory ends, too.
            for heap in self.heaps():
                heap.mark(fault)
            self._raise_fault(ranks, [f"{_FAULT_FOUND}{fault}"])

    def heap_for(self, ranks: Sharers, messages: Collection[Posted], nbytes: int, *, captures: bool, insists: bool) -> PeerHeap:
        """A heap in which a call's messages have place.

        Args:
            nbytes: of all that lies there.
            captures: whether a CUDA graph captures the call.
            insists: whether memory that could not be made is asked for again.

        Raises as :meth:`grow`, and UnsupportedError where they are too many or too large.
        """
        # None is larger than all of them.
        if len(messages) > BOARDS or nbytes > MOST_MESSAGE_BYTES:
            largest = max(message.nbytes for message in messages)
            if len(messages) > BOARDS or largest > MOST_MESSAGE_BYTES:
                raise UnsupportedError(
                    f"a call of {len(messages)} messages, the largest of {largest / 2**30:.1f} GiB; kind='peer_memory' takes {BOARDS} "
                    f"of at most {MOST_MESSAGE_BYTES // 2**30} GiB: lower overlap=, or send it by kind='collectives'"
                )
        assert self.heap is not None  # the first call has made one
        if nbytes > self.heap.capacity:
            self._grow_once(ranks, nbytes, captures=captures, insists=insists)
        if captures and self.heap not in self.captured:
            self.captured.append(self.heap)
            _of_graphs.append(self.heap)
        return self.heap

    def _grow_once(self, ranks: Sharers, nbytes: int, *, captures: bool, insists: bool) -> None:
        if self.too_large is not None and nbytes >= self.too_large[0]:
            raise UnsupportedError(self.too_large[1])
        try:
            self.grow(ranks, nbytes, captures=captures)
        except UnsupportedError as error:
            if not insists:
                self.too_large = nbytes, str(error)
            raise

    def grow(self, ranks: Sharers, nbytes: int, *, captures: bool) -> None:
        """A heap of that size, or more, on every rank, in the place of what there was. Raises on every rank alike, and leaves what
        there was: GroupError where a rank has found a fault, UnsupportedError where one has no memory."""
        if captures:
            raise GroupError(
                "a CUDA graph captures a call over larger messages than this group has had, for which its ranks have to make memory "
                "together; make one such call before you capture"
            )
        assert self.device is not None
        # Made under inference_mode, as in a serving engine's first call, it could not be written outside of it: the limit, or a fault.
        with ranks.on_device(), torch.inference_mode(False):
            memory, failure, heap, seal = None, "", None, 1 + secrets.randbelow(2**31 - 1)
            try:
                failure = self._fault_on_device()
                memory = None if failure else _allocate_or_empty_cache(ranks, nbytes + nbytes // 8, self.device)
            except Exception as error:
                failure = f"could not make {nbytes / 2**20:.0f} MiB of shared memory ({in_a_line(error)})"
            seals = self._told_unless_failed(ranks, failure, seal)
            try:
                assert memory is not None
                heap = ranks.make_heap(memory, seal)
                _check_seals(heap, seals)
            except Exception as error:
                failure = f"could not see the others' memory ({in_a_line(error)})"
            self._told_unless_failed(ranks, failure)
            # Nobody reads the old one any more: all have come here, and have waited for their devices.
            self.heap = heap

    def release(self, ranks: Sharers, *, alone: bool) -> None:
        """See :meth:`Transport.release_together`. ``alone``: where nobody comes any more, and nobody calls."""
        if self.heap is None:
            return
        assert self.device is not None
        if is_capturing(self.device):
            raise GroupError(
                "a CUDA graph captures, and memory that ranks share is freed once their devices have done their work; release it before"
            )
        if alone:
            # What was launched before may still wait in this memory, no longer than the limit.
            synchronize(self.device)
            self.heap = None
            return
        with ranks.on_device():
            fault, is_captured = self._fault_on_device(), self.heap in self.captured
            try:
                said = ranks.told_by_all((fault, is_captured))
            except BaseException:
                # Nobody calls any more.
                self.heap = None
                raise
        # There may be more of it now.
        self.too_large = None
        # Where a graph replays over it on one rank, the others' are read there.
        if not any(captured for _, captured in said):
            self.heap = None
        self._raise_fault(ranks, (fault for fault, _ in said))

    def _fault_on_device(self) -> str:
        """What has gone wrong, also as far as the host of a rank that has not waited does not know of it; waits for the device."""
        assert self.device is not None
        synchronize(self.device)
        return next((f"{_FAULT_FOUND}{fault}" for heap in self.heaps() if (fault := heap.fault_on_device())), "")

    def _told_unless_failed(self, ranks: Sharers, failure: str, number: int = 0) -> list[int]:
        """Each rank's number. Raises what the first rank says that has failed, on every rank."""
        failures, numbers = zip(*ranks.told_by_all((failure, number)), strict=True)
        self._raise_fault(ranks, failures)
        for rank, text in enumerate(failures):
            if text:
                raise UnsupportedError(f"rank {rank} {text}")
        return list(numbers)

    def _raise_fault(self, ranks: Sharers, said: Iterable[str]) -> None:
        for text in said:
            if text.startswith(_FAULT_FOUND):
                ranks.state.give_up(self.in_words(int(text.removeprefix(_FAULT_FOUND))))
                raise ranks.state.error()

    def in_words(self, fault: int) -> str:
        """What has gone wrong."""
        if fault < OTHER_MESSAGE:
            return f"rank {fault - 1} did not post or read a message within {self.limit:g} s"
        rank = fault - OTHER_MESSAGE
        return f"rank {rank} has posted another message: it has another plan or another kind of backend, or has skipped a call"


def _check_seals(heap: PeerHeap, seals: Sequence[int]) -> None:
    """Raises where this rank takes other memory for a rank's heap: which address is whose it has been told by torch, whose interface for
    that is no promise yet."""
    for rank, (seen, told) in enumerate(zip(heap.seals(), seals, strict=True)):
        if seen != told:
            raise RuntimeError(f"what it sees as that of rank {rank} is other memory")


def _allocate_or_empty_cache(ranks: Sharers, nbytes: int, device: torch.device) -> Tensor:
    try:
        return ranks.allocate_shared(nbytes, device)
    except RuntimeError:
        # It is not torch's caching allocator's, which may hold what is needed. What has none here says so by a plain RuntimeError.
        torch.cuda.empty_cache()
        return ranks.allocate_shared(nbytes, device)
