"""A part of a group: some of its ranks by themselves, over what carries the group's own bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cpattn.transports.arena import Arena
from cpattn.transports.transfer import Transfer, Work
from cpattn.transports.transport import Transport, as_bytes


class PairwiseTransport(Transport):
    """A transport that can send between any two of its ranks, and can therefore be split.

    A subclass has ``_exchange``; what else it has, such as an ``_all_gather`` of its own, is for speed.
    """

    @abstractmethod
    def _exchange(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Work:
        """Starts to send bytes to these ranks and to receive from those, this rank's own to itself among them.

        The n-th message from one rank to another is the n-th that the other receives from it, whoever else sends meanwhile.
        """

    def _all_gather(self, out: Tensor, x: Tensor) -> Work:
        return self._exchange(dict.fromkeys(range(self.size), x), dict(enumerate(out.view(self.size, -1))))

    def _shift(self, out: Tensor, x: Tensor, by: int) -> Work:
        return self._exchange({(self.rank + by) % self.size: x}, {(self.rank - by) % self.size: out})

    def _all_to_all(self, out: Tensor, x: Tensor) -> Work:
        return self._exchange(dict(enumerate(x)), dict(enumerate(out)))

    def prepare_uneven_all_to_all(self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> Transfer | None:
        """See :meth:`Transport.prepare_uneven_all_to_all`, as for the others."""
        row = (x if len(x) else out)[:1].nbytes
        sizes = [row * rows for rows in received], [row * rows for rows in sent]
        return Transfer(type(self)._uneven_all_to_all, x.nbytes, (as_bytes(out), as_bytes(x), *sizes), part=self.part)

    def _uneven_all_to_all(self, out: Tensor, x: Tensor, received: list[int], sent: list[int]) -> Work:
        """Of bytes, with so many of each rank."""
        send, receive = (
            {rank: part for rank, part in enumerate(torch.split(message, sizes)) if len(part)}
            for message, sizes in ((x, sent), (out, received))
        )
        return self._exchange(send, receive)

    def _make_part(self, ranks: tuple[int, ...]) -> Transport:
        return GroupPart(self, ranks)


class GroupPart(PairwiseTransport):
    """Some ranks of a group, as :meth:`Transport.split` gives them.

    It has no process group of its own. torch names one that only its members make after the number of groups that each of
    them is in, so that ranks that differ there would wait for each other in vain. And over NCCL to destroy a group is a
    collective, which nobody would call for one that is hidden in here.
    """

    def __init__(self, whole: PairwiseTransport, ranks: tuple[int, ...]) -> None:
        super().__init__(ranks.index(whole.rank), len(ranks))
        self._whole = whole
        self.kind = whole.kind
        self.part = ranks
        # What parts send meets on one wire.
        self.state = whole.state
        # A call over the whole may have messages for its parts.
        self.arena = Arena(self, whole.arena)
        self._has_met = False

    def _uneven_all_to_all(self, out: Tensor, x: Tensor, received: list[int], sent: list[int]) -> Work:
        # A rank that has nothing for anybody sends nothing. NCCL's first transfer over a group waits for all of its ranks, so all of
        # this part's meet once before; gloo, whose tensors are the host's, is ready when it is made.
        if not self._has_met and x.is_cuda:
            self._has_met = True
            self._all_gather(x.new_empty(self.size), x.new_zeros(1)).wait()
        return super()._uneven_all_to_all(out, x, received, sent)

    @property
    def whole(self) -> Transport:
        """The group that it is a part of."""
        return self._whole

    def check_usable(self) -> None:
        """Raises GroupError where the group that it is a part of is gone."""
        self._whole.check_usable()

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """Memory of the kind that the whole group sends from and to."""
        return self._whole.allocate(nbytes, device)

    def parts(self) -> list[Transport]:
        """All of the whole group's parts that are parts of this one, too."""
        return [part for part in self._whole.parts() if set(part.part) < set(self.part)]

    def _exchange(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Work:
        ranks = self.part
        return self._whole._exchange({ranks[r]: x for r, x in send.items()}, {ranks[r]: out for r, out in receive.items()})

    def _kept_part(self, ranks: tuple[int, ...]) -> Transport:
        return self._whole._kept_part(tuple(self.part[rank] for rank in ranks))

    def _member(self, part: tuple[int, ...]) -> Transport:
        return self._whole._member(part) if part else self._whole
