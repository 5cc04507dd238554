"""Handles: how a compiled graph refers to an object, by a tensor that holds its number.

A graph takes tensors, and compiles anew for any other Python value that changes. So an object that changes with each batch
goes through it as a number in a tensor, which the operator reads.
"""

from __future__ import annotations

import itertools
import secrets
from typing import Any, TypeVar
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from cpattn.errors import CPError

T = TypeVar("T")

# A number that another process has made, and a graph has kept, should be no object's here.
_numbers = itertools.count(1 + secrets.randbits(62))
# Not a WeakValueDictionary, which takes four times as long to look into.
_objects: dict[int, ref[Any]] = {}


def new_handle(of: Any) -> Tensor:
    """An int64 tensor without an axis, on the CPU, that stands for an object. It does not keep the object alive.

    >>> class Thing: ...
    >>> thing = Thing()
    >>> resolve(new_handle(thing), Thing) is thing
    True
    """
    number = next(_numbers)
    _objects[number] = ref(of, lambda _: _objects.pop(number, None))
    if not torch.is_inference_mode_enabled():
        return torch.from_numpy(np.array(number))  # takes a third of the time of torch.tensor
    # A tensor made in that mode would have a graph compiled for it alone.
    with torch.inference_mode(False):
        return torch.from_numpy(np.array(number))


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
