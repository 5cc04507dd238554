"""A heap: memory of each rank that all ranks of a group can read and write, made on all of them at once.

It is symmetric memory of torch, whose interface is not yet a promise: what is used of it stands here and nowhere else.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.kernels.available import has_kernels
from cpattn.kernels.cuda_driver import has_peer_atomics
from cpattn.kernels.peer_layout import FAULT, LIMIT, MOST_RANKS, SEAL
from cpattn.memo import Memo
from cpattn.transports.posted import OwnMemory

# Of torch: multicast is not used here, and to set it up has put GPUs out of service. Others in this process may want it.
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
_SHARED_GPU = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
_GRANULE = 2 * 2**20


class Machine(NamedTuple):
    """What a rank says of itself before the ranks decide.

    Attributes:
        host: the machine that it runs on; gpu: its GPU there.
        visible: all GPUs that it can reach.
        why_not: why it cannot share its memory, or None.
        may_share_gpu: whether torch has been told that ranks may share a GPU.
    """

    host: str
    gpu: str
    visible: frozenset[str]
    why_not: str | None
    may_share_gpu: bool = False

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """Of this rank. It does not raise: the others wait for what it says."""
        try:
            uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
            reached = {uuid for i, uuid in enumerate(uuids) if i == device.index or has_peer_atomics(device.index, i)}
            return cls(_host(), uuids[device.index], frozenset(reached), _why_not_here(device), os.environ.get(_SHARED_GPU) == "1")
        except Exception as error:
            return cls("", "", frozenset(), f"it cannot say which GPUs it reaches ({type(error).__name__}: {error})")


def why_not_shared(machines: list[Machine]) -> str | None:
    """Why these ranks cannot read each other's memory, or None; the same on every rank."""
    for rank, machine in enumerate(machines):
        if machine.why_not is not None:
            return f"rank {rank}: {machine.why_not}"
    if len(machines) > MOST_RANKS:
        return f"it is for at most {MOST_RANKS} ranks, and there are {len(machines)}"
    for rank, machine in enumerate(machines):
        if machine.host != machines[0].host:
            return f"rank {rank} runs on another host than rank 0"
    gpus = [machine.gpu for machine in machines]
    for rank, gpu in enumerate(gpus):
        if gpus.index(gpu) != rank and not all(machine.may_share_gpu for machine in machines):
            return (
                f"ranks {gpus.index(gpu)} and {rank} share a GPU (give each its own, or set {_SHARED_GPU}=1 on all ranks: "
                "kernels of several processes then take turns, which is slow)"
            )
    for rank, machine in enumerate(machines):
        for other, gpu in enumerate(gpus):
            if gpu not in machine.visible:
                return (
                    f"rank {rank} cannot reach the GPU of rank {other} (is it in CUDA_VISIBLE_DEVICES, "
                    "and are there peer access and atomics?)"
                )
    return None


