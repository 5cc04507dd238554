"""Handles: how a compiled graph refers to an object, by a tensor that holds its number.

A graph takes tensors, and compiles anew for any other Python value that changes. So an object that changes with each batch
goes through it as a number in a tensor, which the operator reads.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from typing import Any, TypeVar
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from cpattn.errors import CPError

T = TypeVar("T")

# Not a WeakValueDictionary, which takes four times as long to look into.
_objects: dict[int, ref[Any]] = {}
# Numbers with their tensors, made many at a time: one alone would cost its object several microseconds.
_unused: list[tuple[int, Tensor]] = []
_MADE_AT_ONCE = 64
# At how many objects those that are no more are looked for.
_look_again_at = _MADE_AT_ONCE
_numbers: Iterator[int]


def _begin() -> None:
    """A number that another process has made, and a graph has kept, should be no object's here."""
    global _numbers
    _numbers = itertools.count(1 + secrets.randbits(62))
    _unused.clear()


_begin()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin)


def new_handle(of: Any) -> Tensor:
    """An int64 tensor without an axis, on the CPU, that stands for an object. It does not keep the object alive.

    >>> class Thing: ...
    >>> thing = Thing()
    >>> resolve(new_handle(thing), Thing) is thing
    True
    """
    try:
        number, handle = _unused.pop()
    except IndexError:
        number, handle = _make_unused()
    _objects[number] = ref(of)
    return handle


def _make_unused() -> tuple[int, Tensor]:
    """Makes the next handles, and now and then forgets the objects that are no more; one of the handles."""
    global _look_again_at
    if len(_objects) >= _look_again_at:
        # The numbers alone: pairs would be made one by one, and with them Python may collect garbage, and let another thread add objects.
        for number in list(_objects):
            reference = _objects.get(number)
            if reference is not None and reference() is None:
                _objects.pop(number, None)
        # Not each time: there may be many that are still in use.
        _look_again_at = 2 * len(_objects) + _MADE_AT_ONCE
    # A tensor made in inference mode would have a graph compiled for it alone.
    with torch.inference_mode(False):
        first, *rest = [(number, torch.from_numpy(np.array(number))) for number in itertools.islice(_numbers, _MADE_AT_ONCE)]
    _unused.extend(rest)
    return first


def resolve(handle: Tensor, kind: type[T] | tuple[type[T], ...]) -> T:
    """The object that a handle stands for. Raises CPError where there is none of that kind."""
    number = handle.item()
    reference = _objects.get(number)  # type: ignore[arg-type]
    found = None if reference is None else reference()
    if not isinstance(found, kind):
        name = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise CPError(
            f"a compiled graph refers to a {name} by the handle {number}, but this process has none of that number, or no more; "
            "keep the object as long as graphs are called with its handle, and give each process its own"
        )
    return found
