"""A transfer: from one message to another that stay where they are, and one that is in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Work:
    """A transfer in flight. Neither its source may be written nor its destination read before :meth:`wait`."""

    __slots__ = ("_wait",)

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def wait(self) -> None:
        """Returns when the transfer is done; on CUDA, when all later work of the current stream will come after it."""
        self._wait()


class Transfer(NamedTuple):
    """A transfer between two messages that stay where they are; ``Transport.start`` starts it, again and again.

    Attributes:
        begin: ``begin(transport, *arguments)``. It may be kept with the transport's buffers, and so has no reference to it.
        nbytes: that are sent.
        fill_missing: writes what stands for the message if this rank could not make it: NaN. None where it is there before
            the call, or was received from another rank.
        part: whose it is: ``Transport.part`` of the transport that has prepared it.
        posted: the message, where it travels through memory that others read; ``Transport.place`` says where it goes.
    """

    begin: Callable[..., Work]
    nbytes: int
    arguments: tuple[Any, ...]
    fill_missing: Callable[[], object] | None = None
    part: tuple[int, ...] = ()
    posted: Any = None
