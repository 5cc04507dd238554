"""What a call that has raised still owes: its transfers, carried out in a thread of its own so that Ctrl-C can end the wait."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from cpattn.transports.transfer import Transfer, Work
from cpattn.transports.transport import Transport


class Settling:
    """Waits for what was started, then carries out what is left, with NaN for what this rank could not make."""

    def __init__(self, transport: Transport, started: Sequence[Work], left: Sequence[Transfer], device: torch.device) -> None:
        self.failure: Exception | None = None
        self.is_finished = False
        self._is_abandoned = False
        self._transport = transport
        # Of its own: whoever made the call forgets it as it leaves.
        self._started, self._left = list(started), list(left)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._run, daemon=True)
        # Not the thread's own end: Python forgets a thread whose join was interrupted.
        self._has_ended = threading.Event()

    def wait(self, seconds: float | None) -> None:
        """Returns when it is finished or has failed, or after so many seconds."""
        if self._thread.ident is None:
            self._thread.start()
        self._has_ended.wait(seconds)

    def abandon(self) -> None:
        """From now on nothing more is sent: the others would take it for another call's."""
        self._is_abandoned = True

    def _run(self) -> None:
        try:
            with torch.cuda.stream(self._stream):
                for work in self._started:
                    work.wait()
                for transfer in self._left:
                    if self._is_abandoned:
                        return
                    if transfer.fill_missing is not None:
                        transfer.fill_missing()
                    self._transport.start(transfer).wait()
                self._transport.settle()
            self.is_finished = True
        except Exception as failure:
            self.failure = failure
        finally:
            self._has_ended.set()