class PeerHeap:
    """One rank's heap, and where it sees the others'.

    Attributes:
        capacity: bytes of it.
        table: int64 ``[size + 1]`` on the device: the address of each rank's heap, and of the word where this host reads of a fault.
        kept_launches: see :meth:`cpattn.transports.transport.Transport.kept_launches`.
    """

    def __init__(self, memory: Tensor, peers: Sequence[Tensor], held: Any = None) -> None:
        """Of memory that :func:`empty_heap` has emptied, and that others have as well.

        Args:
            peers: each rank's heap as this one sees it, uint8 ``[1, nbytes]``.
            held: what has to live as long as they are seen.
        """
        self.capacity = memory.numel()
        self._memory, self._peers, self._held = memory, list(peers), held
        self.kept_launches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._places: Memo[tuple[int, int], OwnMemory] = Memo(64)
        self._messages: Memo[tuple[int, int, int], Tensor] = Memo(64)
        # Pinned memory has one address for the host and for the device.
        self._fault = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=memory.is_cuda)
        # A number of a memoryview takes a quarter of the time of one of an array.
        self._fault_here = self._fault.numpy().data
        addresses = [*(peer.data_ptr() for peer in self._peers), self._fault.data_ptr()]
        self.table = torch.tensor(addresses, dtype=torch.int64, device=memory.device)
        # The copy is made before another stream reads it.
        synchronize(memory.device)

    def set_limit(self, seconds: float) -> None:
        """How long its device waits for another rank; waits that are captured read it anew."""
        _set_limit(self._memory, seconds)

    def seals(self) -> list[int]:
        """Of each rank's heap as a kernel of this one reads it; waits for the device."""
        found: list[int] = torch.cat([peer.view(torch.int32)[0, SEAL : SEAL + 1] for peer in self._peers]).tolist()
        return found

    def message_of(self, rank: int, offset: int, nbytes: int) -> Tensor:
        """Bytes ``[1, nbytes]`` of another rank's heap."""
        key = rank, offset, nbytes
        found = self._messages.get(key)
        return self._messages.keep(key, self._peers[rank].narrow(1, offset, nbytes)) if found is None else found

    def own_memory(self, offset: int, nbytes: int) -> OwnMemory:
        """Bytes of this rank's."""
        found = self._places.get((offset, nbytes))
        if found is None:
            with torch.inference_mode(False):
                found = self._places.keep((offset, nbytes), OwnMemory(self._memory[offset : offset + nbytes]))
        return found

    @property
    def fault(self) -> int:
        """What has gone wrong, as far as this host knows, or 0."""
        found: int = self._fault_here[0]
        return found

    def fault_on_device(self) -> int:
        """The same as the device knows it; waits for it."""
        return int(self._memory.view(torch.int32)[FAULT])

    def mark(self, fault: int) -> None:
        """Has no wait over it wait any more."""
        self._memory.view(torch.int32)[FAULT] = fault


def empty_heap(memory: Tensor, limit: float, seal: int) -> None:
    """What a rank does with its memory before it tells the others where it lies, who write to it then."""
    memory.zero_()
    memory.view(torch.int32)[SEAL] = seal
    _set_limit(memory, limit)
    synchronize(memory.device)


def _set_limit(memory: Tensor, seconds: float) -> None:
    memory.view(torch.int32)[LIMIT] = max(1, int(seconds * 1000))


def synchronize(device: torch.device) -> None:
    """Waits for all that was launched on a GPU; elsewhere nothing is left to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def heap_of_processes(memory: Tensor, group: dist.ProcessGroup) -> PeerHeap:
    """Of what each rank has by :func:`allocate`, as large on every rank, and has emptied. A collective of their hosts."""
    with _without_multicast:
        handle = _symmetric_memory().rendezvous(memory, group.group_name)
    peers = [handle.get_buffer(rank, (1, memory.numel()), torch.uint8) for rank in range(handle.world_size)]
    return PeerHeap(memory, peers, handle)


def allocate(nbytes: int, device: torch.device) -> Tensor:
    """Memory that can be shared, uint8 of at least that many bytes. Each rank by itself. Raises torch.OutOfMemoryError."""
    with _without_multicast:
        memory: Tensor = _symmetric_memory().empty(-(-nbytes // _GRANULE) * _GRANULE, dtype=torch.uint8, device=device)
    return memory


class _WithoutMulticast:
    """A context. Several threads may be within, each with a group of its own, in which it waits for other processes: the first one sets
    the variable, and the last one leaves it as it was."""

    def __init__(self) -> None:
        self._changes = threading.Lock()
        self._within = 0
        self._before: str | None = None

    def __enter__(self) -> None:
        with self._changes:
            if not self._within:
                self._before = os.environ.get(_NO_MULTICAST)
                os.environ[_NO_MULTICAST] = "1"
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._changes:
            self._within -= 1
            if self._within:
                return
            if self._before is None:
                del os.environ[_NO_MULTICAST]
            else:
                os.environ[_NO_MULTICAST] = self._before


_without_multicast = _WithoutMulticast()


def _symmetric_memory() -> Any:
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory


def _why_not_here(device: torch.device) -> str | None:
    if not has_kernels(device):
        return "it has no Triton kernels for its GPU"
    try:
        module = _symmetric_memory()
    except ImportError as error:
        return f"this torch has no symmetric memory ({error})"
    missing = [name for name in ("empty", "rendezvous") if not hasattr(module, name)]
    return f"the symmetric memory of this torch has no {missing[0]}" if missing else None


def _host() -> str:
    """Tells machines apart also where their names are alike."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()} {file.read().strip()}"
    except OSError:
        return socket.gethostname()
