"""One rank without its peers: transfers are local copies, so that one device can run and time one rank's work."""

from __future__ import annotations

from torch import Tensor

from cpattn.exchange.communicator import Communicator, Work


class SoloCommunicator(Communicator):
    """Poses as one rank of ``size``; what the others would send is a copy of its own message.

    Results are meaningless as attention over a context, but the work, the memory and the sizes are those of a real rank.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 64)], cp_size=4, cp_rank=2)
    >>> x = torch.randn(16, 2, 8)
    >>> cpattn.cp_attention(x, x, x, meta, group=SoloCommunicator(2, 4)).shape
    torch.Size([16, 2, 8])
    """

    def _all_gather(self, out: Tensor, x: Tensor) -> Work:
        parts = out.view(self.size, -1)
        parts[: self.rank] = x
        parts[self.rank + 1 :] = x
        if parts[self.rank].data_ptr() != x.data_ptr():
            parts[self.rank] = x
        return Work(lambda: None)

    def _shift(self, out: Tensor, x: Tensor, by: int) -> Work:
        out.copy_(x)
        return Work(lambda: None)

    def _all_to_all(self, out: Tensor, x: Tensor) -> Work:
        out.copy_(x)
        return Work(lambda: None)
