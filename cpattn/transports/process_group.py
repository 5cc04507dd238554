"""A transport over a torch.distributed process group."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch.distributed as dist
from torch import Tensor

from cpattn.errors import GroupError
from cpattn.transports.group_state import state_of
from cpattn.transports.part import PairwiseTransport
from cpattn.transports.transfer import Work

# torch 2.13 renamed it and deprecates the old name.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

DESTROYED = (
    "this process group has been destroyed, and a reference to it is of no use; make a new one on every rank with "
    "torch.distributed.new_group (or init_process_group), and pass that"
)
"""What a GroupError says of a process group that torch no longer knows."""


def _rank_and_size(group: dist.ProcessGroup) -> tuple[int, int]:
    try:
        return dist.get_rank(group), dist.get_world_size(group)
    except ValueError:  # torch's, for a group that it does not know
        raise GroupError(DESTROYED) from None


class ProcessGroupTransport(PairwiseTransport):
    """Over a torch.distributed process group of any backend; gloo and NCCL are the ones tested."""

    kind = "collectives"

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(*_rank_and_size(group))
        self.state = state_of(group)
        # Weak, so that the transports that are kept for groups end with their groups.
        self._weak_group = ref(group)
        self._global_ranks = [dist.get_global_rank(group, rank) for rank in range(self.size)]
        self._global_rank = self._global_ranks[self.rank]
        # Not asked for later, as torch forgets a group that is destroyed.
        self._backend = dist.get_backend(group)

    def check_usable(self) -> None:
        """Raises GroupError once the process group is destroyed.

        A reference that is kept does not keep the group: over gloo calls would go on working on some ranks, over NCCL they
        would end the process.
        """
        try:
            # What torch looks up for a group that it still knows, in one step.
            dist.get_group_rank(self._weak_group() or self.group, self._global_rank)
        except ValueError as error:
            raise error if isinstance(error, GroupError) else GroupError(DESTROYED) from None

    def describe(self) -> str:
        """What carries the bytes, and why, in words."""
        return f"collectives: those of torch.distributed, over {self._backend}"

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group. Raises GroupError once nothing refers to it."""
        group = self._weak_group()
        if group is None:
            raise GroupError(DESTROYED)
        return group

    def _all_gather(self, out: Tensor, x: Tensor) -> Work:
        # Asked for in every call, so without the property, which says what is wrong.
        return _work([_all_gather_single(out, x, group=self._weak_group() or self.group, async_op=True)], x)

    def _shift(self, out: Tensor, x: Tensor, by: int) -> Work:
        group, rank, ranks = self._weak_group() or self.group, self.rank, self._global_ranks
        send = dist.P2POp(dist.isend, x, ranks[(rank + by) % self.size], group)
        receive = dist.P2POp(dist.irecv, out, ranks[(rank - by) % self.size], group)
        return _work(dist.batch_isend_irecv([send, receive]), x)

    def _uneven_all_to_all(self, out: Tensor, x: Tensor, received: list[int], sent: list[int]) -> Work:
        # In one call of the host, and a collective of all ranks: NCCL's first transfer of a group would wait for those that have nothing.
        return _work([dist.all_to_all_single(out, x, received, sent, group=self.group, async_op=True)], x)

    def _exchange(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Work:
        # Point to point, which every backend has; it is what NCCL makes of an all-to-all as well.
        group, rank, ranks = self.group, self.rank, self._global_ranks
        if rank in receive and receive[rank].data_ptr() != send[rank].data_ptr():
            receive[rank].copy_(send[rank])
        operations = [dist.P2POp(dist.isend, x, ranks[to], group) for to, x in send.items() if to != rank]
        operations += [dist.P2POp(dist.irecv, out, ranks[source], group) for source, out in receive.items() if source != rank]
        works = dist.batch_isend_irecv(operations) if operations else []
        return _work(works, next(iter((*send.values(), *receive.values())), None))


# The name that it had first.
ProcessGroupCommunicator = ProcessGroupTransport


def _work(works: list[Any], x: Tensor | None) -> Work:
    """The end of all these transfers of x."""
    if x is not None and not x.is_cuda and threading.current_thread() is threading.main_thread():
        return _InterruptibleWork(works)

    def wait() -> None:
        for work in works:
            work.wait()

    return Work(wait)


class _InterruptibleWork(Work):
    """Transfers whose end the host waits for. Ctrl-C ends the wait, which torch's own do not let it; whoever waits again goes
    on with the same wait, as torch's cannot be made twice."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works
        self._has_ended = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def wait(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._has_ended.wait()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except Exception as failure:
            self._failure = failure
        self._has_ended.set()
