"""One rank without its peers: transfers are local copies, so that one device can run and time one rank's work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpattn.errors import GroupError, shown
from cpattn.metadata.batch import is_integer
from cpattn.transports.alone import CopyingTransport
from cpattn.transports.transfer import Transfer, Work
from cpattn.transports.transport import Transport, as_bytes

_DONE = Work(lambda: None)


class SoloCommunicator(CopyingTransport):
    """Poses as one rank of ``size``; what the others would send is a copy of its own message.

    Results are meaningless as attention over a context, but the work, the memory and the sizes are those of a real rank.
    A subclass's ``_all_gather`` gets out and x as ``[size, n]``, viewed as int64 where their bytes allow.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 64)], cp_size=4, cp_rank=2)
    >>> x = torch.randn(16, 2, 8)
    >>> cpattn.cp_attention(x, x, x, meta, group=SoloCommunicator(2, 4)).shape
    torch.Size([16, 2, 8])
    """

    kind = "solo"

    def __init__(self, rank: int, size: int) -> None:
        if not is_integer(size) or size < 1 or not is_integer(rank) or not 0 <= rank < size:
            raise GroupError(f"rank {shown(rank)} of {shown(size)}; pass one of 0 to size - 1, and a size of at least 1")
        super().__init__(rank, size)

    def _make_part(self, ranks: tuple[int, ...]) -> Transport:
        part = type(self)(ranks.index(self.rank), len(ranks))
        part.state, part.part = self.state, ranks
        return part

    def prepare_all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        # One copy to all parts. x may be this rank's own, which is then copied onto itself; torch lets an expanded source.
        transfer = super().prepare_all_gather(out, x)
        to, message = _as_words(*transfer.arguments)
        return transfer._replace(arguments=(to.view(self.size, len(message)), message.expand(self.size, -1)))

    def prepare_uneven_all_to_all(self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> Transfer:
        return Transfer(type(self)._uneven_all_to_all, x.nbytes, (as_bytes(out), as_bytes(x)), part=self.part)

    def _uneven_all_to_all(self, out: Tensor, x: Tensor) -> Work:
        # As far as its own message goes, and zeros.
        many = min(len(out), len(x))
        out[:many].copy_(x[:many])
        out[many:].zero_()
        return _DONE


def _as_words(*messages: Tensor) -> tuple[Tensor, ...]:
    """Bytes as words of 8 bytes, if they are. A copy to several places goes element by element: 256 us instead of 976 for
    537 MB on an H200."""
    if any(n % 8 for x in messages for n in (len(x), x.storage_offset())):
        return messages
    return tuple(x.view(torch.int64) for x in messages)
