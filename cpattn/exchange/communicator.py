"""Communicator: the two collectives that the exchange needs, over a process group or within one process.

A message is a contiguous tensor of any dtype; it travels as bytes, so that no transport has to know the dtype.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeAlias, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cpattn.errors import GroupError
from cpattn.kernels.current import is_capturing

# torch 2.13 renamed it and deprecates the old name.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

T = TypeVar("T")

# What a ``group`` argument takes.
Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | Communicator | None"


class Work:
    """A transfer in flight. Neither its source may be written nor its destination read before :meth:`wait`."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def wait(self) -> None:
        """Returns when the transfer is done; on CUDA, when all later work of the current stream will come after it."""
        self._wait()


class Transfer(NamedTuple):
    """A transfer between two messages that stay where they are; :meth:`Communicator.start` starts it, again and again.

    Attributes:
        begin: ``begin(communicator, *arguments)``. It is kept with the communicator's buffers, and so has no reference to it.
        nbytes: that are sent.
    """

    begin: Callable[..., Work]
    nbytes: int
    arguments: tuple[Any, ...]


class Communicator(ABC):
    """One rank's end of a context-parallel group.

    Every rank must make the same calls in the same order with the same sizes. One call of ``cp_attention`` uses a
    communicator at a time; its buffers are reused by the next.

    Attributes:
        rank, size: within the group.
        bytes_sent: what this rank has sent to others so far; a broadcast counts once for each receiver.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.bytes_sent = 0
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        # What was last made of them under each name, for which sizes; see reuse.
        self._made: dict[str, tuple[Hashable, Any]] = {}
        self._captured: list[Tensor] = []

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
        """Starts what this communicator has prepared."""
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
            # A little more than asked for, so that slowly growing batches do not allocate at every step.
            kept = self._buffers[name, device] = torch.empty(size + size // 8, dtype=torch.uint8, device=device)
            # Views of what it replaces would keep that alive.
            self._made.clear()
        if is_capturing(device) and not any(kept is x for x in self._captured):
            self._captured.append(kept)
            # A graph may outlive whoever captured it.
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
        if last is not None and last[0] == key and not is_capturing(device):
            made: T = last[1]
            return made
        # Memory made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            made = make()
        self._made[name] = key, made
        return made

    def release(self) -> None:
        """Frees the buffers that no CUDA graph has captured; the next call makes them anew."""
        self._buffers.clear()
        self._made.clear()


class ProcessGroupCommunicator(Communicator):
    """Over a torch.distributed process group of any transport; gloo and NCCL are the ones tested."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        # Weak, so that the communicators kept for groups below end with their groups.
        self._weak_group = ref(group)
        self._global_ranks = [dist.get_global_rank(group, rank) for rank in range(self.size)]

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group. Raises GroupError once it is destroyed."""
        group = self._weak_group()
        if group is None:
            raise GroupError("the process group of this communicator has been destroyed; make a new one")
        return group

    def _all_gather(self, out: Tensor, x: Tensor) -> Work:
        work = _all_gather_single(out, x, group=self.group, async_op=True)
        return Work(work.wait)

    def _shift(self, out: Tensor, x: Tensor, by: int) -> Work:
        return self._send_and_receive({(self.rank + by) % self.size: x}, {(self.rank - by) % self.size: out})

    def _all_to_all(self, out: Tensor, x: Tensor) -> Work:
        # As point-to-point transfers, which every transport has; it is what NCCL makes of an all-to-all as well.
        out[self.rank].copy_(x[self.rank])
        others = [rank for rank in range(self.size) if rank != self.rank]
        return self._send_and_receive({rank: x[rank] for rank in others}, {rank: out[rank] for rank in others})

    def _send_and_receive(self, send: dict[int, Tensor], receive: dict[int, Tensor]) -> Work:
        group = self.group
        operations = [dist.P2POp(dist.isend, x, self._global_ranks[rank], group) for rank, x in send.items()]
        operations += [dist.P2POp(dist.irecv, out, self._global_ranks[rank], group) for rank, out in receive.items()]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work in works:
                work.wait()

        return Work(wait)


class LoopbackGroup:
    """All ranks in one process, a thread each: what tests and single-device benchmarks run on.

    >>> import torch
    >>> group = LoopbackGroup(1)
    >>> out = torch.empty(2)
    >>> group.communicator(0).all_gather(out, torch.tensor([1.0, 2.0])).wait()
    >>> out
    tensor([1., 2.])

    Transfers are copies, made when the receiver waits. On CUDA all ranks must use one stream.
    ``timeout`` (seconds) bounds every wait; :meth:`abort` makes all waiting ranks raise at once.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        self.size = size
        self.timeout = timeout
        self._changed = threading.Condition()
        self._posted: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self._aborted = False

    def communicator(self, rank: int) -> Communicator:
        """The end of one rank, to be used by one thread."""
        if not 0 <= rank < self.size:
            raise GroupError(f"rank {rank} of a loopback group of {self.size}; it must be from 0 to {self.size - 1}")
        return _LoopbackCommunicator(self, rank)

    def abort(self) -> None:
        """Makes every rank that waits, now or later, raise: for when one of them has failed."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def post(self, call: int, rank: int, x: Tensor, readers: int) -> None:
        """Offers a rank's message of its ``call``-th collective to ``readers`` ranks."""
        with self._changed:
            self._posted[call, rank] = (x, readers)
            self._changed.notify_all()

    def read(self, call: int, rank: int, out: Tensor, part: int | None = None) -> None:
        """Waits for a rank's message and copies it, or one part of it."""
        with self._changed:
            self._await(lambda: (call, rank) in self._posted, f"rank {rank}'s message")
            posted, readers = self._posted[call, rank]
            x = posted if part is None else posted[part]
            if x.shape != out.shape:
                raise RuntimeError(f"rank {rank} sent {len(x)} bytes in collective {call}, where {len(out)} were expected")
            out.copy_(x)
            self._posted[call, rank] = (posted, readers - 1)
            self._changed.notify_all()

    def retire(self, call: int, rank: int) -> None:
        """Waits until all have read a rank's message, so that its memory is free again."""
        with self._changed:
            self._await(lambda: self._posted[call, rank][1] == 0, f"the readers of rank {rank}'s message")
            del self._posted[call, rank]

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        done = self._changed.wait_for(lambda: self._aborted or condition(), self.timeout)
        if self._aborted:
            raise RuntimeError("another rank of this loopback group has failed")
        if not done:
            raise TimeoutError(f"waited {self.timeout} s for {what}; do all ranks make the same calls in the same order?")


