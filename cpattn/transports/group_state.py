"""What this process knows of a group: whether a call is under way on it, whether it still works, and how many calls it has seen."""

from __future__ import annotations

import threading
from collections import Counter
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from cpattn.errors import GroupError

_FIX = (
    "its ranks may be out of step, so every call on it is refused. Destroy it and make a new one on every rank "
    "(torch.distributed.destroy_process_group, new_group), or start the processes anew, with check=True in every call: "
    "then a rank that differs is named before anything is sent"
)


class GroupState:
    """Shared by all transports over one process group and over parts of it, as what they send meets on the same wire.

    Attributes:
        calls: that have begun to send so far, over the group (under ``()``) and over each of its parts (under its ranks).
            They are as many on every rank of these, as long as the ranks are in step.
        failure: why the group was given up, or None.
        leave: called where a call ends.
    """

    def __init__(self) -> None:
        self.calls: Counter[tuple[int, ...]] = Counter()
        self.failure: str | None = None
        # Held while a call is under way.
        self._under_way = threading.Lock()
        self.leave = self._under_way.release
        # The CUDA stream of the last call, whose work may still read and write the buffers.
        self._stream: torch.cuda.Stream | None = None
        self._stream_id: tuple[torch.device, int] | None = None

    @property
    def is_in_use(self) -> bool:
        """Whether a call is under way."""
        return self._under_way.locked()

    def give_up(self, what_happened: str) -> None:
        """Marks the group: no call works on it any more. The first reason stays."""
        self.failure = self.failure or what_happened

    def error(self) -> GroupError:
        """What every call raises once the group was given up."""
        return GroupError(f"this group cannot be used any more: {self.failure}; {_FIX}")

    def enter(self) -> None:
        """A call begins, and no other may be under way.

        Raises GroupError if the group was given up, or is in use, which gives it up: what two calls send at once may meet
        other calls on other ranks.
        """
        if self.failure is not None:
            raise self.error()
        if not self._under_way.acquire(False):
            self.give_up("two calls were made on it at once, from two threads, or one from within the other")
            raise GroupError(
                "another call is under way on this group; calls on a group follow each other, in the same order on every rank. Give "
                "each thread a process group of its own (torch.distributed.new_group): a second transport over the same group, "
                f"or a part of it, is not enough. Now this group cannot be used any more: {_FIX}"
            )

    def keep_until_done(self, memory: torch.Tensor) -> None:
        """Has memory that is about to be freed outlast the last call's work on another stream than the one it was made on."""
        if memory.is_cuda and self._stream is not None:
            memory.record_stream(self._stream)

    def follow_last_call(self, device: torch.device) -> None:
        """Has the current stream wait for what the last call has left in flight on another one."""
        here = device, torch._C._cuda_getCurrentRawStream(device.index)
        if self._stream_id == here:
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream, self._stream_id = stream, here


_states: WeakKeyDictionary[dist.ProcessGroup, GroupState] = WeakKeyDictionary()


def state_of(group: dist.ProcessGroup) -> GroupState:
    """The one state of a process group."""
    state = _states.get(group)
    return _states.setdefault(group, GroupState()) if state is None else state
