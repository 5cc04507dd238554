"""Which context a model runs in. It is that of the thread (or task), so that several ranks may be threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from cpattn.integrations.transformers.batch_context import BatchContext
from cpattn.integrations.transformers.context_error import ContextError

_active: ContextVar[BatchContext | None] = ContextVar("cpattn context_parallel", default=None)
# All that are open in the process, each with the thread that entered it, for messages.
_open: dict[BatchContext, str] = {}


def context_here() -> BatchContext | None:
    """The context of this thread, if there is one."""
    return _active.get()


@contextmanager
def entered(cp: BatchContext, within: BatchContext | None = None) -> Iterator[None]:
    """Makes a context that of this thread. Raises ContextError within another one than that which it is meant to be entered in."""
    if _active.get() is not within:
        raise ContextError("context_parallel within another context_parallel; leave the first before a model runs on another batch")
    token = _active.set(cp)
    _open[cp] = threading.current_thread().name
    try:
        yield
    finally:
        del _open[cp]
        _active.reset(token)


def active_context(config: Any) -> BatchContext:
    """The context that a model runs in, of which one with this config asks for its attention. Raises ContextError where
    there is none."""
    cp = _active.get()
    if cp is not None:
        cp.reached = True
        return cp
    here = threading.current_thread().name
    for other, there in list(_open.items()):
        if other.decoder.has_config(config):
            error = ContextError(
                f"the model was called in thread {here!r}, but its context_parallel was entered in thread {there!r}, and holds in that "
                "thread alone. Call the model where the context was entered, or enter one in the thread that calls it"
            )
            other.missed = error
            raise error
    raise ContextError(
        'a model with attn_implementation="cpattn" was called outside of a context, so that its batch is unknown. Call it as '
        "`with context_parallel(model, meta) as cp: model(**cp.inputs(input_ids))`, or give it another attention: "
        'model.set_attn_implementation("sdpa")'
    )
