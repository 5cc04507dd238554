"""Which rank holds each cached token, where each rank keeps what it has computed: so positions are known, and windows work."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from cpattn.device_tables import IntArray, exclusive_cumsum
from cpattn.errors import PlanError, shown
from cpattn.metadata.chunks import Chunks

_RULE = "pass for each request the rank of each of its prefix tokens, in the order of the sequence: one integer for each"


class PrefixRanks:
    """What a plan keeps of ``prefix_ranks``. Equal where the ranks are, so that plans are.

    Args:
        ranks: of each request, integers ``[prefix_len]``; they are not copied, and must not change.
        counts: int64 ``[num_requests, cp_size]`` how many of them each rank has, where that is known: nothing is then read of the ranks,
            of which a long context has many, until a window or a move asks for them.
    """

    def __init__(self, ranks: Sequence[IntArray], counts: IntArray | None = None) -> None:
        self.ranks = tuple(ranks)
        self._counts = counts

    @classmethod
    def parse(cls, given: Any, prefix_lens: IntArray, cp_size: int) -> PrefixRanks:
        """Raises PlanError unless each prefix token has one rank that there is: then each position stands once over all ranks."""
        parsed = given if isinstance(given, PrefixRanks) else cls(_as_arrays(given))
        if len(parsed.ranks) != len(prefix_lens):
            raise PlanError(f"prefix_ranks has {len(parsed.ranks)} entries, the batch has {len(prefix_lens)} requests; {_RULE}")
        lengths = parsed.lengths
        if not np.array_equal(lengths, prefix_lens):
            wrong = int((lengths != prefix_lens).nonzero()[0][0])
            raise PlanError(
                f"prefix_ranks of request {wrong} has {int(lengths[wrong])} entries, its prefix_len is {int(prefix_lens[wrong])}; {_RULE}"
            )
        if parsed._counts is not None and parsed._counts.shape[1] == cp_size:
            return parsed
        # A new one: another plan may have the given one.
        counts = np.zeros((len(lengths), cp_size), dtype=np.int64)
        for request, ranks in enumerate(parsed.ranks):
            counts[request] = _counted(ranks, request, cp_size)
        return cls(parsed.ranks, counts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrefixRanks):
            return NotImplemented
        return len(self.ranks) == len(other.ranks) and all(map(np.array_equal, self.ranks, other.ranks))

    def __hash__(self) -> int:
        # Of many numbers, and plans have their counts besides.
        return hash(tuple(self.lengths.tolist()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({int(self.lengths.sum())} tokens of {len(self.ranks)} requests)"

    def __reduce__(self) -> tuple[Any, ...]:
        return PrefixRanks, (self.ranks,)

    def to_bytes(self) -> bytes:
        """The same on every machine."""
        return self.flat.astype("<i4").tobytes()

    @cached_property
    def lengths(self) -> IntArray:
        """``[num_requests]`` tokens of each."""
        return np.array([len(ranks) for ranks in self.ranks], dtype=np.int64)

    @cached_property
    def flat(self) -> IntArray:
        """``[prefix tokens]`` request after request."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self.ranks])

    @property
    def counts(self) -> IntArray:
        """``[num_requests, cp_size]`` the tokens that each rank holds."""
        assert self._counts is not None  # parsed
        return self._counts

    def numbers(self) -> IntArray:
        """``[prefix tokens]`` of each its number among the tokens of its request on its rank."""
        numbers = np.empty(len(self.flat), dtype=np.int64)
        for rank, counts in enumerate(self.counts.T):
            mine = (self.flat == rank).nonzero()[0]
            numbers[mine] = np.arange(len(mine)) - exclusive_cumsum(counts).repeat(counts)
        return numbers

    def runs(self) -> Chunks:
        """Neighbours on one rank as chunks: the layout of a step that computes all of these tokens."""
        request = np.arange(len(self.ranks)).repeat(self.lengths)
        begins = np.ones(len(request), dtype=bool)
        begins[1:] = (request[1:] != request[:-1]) | (self.flat[1:] != self.flat[:-1])
        first = begins.nonzero()[0]
        length = np.diff(np.append(first, len(request)))
        return Chunks(request[first], first - exclusive_cumsum(self.lengths)[request[first]], length, self.flat[first])


def _counted(ranks: IntArray, request: int, cp_size: int) -> IntArray:
    wrong = (ranks < 0) | (ranks >= cp_size)
    if wrong.any():
        token = int(wrong.argmax())
        raise PlanError(f"prefix_ranks of request {request} has rank {int(ranks[token])} for token {token}; ranks are 0 to {cp_size - 1}")
    return np.bincount(ranks, minlength=cp_size)


def _as_arrays(given: Any) -> list[IntArray]:
    """Copies: a caller's arrays may change."""
    if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
        raise PlanError(f"prefix_ranks is {shown(given)}; {_RULE}")
    arrays = []
    for request, ranks in enumerate(given):
        try:
            array = np.asarray(ranks)
        # Tensors on a GPU, and lists of lists of several lengths.
        except Exception as error:
            raise PlanError(f"prefix_ranks of request {request} cannot be read as an array ({type(error).__name__}); {_RULE}") from None
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise PlanError(f"prefix_ranks of request {request} is {array.dtype} of shape {array.shape}; {_RULE}")
        if array.size and not 0 <= array.min() <= array.max() < 2**31:
            raise PlanError(f"prefix_ranks of request {request} holds {array.min()} to {array.max()}; {_RULE}")
        array = array.astype(np.int64)
        array.setflags(write=False)
        arrays.append(array)
    return arrays
