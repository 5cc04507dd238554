"""Seeing what a model is called with before it runs, whether it is called itself or by a module that wraps it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

Complete = Callable[[nn.Module, dict[str, Any]], dict[str, Any]]


class _Watch(NamedTuple):
    """How many contexts watch a model, which ranks that are threads share; what stands as its forward meanwhile; and what
    stood there before, if it was not the class's."""

    contexts: int
    forward: MethodType
    replaced: Any


_watched: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def watched(model: nn.Module, complete: Complete) -> Iterator[None]:
    """Within it, calls of a model with labels have their arguments completed.

    Not a hook, as modules that wrap a model may call its ``forward``, which passes hooks over.

    Args:
        complete: ``complete(model, arguments)`` by name, of the thread's context. The same function for every context: code
            that torch.compile has made calls it in later ones, too.
    """
    with _lock:
        watch = _watched.get(model) or _start(model, complete)
        _watched[model] = watch._replace(contexts=watch.contexts + 1)
    try:
        yield
    finally:
        with _lock:
            watch = _watched.pop(model)
            if watch.contexts > 1:
                _watched[model] = watch._replace(contexts=watch.contexts - 1)
            elif vars(model).get("forward") is watch.forward:
                del model.forward
                if watch.replaced is not None:
                    model.forward = watch.replaced


def _start(model: nn.Module, complete: Complete) -> _Watch:
    replaced, of_class = vars(model).get("forward"), type(model).forward
    names = list(inspect.signature(of_class).parameters)[1:]
    before_labels = names.index("labels") if "labels" in names else len(names)

    @wraps(of_class)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) > before_labels or kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None:
            # torch 2.9's Dynamo cannot trace zip with strict=.
            kwargs = complete(self, {**dict(zip(names, args)), **kwargs})  # noqa: B905
            args = ()
        # By its class: a copy of the model that is made meanwhile takes this function along.
        return of_class(self, *args, **kwargs) if replaced is None else replaced(*args, **kwargs)

    model.forward = MethodType(forward, model)
    return _Watch(0, model.forward, replaced)
