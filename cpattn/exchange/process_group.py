"""A communicator over a torch.distributed process group."""

from __future__ import annotations

from weakref import ref

import torch.distributed as dist
from torch import Tensor

from cpattn.errors import GroupError
from cpattn.exchange.communicator import Communicator, Work
from cpattn.exchange.group_state import state_of

# torch 2.13 renamed it and deprecates the old name.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ProcessGroupCommunicator(Communicator):
    """Over a torch.distributed process group of any transport; gloo and NCCL are the ones tested."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self.state = state_of(group)
        # Weak, so that the communicators that are kept for groups end with their groups.
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
