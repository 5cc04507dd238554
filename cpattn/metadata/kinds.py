"""Requests of a batch that are alike, so that a long batch can be shown in few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cpattn.metadata.layout import Layout


class Kind(NamedTuple):
    """Requests of the same lengths, by their numbers in the batch."""

    prefix_len: int
    extend_len: int
    requests: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """The query-key pairs of all of them."""
        return len(self.requests) * (self.extend_len * self.prefix_len + self.extend_len * (self.extend_len + 1) // 2)


def kinds_of(plan: Layout, cut_alike: bool = False, held_alike: bool = False) -> list[Kind]:
    """The kinds of a plan's requests, in the order of the first of each.

    Args:
        cut_alike: whether the requests of a kind must have the same chunks on the same ranks as well.
        held_alike: whether the same ranks must hold as many of their cached tokens as well.
    """
    # Of lengths that one request alone has, the chunks need not be looked at.
    times = Counter(plan.batch) if cut_alike else Counter()
    bounds = np.searchsorted(plan.chunk_table.request, np.arange(len(plan.batch) + 1))
    # By a rule requests of the same lengths lie alike.
    held = plan.computed_lens if held_alike else None
    found: dict[tuple[int, int, bytes], list[int]] = {}
    for number, request in enumerate(plan.batch):
        own = slice(bounds[number], bounds[number + 1])
        cut = b"".join(column[own].tobytes() for column in plan.chunk_table[1:]) if times[request] > 1 else b""
        cut += b"" if held is None else held[number].tobytes()
        found.setdefault((*request, cut), []).append(number)
    return [Kind(prefix_len, extend_len, tuple(requests)) for (prefix_len, extend_len, _), requests in found.items()]


def lines_of(plan: Layout, most: int, held_alike: bool = False) -> list[Kind]:
    """What at most that many lines show of a plan: each request, or of a longer batch the kinds with the most work."""
    if len(plan.batch) <= most:
        return [Kind(*lengths, (number,)) for number, lengths in enumerate(plan.batch)]
    return most_work(kinds_of(plan, cut_alike=True, held_alike=held_alike), most)


def most_work(kinds: Sequence[Kind], most: int) -> list[Kind]:
    """At most that many of the kinds, those with the most query-key pairs, in the order given."""
    ranked = sorted(range(len(kinds)), key=lambda number: -kinds[number].pairs)
    return [kinds[number] for number in sorted(ranked[:most])]
