"""What a division over ranks starts from: what each request takes, in tokens and in query-key pairs.

All that decides is in integers, so that every rank divides alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cpattn.device_tables import IntArray

# Tokens and pairs are compared as parts of the batch's, in units of 2**-30.
BITS = 30
# Where requests are no more than that, couples of them are tried against each other.
_FEW = 32

# Of each request that is cut ``(rank, tokens)``, with at least one token each.
Pieces = dict[int, list[tuple[int, int]]]


class Work:
    """A batch, and the room that ranks have for it.

    Attributes:
        room: the tokens of each rank, whose sum is that of ``tokens``; the first ones may have one more.
        prefix, tokens, pairs ``[n]``: of each request the cached tokens, the new ones, and the query-key pairs.
        token_part, pair_part ``[n]``: the last two as parts of all. These and ``tokens`` and ``pairs`` are there as lists as well.
        size ``[n]``: the larger of the two parts.
        share: what a rank is to have, as a part of all.
        full: the part that a rank may have.
        is_few: whether requests are so few that couples of them are tried against each other.
        prompts: requests of more than one token, those that take the most first.
        decodes: requests of one token, those with the most pairs first.
        oversized: prompts that take more than a rank's share, of tokens or (by more than 2%) of pairs; not among ``prompts``.
    """

    def __init__(self, batch: IntArray, room: list[int]) -> None:
        self.room, self.prefix, self.tokens = room, batch[:, 0], batch[:, 1]
        self.pairs = self.tokens * self.prefix + self.tokens * (self.tokens + 1) // 2
        self.token_list: list[int] = self.tokens.tolist()
        self.pair_list: list[int] = self.pairs.tolist()
        self.all_tokens, self.all_pairs = sum(room), sum(self.pair_list)
        self.token_part, self.pair_part = _parts(self.tokens, self.all_tokens), _parts(self.pairs, self.all_pairs)
        self.token_parts: list[int] = self.token_part.tolist()
        self.pair_parts: list[int] = self.pair_part.tolist()
        self.size = np.maximum(self.token_part, self.pair_part)
        self.share = (1 << BITS) // len(room)
        self.full = self.share * 51 // 50
        self.is_few = len(self.token_list) <= _FEW
        is_prompt, is_large = self.tokens > 1, (self.tokens > room[0]) | (self.pair_part > self.full)
        self.oversized: list[int] = _largest_first(is_prompt & is_large, self.size).tolist()
        self.prompts = _largest_first(is_prompt & ~is_large, self.size)
        self.decodes = _largest_first(self.tokens == 1, self.pairs)

    def even(self, request: int, tokens: int) -> int:
        """The pairs of some tokens of a request, in proportion."""
        pairs: int = self.pair_list[request] * tokens // self.token_list[request]
        return pairs

    def off(self, loads: Sequence[int]) -> int:
        """The most that pairs of a rank are off the mean, as a part of that in units of 2**-30."""
        off: int = (max(abs(load * len(loads) - self.all_pairs) for load in loads) << BITS) // max(self.all_pairs, 1)
        return off


def _parts(values: IntArray, total: int) -> IntArray:
    # Pairs may have 62 bits: the lowest of them do not count.
    spare = max(0, total.bit_length() - 32)
    parts: IntArray = ((values >> spare) << BITS) // max(total >> spare, 1)
    return parts


def _largest_first(chosen: npt.NDArray[np.bool_], size: IntArray) -> IntArray:
    requests = chosen.nonzero()[0]
    return requests[(-size[requests]).argsort(kind="stable")]
