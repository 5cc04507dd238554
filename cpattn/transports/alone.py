"""Ranks by themselves: nothing travels, and what would is copied."""

from __future__ import annotations

from torch import Tensor

from cpattn.transports.transfer import Work
from cpattn.transports.transport import Transport

_DONE = Work(lambda: None)


class CopyingTransport(Transport):
    """Whose rank receives its own messages."""

    def _all_gather(self, out: Tensor, x: Tensor) -> Work:
        out.copy_(x)
        return _DONE

    def _shift(self, out: Tensor, x: Tensor, by: int) -> Work:
        out.copy_(x)
        return _DONE

    def _all_to_all(self, out: Tensor, x: Tensor) -> Work:
        out.copy_(x)
        return _DONE


class AloneTransport(CopyingTransport):
    """Of one rank within a call over a group, in whose memory its messages lie.

    Args:
        whole: the transport that the call goes over, whose memory it uses.
    """

    kind = "alone"

    def __init__(self, whole: Transport) -> None:
        super().__init__(0, 1)
        self.state, self.arena = whole.state, whole.arena
