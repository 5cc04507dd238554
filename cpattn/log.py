"""The logger ``cpattn`` of Python's ``logging``, and ``CPATTN_LOG``, which shows on stderr what it is told."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from functools import cache

import torch.distributed as dist

_LEVELS = {"info": logging.INFO, "debug": logging.DEBUG}
# Ranks may be threads, which ask at once.
_setting_up = threading.Lock()


def logger() -> logging.Logger:
    """The logger, set up when it is first asked for.

    With ``CPATTN_LOG=info`` or ``debug`` in the environment its records go to stderr, each line with this process's rank. They
    do not go to the root logger's handlers, which could write them there again. Any other value is named in a warning.

    Without it they go where the program sends them. It has no handler of its own, not one that does nothing either: so where nobody has
    set up logging, Python shows warnings on stderr, and nothing below them.
    """
    with _setting_up:
        return _set_up()


@cache
def _set_up() -> logging.Logger:
    found = logging.getLogger("cpattn")
    asked = os.environ.get("CPATTN_LOG", "").strip()
    level = _LEVELS.get(asked.lower())
    if level is not None:
        handler = logging.StreamHandler()
        handler.setFormatter(_WithRank())
        found.addHandler(handler)
        found.setLevel(level)
        found.propagate = False
    elif asked:
        warnings.warn(
            f"CPATTN_LOG={asked[:80]} is unknown, and nothing is logged for it: set it to info or debug, or unset it", stacklevel=2
        )
    return found


class _WithRank(logging.Formatter):
    """``[cpattn rank 1] INFO: ...``, so that the lines of several processes on one terminal can be told apart."""

    def format(self, record: logging.LogRecord) -> str:
        return f"[cpattn{_rank()}] {record.levelname}: {super().format(record)}"


def _rank() -> str:
    """Of this process in the default group, or as its launcher says; nothing where it has none."""
    rank = str(dist.get_rank()) if dist.is_available() and dist.is_initialized() else os.environ.get("RANK", "")
    return f" rank {rank}" if rank else ""
