"""A caller's own partition: what its function returns is checked and kept, and the function itself is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cpattn.device_tables import IntArray, exclusive_cumsum
from cpattn.errors import PlanError, shown
from cpattn.metadata.batch import MAX_TOKENS
from cpattn.metadata.chunks import Chunks

_RULE = (
    "a partition is called with the batch [n, 2] and cp_size, and returns cpattn.Chunks(request, start, length, rank). These are four flat "
    "integer arrays with an entry for each chunk, by request and then by start, and each new token stands in one chunk"
)


class CallersPartition:
    """What a plan keeps of a caller's partition: the chunks that it gave for the batch, and its name to show.

    Equal where the chunks are, so that plans are; made of arrays, so that they can be pickled. Called like any partition, it
    returns those chunks.
    """

    def __init__(self, name: str, chunks: Chunks) -> None:
        self.name = name
        self.chunks = Chunks(*(np.array(column, dtype=np.int64) for column in chunks))
        for column in self.chunks:
            column.setflags(write=False)

    @classmethod
    def of(cls, partition: Callable[..., Any], batch: IntArray, cp_size: int) -> CallersPartition:
        """Asks a caller's function. Raises PlanError unless it returns a layout of the batch, with the first request that is
        wrong; an error of its own leaves as it is."""
        name = _name(partition)
        chunks = _as_chunks(partition(batch, cp_size), name)
        if not _is_layout(chunks, batch[:, 1], cp_size):
            raise PlanError(f"partition {name}: {_first_fault(chunks, batch[:, 1].tolist(), cp_size)}; {_RULE}")
        return cls(name, chunks)

    def __call__(self, batch: IntArray, cp_size: int) -> Chunks:
        return self.chunks

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CallersPartition):
            return NotImplemented
        return all(map(np.array_equal, self.chunks, other.chunks))

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        """Through the constructor: a copied array could be written to."""
        return CallersPartition, (self.name, self.chunks)

    def to_bytes(self) -> bytes:
        """The table, the same on every machine."""
        return b"".join(column.astype("<i8").tobytes() for column in self.chunks)


def _name(partition: Any) -> str:
    if isinstance(partition, CallersPartition):
        return partition.name
    # functools.partial has no name; what it calls has.
    name = getattr(getattr(partition, "func", partition), "__name__", None)
    return name if isinstance(name, str) else type(partition).__name__


def _as_chunks(given: Any, name: str) -> Chunks:
    if not isinstance(given, (tuple, list)) or len(given) != len(Chunks._fields):
        raise PlanError(f"partition {name} returned {shown(given)} ({type(given).__name__}); {_RULE}")
    columns = []
    for field, values in zip(Chunks._fields, given, strict=True):
        try:
            column = np.asarray(values)
        # Tensors on a GPU, and lists of lists of several lengths.
        except Exception as error:
            raise PlanError(f"partition {name}: {field} cannot be read as an array ({type(error).__name__}); {_RULE}") from None
        if column.ndim != 1 or (column.dtype.kind not in "iu" and column.size):
            raise PlanError(f"partition {name}: {field} is {column.dtype} of shape {column.shape}; {_RULE}")
        if column.size and not (column.min() >= -MAX_TOKENS and column.max() <= MAX_TOKENS):
            raise PlanError(f"partition {name}: {field} holds {column.min()} to {column.max()}, beyond what can be a number here; {_RULE}")
        columns.append(column.astype(np.int64))
    if len(set(map(len, columns))) > 1:
        sizes = ", ".join(f"{field} has {len(column)}" for field, column in zip(Chunks._fields, columns, strict=True))
        raise PlanError(f"partition {name}: {sizes} entries; {_RULE}")
    return Chunks(*columns)


def _is_layout(chunks: Chunks, extend_lens: IntArray, cp_size: int) -> bool:
    """Whether each new token stands once, in order, on a rank that there is."""
    request, start, length, rank = chunks
    if not len(request):
        return not extend_lens.any()
    in_range = request[0] >= 0 and request[-1] < len(extend_lens) and rank.min() >= 0 and rank.max() < cp_size and length.min() >= 1
    if not in_range or (np.diff(request) < 0).any():
        return False
    if not np.array_equal(np.bincount(request, length, minlength=len(extend_lens)), extend_lens):
        return False
    return bool((start == exclusive_cumsum(length) - exclusive_cumsum(extend_lens)[request]).all())


def _first_fault(chunks: Chunks, extend_lens: list[int], cp_size: int) -> str:
    """What is wrong with the first request that is, in words."""
    table = list(zip(*(column.tolist() for column in chunks), strict=True))
    current, end = 0, 0  # the request that is looked at, and the token of it that must come next
    for entry, (request, start, length, rank) in enumerate(table):
        if not 0 <= request < len(extend_lens):
            return f"entry {entry} is of request {request}, the batch has {len(extend_lens)} requests"
        if request < current:
            return f"request {request} is wrong: its entry {entry} comes after one of request {current}"
        while current < request:
            if end < extend_lens[current]:
                return _missing(current, end, extend_lens[current], extend_lens[current])
            current, end = current + 1, 0
        extend_len = extend_lens[request]
        what = f"request {request} is wrong: tokens {start} to {start + length - 1} (entry {entry})"
        if length < 1:
            return f"request {request} is wrong: entry {entry} has a length of {length}; leave out chunks without a token"
        if not 0 <= rank < cp_size:
            return f"{what} are on rank {rank}; ranks are 0 to {cp_size - 1}"
        if start < 0 or start + length > extend_len:
            return f"{what} are out of range; the request has {extend_len} new tokens, 0 to {extend_len - 1}"
        if start != end:
            starts = [other[1] for other in table if other[0] == request]
            if starts != sorted(starts):
                return f"request {request} is wrong: its chunks are not in order, their starts are {shown(starts)}"
            return f"{what} overlap those before, which end at {end}" if start < end else _missing(request, end, start, extend_len)
        end = start + length
    for request in range(current, len(extend_lens)):
        if end < extend_lens[request]:
            return _missing(request, end, extend_lens[request], extend_lens[request])
        end = 0
    raise AssertionError("a table without a fault is a layout")


def _missing(request: int, first: int, end: int, extend_len: int) -> str:
    return f"request {request} is wrong: tokens {first} to {end - 1} of its {extend_len} are missing"
