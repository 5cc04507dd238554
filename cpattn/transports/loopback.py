"""All ranks of a group in one process, a thread each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from torch import Tensor

from cpattn.errors import GroupError
from cpattn.metadata.batch import is_integer
from cpattn.transports.part import PairwiseTransport
from cpattn.transports.transfer import Work
from cpattn.transports.transport import Transport

T = TypeVar("T")
E = TypeVar("E", bound="LoopbackTransport")


class _Key(NamedTuple):
    """The n-th message of one rank to another."""

    sender: int
    receiver: int
    number: int


class _Message:
    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.is_read = False


class LoopbackGroup:
    """All ranks in one process, a thread each: what tests and single-device benchmarks run on.

    >>> import torch
    >>> group = LoopbackGroup(1)
    >>> out = torch.empty(2)
    >>> group.transport(0).all_gather(out, torch.tensor([1.0, 2.0])).wait()
    >>> out
    tensor([1., 2.])

    Transfers are copies, made when the receiver waits. On CUDA all ranks must use one stream. Ranks whose tensors are on one GPU can read
    each other's memory instead, ``cpattn.transport(end, kind="peer_memory")``, as ranks of several GPUs do.
    ``timeout`` (seconds) bounds every wait; :meth:`abort` makes all waiting ranks raise at once.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        given: Any = size
        if not is_integer(given) or given < 1:
            raise GroupError(f"size={size!r}; pass the number of ranks of a loopback group, an integer of at least 1")
        self.size = size
        self.timeout = timeout
        self._changed = threading.Condition()
        self._posted: dict[_Key, _Message] = {}
        # By sender and receiver, the number of the last message that the one has posted, and that the other waits for.
        self._sent: dict[tuple[int, int], int] = {}
        self._expected: dict[tuple[int, int], int] = {}
        self._aborted = False
        # By rank, how often it has met the others; by number, what each has said.
        self._met = [0] * size
        self._meetings: dict[int, dict[int, Any]] = {}
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
                transport = self._transports[rank] = LoopbackTransport(self, rank)
            return transport

    def communicator(self, rank: int) -> Transport:
        """:meth:`transport`, under the name that it had first."""
        return self.transport(rank)

    def abort(self) -> None:
        """Makes every rank that waits, now or later, raise: for when one of them has failed."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def post(self, sender: int, messages: Mapping[int, Tensor]) -> list[_Key]:
        """Offers a rank's messages to others, by receiver."""
        with self._changed:
            keys = [self._next(self._sent, sender, receiver) for receiver in messages]
            self._posted.update((key, _Message(x)) for key, x in zip(keys, messages.values(), strict=True))
            self._changed.notify_all()
            return keys

    def expect(self, receiver: int, senders: Iterable[int]) -> list[_Key]:
        """Which messages a rank receives next from these."""
        with self._changed:
            return [self._next(self._expected, sender, receiver) for sender in senders]

    def read(self, key: _Key, out: Tensor) -> None:
        """Waits for a message and copies it."""
        with self._changed:
            self._await(lambda: key in self._posted, f"rank {key.sender}'s message")
            message = self._posted[key]
            if message.x.shape != out.shape:
                raise RuntimeError(
                    f"rank {key.sender} sent {len(message.x)} bytes as message {key.number} to rank {key.receiver}, where {len(out)} were "
                    "expected"
                )
            out.copy_(message.x)
            message.is_read = True
            self._changed.notify_all()

    def retire(self, key: _Key) -> None:
        """Waits until a message has been read, so that its memory is free again."""
        with self._changed:
            self._await(lambda: self._posted[key].is_read, f"rank {key.receiver}, which reads a message of rank {key.sender}")
            del self._posted[key]

    def meet(self, rank: int, what: T) -> list[T]:
        """What each rank says, in the order of ranks, once all have come to this meeting: a collective."""
        with self._changed:
            number = self._met[rank]
            self._met[rank] += 1
            said = self._meetings.setdefault(number, {})
            said[rank] = what
            # Who is here has left the last one; the last who comes is the last who can have been there.
            if len(said) == self.size:
                self._meetings.pop(number - 1, None)
            self._changed.notify_all()
            self._await(lambda: len(said) == self.size, "all ranks to come to a call")
            return [said[other] for other in range(self.size)]

    def change(self, what: Callable[[], None]) -> None:
        """Does what others may wait for."""
        with self._changed:
            what()
            self._changed.notify_all()

    def await_change(self, condition: Callable[[], bool], what: str) -> None:
        """Waits until another rank has made that so by :meth:`change`."""
        with self._changed:
            self._await(condition, what)

    @staticmethod
    def _next(counts: dict[tuple[int, int], int], sender: int, receiver: int) -> _Key:
        number = counts[sender, receiver] = counts.get((sender, receiver), -1) + 1
        return _Key(sender, receiver, number)

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        if self._changed.wait_for(lambda: condition() or self._aborted, self.timeout):
            if not condition():
                raise RuntimeError("another rank of this loopback group has failed")
        else:
            raise TimeoutError(f"waited {self.timeout} s for {what}; do all ranks make the same calls in the same order?")


class LoopbackTransport(PairwiseTransport):
    """The end of one rank of a :class:`LoopbackGroup`."""

    kind = "loopback"

    def __init__(self, group: LoopbackGroup, rank: int) -> None:
        super().__init__(rank, group.size)
        self.group = group
        # Of other kinds, which end with this one.
        self._others: dict[type[LoopbackTransport], LoopbackTransport] = {}

    def end_of_kind(self, kind: type[E]) -> E:
        """This rank's end of another kind; the same one each time."""
        if isinstance(self, kind):
            return self
        found = self._others.get(kind)
        if found is None:
            found = self._others[kind] = kind(self.group, self.rank)
            # What they send meets on one wire.
            found.state = self.state
        assert isinstance(found, kind)
        return found

    def _exchange(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Work:
        sent = self.group.post(self.rank, send)
        left = list(zip(self.group.expect(self.rank, receive), receive.values(), strict=True))

        def wait() -> None:
            # An interrupted wait goes on where it was.
            while left:
                self.group.read(*left[-1])
                left.pop()
            while sent:
                self.group.retire(sent[-1])
                sent.pop()

        return Work(wait)
