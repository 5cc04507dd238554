"""The batch: what a caller passes, checked and turned into one integer array."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpattn.device_tables import IntArray as IntArray
from cpattn.errors import BatchError, CPError, PlanError, shown

# Row numbers are int32 on the device, as varlen attention kernels take them.
MAX_TOKENS = 2**31 - 1


class Request(NamedTuple):
    """One sequence of a batch: ``prefix_len`` tokens in the KV cache already, ``extend_len`` new ones."""

    prefix_len: int
    extend_len: int


class CheckedBatch(tuple[Request, ...]):
    """Requests that were checked, as a layout has them: another layout of the same batch need not look at them again.

    Attributes:
        pairs: the same as int64 ``[num_requests, 2]``, never written to.
    """

    pairs: IntArray

    @classmethod
    def of(cls, batch: Any) -> CheckedBatch:
        """Raises BatchError as :func:`parse_batch`."""
        if type(batch) is cls:
            return batch
        pairs = parse_batch(batch)
        pairs.setflags(write=False)
        # What Request._make does, without a Python call for each.
        made = cls(map(tuple.__new__, repeat(Request), pairs.tolist()))
        made.pairs = pairs
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as a plain tuple: of the array a copy could be written to."""
        return tuple, (list(self),)


def is_integer(value: Any) -> bool:
    """Whether it is an integer of any library's type; a bool is none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def parse_batch(batch: Sequence[Any] | npt.NDArray[Any]) -> IntArray:
    """Returns the batch as int64 ``[num_requests, 2]``: (prefix_len, extend_len) in each row.

    Raises BatchError for anything but integer pairs >= 0, naming the first request that is wrong.
    """
    requests: Any = _as_list(batch, "batch", _RULE, BatchError)
    if isinstance(requests, _TEXT) or not isinstance(requests, Sequence):
        raise BatchError(f"batch is a {type(batch).__name__}; {_RULE}")
    try:
        usual = all(
            isinstance(request, (tuple, list)) and len(request) == 2 and type(request[0]) is type(request[1]) is int for request in requests
        )
        pairs = np.array(requests if usual else _parse_each(requests), dtype=np.int64).reshape(-1, 2)
    except OverflowError:
        pairs = np.array(_parse_each(requests), dtype=np.int64).reshape(-1, 2)
    if pairs.size and (pairs.min() < 0 or pairs.max() > MAX_TOKENS):
        _parse_each(requests)
    total = int(pairs.sum())
    if total > MAX_TOKENS:
        raise BatchError(f"the batch has {total} tokens, prefixes included; the limit is {MAX_TOKENS} (row numbers are int32); split it")
    return pairs


def parse_prefix_shards(shards: Any, prefix_lens: IntArray, cp_size: int) -> IntArray:
    """Returns which share of each prefix each rank holds, as int64 ``[num_requests, cp_size]``.

    Raises PlanError for anything but integers >= 0 whose sum is the request's prefix_len.
    """
    usual = _usual_shards(shards, cp_size)
    if usual is not None and len(usual) == len(prefix_lens) and np.array_equal(usual.sum(axis=1), prefix_lens):
        return usual
    rule = f"pass {cp_size} integers >= 0 for each request, the prefix tokens that each rank holds, whose sum is its prefix_len"
    try:
        table = [list(shares) for shares in _as_list(shards, "prefix_shards", rule, PlanError)]
    except TypeError:
        raise PlanError(f"prefix_shards is {shown(shards)}; {rule}") from None
    if len(table) != len(prefix_lens):
        raise PlanError(f"prefix_shards has {len(table)} entries, the batch has {len(prefix_lens)} requests; {rule}")
    for i, (shares, prefix_len) in enumerate(zip(table, prefix_lens.tolist(), strict=True)):
        # As plain integers: those of numpy may be too narrow for their sum.
        if len(shares) != cp_size or not all(is_integer(share) and share >= 0 for share in shares) or sum(map(int, shares)) != prefix_len:
            raise PlanError(f"prefix_shards of request {i} is {shown(shares)}, its prefix_len is {prefix_len}; {rule}")
    return np.array([list(map(int, shares)) for shares in table], dtype=np.int64).reshape(-1, cp_size)


def _usual_shards(shards: Any, cp_size: int) -> IntArray | None:
    """A copy of shares as most have them, an array of integers or sequences of plain ones; None for others, and where one is wrong."""
    if isinstance(shards, (list, tuple)):
        usual = all(isinstance(shares, (list, tuple)) and len(shares) == cp_size and {*map(type, shares)} == {int} for shares in shards)
    else:
        # No array of a kind of its own: those of numpy.ma have numbers that do not count.
        usual = type(shards) is np.ndarray and shards.ndim == 2 and shards.dtype.kind in "iu"
    try:
        table = np.array(shards, dtype=np.int64).reshape(len(shards), cp_size) if usual else None
    except (OverflowError, ValueError):
        return None
    # Sums of larger ones could come around to a length again.
    return None if table is None or (table.size and not 0 <= table.min() <= table.max() <= MAX_TOKENS) else table


_RULE = "a batch is a sequence of (prefix_len, extend_len) pairs of integers >= 0, such as [(0, 512), (1024, 1)]"
_TEXT = (str, bytes, bytearray)


def _as_list(given: Any, name: str, rule: str, kind: type[CPError]) -> Any:
    """An array or a tensor as a list; anything else as it is."""
    try:
        return given.tolist() if hasattr(given, "tolist") else given
    # What torch raises for tensors without data of their own depends on the kind.
    except Exception as error:
        raise kind(f"{name} is a {type(given).__name__} whose numbers cannot be read ({type(error).__name__}); {rule}") from None


def _parse_each(requests: Sequence[Any]) -> list[tuple[int, int]]:
    """One request at a time: for integers of other libraries' types, and to name the first request that is wrong."""
    pairs = []
    for i, request in enumerate(requests):
        try:
            lengths = None if isinstance(request, _TEXT) else tuple(request)
        except TypeError:
            lengths = None
        if lengths is None or len(lengths) != 2:
            raise BatchError(f"request {i} is {shown(request)}, which is not a pair; {_RULE}")
        for name, length in zip(Request._fields, lengths, strict=True):
            if not is_integer(length):
                raise BatchError(f"request {i} has {name}={shown(length)} ({type(length).__name__}), which is not an integer; {_RULE}")
            if length < 0:
                raise BatchError(f"request {i} has {name}={shown(length)}; a length cannot be negative; {_RULE}")
            if length > MAX_TOKENS:
                raise BatchError(f"request {i} has {name}={shown(length)}; the limit is {MAX_TOKENS} (row numbers are int32)")
        pairs.append((int(lengths[0]), int(lengths[1])))
    return pairs
