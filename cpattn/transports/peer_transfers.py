"""Transfers of bytes through memory that ranks share: a rank posts its message there, and whoever needs it pulls it with a kernel, or
has it copied beside what else runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from cpattn.transports.posted import Posted, Poster
from cpattn.transports.transfer import Transfer, Work
from cpattn.transports.transport import Transport


class Bringer(Poster, Protocol):
    """A transport that has others' messages copied."""

    def bring_beside(self, message: Posted, out: Tensor, source: int) -> Work:
        """Copies another rank's message while this stream goes on, as far as ``out`` has room for it."""


@cache
def _moves() -> ModuleType:
    """What launches the kernels: Triton need not be there. An import that finds all there takes 0.6 us, in each transfer."""
    from cpattn.moves import peer_moves

    return peer_moves


def through_memory(transfer: Transfer, x: Tensor, bring: partial[Work]) -> Transfer:
    """The same as a collective does, through shared memory.

    Args:
        transfer: the collective, for those who start it outside of a call.
        x: what this rank posts.
        bring: ``bring(transport, message, out=out)`` brings what this rank receives, out as bytes.
    """
    message = Posted(x.nbytes, transfer)
    bring.keywords["out"] = _as_bytes(bring.keywords["out"])
    return transfer._replace(begin=_post, arguments=(message, _as_bytes(x), bring), posted=message)


def _post(transport: Any, message: Posted, x: Tensor, bring: Callable[..., Work]) -> Work:
    """Posts bytes, and says how the others' are brought."""
    if message.board is None and message.otherwise is not None:
        # Only within a call a message has a place.
        assert isinstance(transport, Transport)
        return message.otherwise.begin(transport, *message.otherwise.arguments)
    board, is_first = transport.begin_post(message)
    with transport.on_device():
        _moves().post_words(board, x, is_first)
        message.end_post()
        return bring(transport, message)


def pull_later(transport: Bringer, message: Posted, out: Tensor, first: int, many: int, skip: int) -> Work:
    """Whoever waits pulls: messages of ``many`` ranks from ``first`` on, each from ``skip`` bytes on."""

    def wait() -> None:
        with transport.on_device():
            _moves().pull_words(message.begin_pull(first, many), out, first, many, skip)
            message.end_pull()

    return Work(wait)


def copy_beside(transport: Bringer, message: Posted, out: Tensor, source: int) -> Work:
    """A copy engine brings another rank's message."""
    return transport.bring_beside(message, out, source)


def bring_nothing(transport: Bringer, message: Posted, out: Tensor) -> Work:
    """That nothing is read is said as the call ends."""
    return Work(lambda: None)


def _as_bytes(x: Tensor) -> Tensor:
    """``[1, n]``."""
    # A view in another dtype that is made under inference_mode could not be written outside of it, as a failed call has to.
    with torch.inference_mode(False):
        return x.view(1, -1).view(torch.uint8)
