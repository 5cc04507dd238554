"""The batch: what a caller passes, checked and turned into one integer array."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from cpattn.errors import BatchError

IntArray: TypeAlias = npt.NDArray[np.int64]

# Row numbers are int32 on the device, as varlen attention kernels take them.
MAX_TOKENS = 2**31 - 1


class Request(NamedTuple):
    """One sequence of a batch: ``prefix_len`` tokens in the KV cache already, ``extend_len`` new ones."""

    prefix_len: int
    extend_len: int


def is_integer(value: Any) -> bool:
    """Whether it is an integer of any library's type; a bool is none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def parse_batch(batch: Sequence[Any] | npt.NDArray[Any]) -> IntArray:
    """Returns the batch as int64 ``[num_requests, 2]``: (prefix_len, extend_len) in each row.

    Raises BatchError for anything but integer pairs >= 0, naming the first request that is wrong.
    """
    try:
        pairs = np.asarray(batch)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        pairs = np.empty(0, dtype=object)
        if not isinstance(batch, Sequence):
            raise BatchError(f"batch is a {type(batch).__name__}; {_RULE}") from None
    if pairs.shape in {(0,), (0, 2)} and len(batch) == 0:
        return np.empty((0, 2), dtype=np.int64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        _raise_first_fault(batch)
    if pairs.min() < 0:
        i = int(np.flatnonzero(pairs.min(axis=1) < 0)[0])
        raise BatchError(f"request {i} is ({pairs[i, 0]}, {pairs[i, 1]}); a length can not be negative; {_RULE}")
    # Summed as Python integers where a silent int64 overflow would be possible.
    total = sum(map(sum, pairs.tolist())) if pairs.max() > MAX_TOKENS else int(pairs.sum())
    if total > MAX_TOKENS:
        raise BatchError(f"the batch has {total} tokens, prefixes included; the limit is {MAX_TOKENS} (row numbers are int32); split it")
    return pairs.astype(np.int64)


_RULE = "a batch is a sequence of (prefix_len, extend_len) pairs of integers >= 0, such as [(0, 512), (1024, 1)]"


def _raise_first_fault(batch: Sequence[Any] | npt.NDArray[Any]) -> None:
    """The slow path: the array did not come out as integer pairs, so find out which request is to blame."""
    if isinstance(batch, (str, bytes)) or not hasattr(batch, "__len__"):
        raise BatchError(f"batch is a {type(batch).__name__}; {_RULE}")
    for i, request in enumerate(batch):
        if isinstance(request, (str, bytes)) or not hasattr(request, "__len__") or len(request) != 2:
            raise BatchError(f"request {i} is {request!r}, which is not a pair; {_RULE}")
        for name, length in zip(Request._fields, request, strict=True):
            if not is_integer(length):
                raise BatchError(f"request {i} has {name}={length!r} ({type(length).__name__}), which is not an integer; {_RULE}")
            if abs(int(length)) > MAX_TOKENS:
                raise BatchError(f"request {i} has {name}={length}; the limit is {MAX_TOKENS} (row numbers are int32)")
    raise BatchError(f"batch is a {type(batch).__name__} of another form; {_RULE}")
