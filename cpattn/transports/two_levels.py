"""An all-gather in two levels: across groups of ranks that follow each other, such as those of a host, and then within each.

What crosses from one group to another crosses once: a rank gets the messages of those that have its place in the other groups, and the
ranks of a group share out what they got.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cpattn.errors import GroupError
from cpattn.transports.transfer import Transfer, Work
from cpattn.transports.transport import Transport


def prepare_two_level_all_gather(transport: Transport, within: int, out: Tensor) -> Transfer:
    """Of groups of so many ranks.

    Args:
        out: ``[within, groups, ...]``: the message of place i in group g comes to ``out[i, g]``, where this rank's own is already.
    """
    across, inner = transport.split(transport.size // within, within)
    own = out[inner.rank]
    first, second = across.prepare_all_gather(own, own[across.rank]), inner.prepare_all_gather(out, own)
    return Transfer(_begin, first.nbytes + second.nbytes, (first, second), part=transport.part)


def _begin(transport: Transport, first: Transfer, second: Transfer) -> Work:
    return _TwoSteps(_start(transport, first), lambda: _start(transport, second))


def _start(transport: Transport, transfer: Transfer) -> Work:
    """The bytes have been counted."""
    return transfer.begin(transport.member(transfer.part), *transfer.arguments)


class _TwoSteps(Work):
    """One transfer after another: the second begins when somebody waits."""

    def __init__(self, first: Work, begin_second: Callable[[], Work]) -> None:
        self._first, self._begin_second = first, begin_second
        self._second: Work | None = None
        self._is_beginning = False

    def wait(self) -> None:
        """Waits for both. An interrupted wait goes on where it was."""
        if self._second is None:
            self._first.wait()
            if self._is_beginning:
                raise GroupError(
                    "a wait was interrupted as it began the second level of a transfer, so that nobody knows whether it was sent"
                )
            self._is_beginning = True
            self._second = self._begin_second()
        self._second.wait()