class _LoopbackCommunicator(Communicator):
    def __init__(self, group: LoopbackGroup, rank: int) -> None:
        super().__init__(rank, group.size)
        self._group = group
        self._calls = 0

    def _all_gather(self, out: Tensor, x: Tensor) -> Work:
        parts = out.view(self.size, -1)
        return self._start(x, {rank: parts[rank] for rank in range(self.size)})

    def _shift(self, out: Tensor, x: Tensor, by: int) -> Work:
        return self._start(x, {(self.rank - by) % self.size: out})

    def _all_to_all(self, out: Tensor, x: Tensor) -> Work:
        return self._start(x, dict(enumerate(out)), part=self.rank)

    def _start(self, x: Tensor, receive: dict[int, Tensor], part: int | None = None) -> Work:
        call = self._calls
        self._calls += 1
        # Each message is read as often as it is received here: the collectives are symmetric.
        self._group.post(call, self.rank, x, readers=len(receive))

        def wait() -> None:
            for rank, out in receive.items():
                self._group.read(call, rank, out, part)
            self._group.retire(call, self.rank)

        return Work(wait)


_with_captured: set[Communicator] = set()
# One for each thread that works without a group, so that its buffers serve all layers and batches.
_alone = threading.local()
# One communicator a group, so that its buffers serve all layers and batches.
_communicators: WeakKeyDictionary[dist.ProcessGroup, Communicator] = WeakKeyDictionary()


def as_communicator(group: Group, cp_size: int) -> Communicator:
    """What a ``group`` argument stands for: a process group, one axis of a device mesh, a communicator, or the default group.

    A plan for one rank needs none of them. Raises GroupError where no group can be had.
    """
    if isinstance(group, Communicator):
        return group
    if group is None and cp_size == 1:
        if not hasattr(_alone, "communicator"):
            _alone.communicator = LoopbackGroup(1).communicator(0)
        communicator: Communicator = _alone.communicator
        return communicator
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or "unnamed"
            raise GroupError(f"group is a device mesh of {group.ndim} axes ({names}); pass the context-parallel axis alone: mesh['cp']")
        group = group.get_group()
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            launched = dist.is_available() and dist.is_torchelastic_launched()
            launch = "" if launched else f"launch with torchrun --nproc-per-node {cp_size} and "
            raise GroupError(
                f"the plan has {cp_size} ranks, but there is no process group: {launch}call torch.distributed.init_process_group(), "
                "or pass group="
            )
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise GroupError(
            f"group is a {type(group).__name__}; pass a ProcessGroup this process belongs to, a DeviceMesh axis or a Communicator"
        )
    if group not in _communicators:
        _communicators[group] = ProcessGroupCommunicator(group)
    return _communicators[group]


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
