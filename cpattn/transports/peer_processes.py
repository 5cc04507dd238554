"""A transport through the memory of other GPUs of the same host, for ranks that are processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.errors import UnsupportedError
from cpattn.transports.peer_heap import Machine, PeerHeap, allocate, empty_heap, heap_of_processes, why_not_shared
from cpattn.transports.peer_memory import DEFAULT_LIMIT_SECONDS, PeerTransport
from cpattn.transports.process_group import ProcessGroupTransport
from cpattn.transports.transport import Transport


class PeerMemoryTransport(PeerTransport, ProcessGroupTransport):
    """Over the memory of the ranks' GPUs, for calls over CUDA tensors of ranks that can read each other's memory. What is sent
    outside of a call goes over the process group.

    Args:
        limit: seconds that a rank's device waits for another's.
        insists: whether it refuses the calls that it cannot serve; if not they go over the process group, on all ranks alike.
    """

    _sharing = "read the memory of each other's GPUs"

    def __init__(self, group: dist.ProcessGroup, *, limit: float = DEFAULT_LIMIT_SECONDS, insists: bool = True) -> None:
        super().__init__(group)
        self._set_up(limit, insists)

    def _told_by_all(self, what: Any) -> list[Any]:
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, what, group=self.group)
        return said

    def _why_not_shared(self, device: torch.device) -> str | None:
        with self.on_device():
            return why_not_shared(self.told_by_all(Machine.here(device)))

    def allocate_shared(self, nbytes: int, device: torch.device) -> Tensor:
        return allocate(nbytes, device)

    def make_heap(self, memory: Tensor, seal: int) -> PeerHeap:
        empty_heap(memory, self.limit, seal)
        return heap_of_processes(memory, self.group)

    def _make_part(self, ranks: tuple[int, ...]) -> Transport:
        if not self._insists:
            part = super()._make_part(ranks)
            part.kind = ProcessGroupTransport.kind
            return part
        raise UnsupportedError(
            "parts of a group do not share memory: pass one axis of a torch.distributed DeviceMesh, which has a process group of its own, "
            "cpattn.transport(mesh['cp'], kind='peer_memory'); or split cpattn.transport(group), which sends over its collectives"
        )
