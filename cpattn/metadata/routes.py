"""Which cached tokens go from which rank to which, where a cache moves from one layout to another: numpy, alike on every rank."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout


class Places(NamedTuple):
    """Tokens in the pages of one rank, int64 ``[n]``: of which request, and the number there; -1 for none."""

    request: IntArray
    number: IntArray


class Round(NamedTuple):
    """What one exchange moves: ``[size * rows]`` where this rank reads the rows that it sends to each other rank, and where it
    writes those that it gets from each."""

    sent: Places
    received: Places


class _Moved(NamedTuple):
    """Tokens that are moved in one exchange, int64 ``[n]``: of which rank, to which, and the how many-th it is between these two.

    Attributes:
        token: its number among all prefixes, request after request; request, position: of it.
    """

    of: IntArray
    to: IntArray
    nth: IntArray
    token: IntArray
    request: IntArray
    position: IntArray

    def placed(self, layout: Layout, mine: IntArray, other: IntArray, rank: int, size: int, rows: int) -> Places:
        """Where those of ``rank``'s lie in its pages, at the rows of its message for the other ranks."""
        is_mine = mine == rank
        places = Places(*np.full((2, size * rows), -1, dtype=np.int64))
        row = other[is_mine] * rows + self.nth[is_mine]
        places.request[row] = self.request[is_mine]
        places.number[row] = _numbers(layout, self.token[is_mine], self.position[is_mine])
        return places


def routes(source: Layout, target: Layout, rank: int, size: int, tokens: int) -> tuple[int, list[Round]]:
    """The exchanges that move all prefixes, so many tokens in each, as ``rank`` of a group of ``size`` sees them. Before them how
    many rows each rank's message has for each other: as many in all exchanges, and on every rank."""
    total = source.num_prefix_tokens
    parts = [_moved(source, target, size, np.arange(start, min(start + tokens, total))) for start in range(0, total, tokens)]
    rows = max((int(part.nth.max(initial=-1)) + 1 for part in parts), default=0)
    return rows, [
        Round(part.placed(source, part.of, part.to, rank, size, rows), part.placed(target, part.to, part.of, rank, size, rows))
        for part in parts
    ]


def _moved(source: Layout, target: Layout, size: int, token: IntArray) -> _Moved:
    ends = source.prefix_lens.cumsum()
    request = ends.searchsorted(token, side="right")
    position = token - (ends - source.prefix_lens)[request]
    to = _ranks(target, token, position)
    if to is None:
        # Each rank gets each token.
        to = np.arange(target.cp_size).repeat(len(token))
        token, request, position = (np.tile(x, target.cp_size) for x in (token, request, position))
    of = _ranks(source, token, position)
    if of is None:
        # Who has a token already, or else all by turns.
        of = np.where(to < source.cp_size, to, position % source.cp_size)
    pair = of * size + to
    counts = np.bincount(pair, minlength=size * size)
    order = pair.argsort(kind="stable")
    nth = np.empty_like(order)
    nth[order] = np.arange(len(order)) - (counts.cumsum() - counts).repeat(counts)
    return _Moved(of, to, nth, token, request, position)


def _ranks(layout: Layout, token: IntArray, position: IntArray) -> IntArray | None:
    """Who holds tokens; None where every rank does."""
    if layout.owner is not None:
        return layout.owner.ranks(position, layout.cp_size)
    return None if layout.prefix_ranks is None else layout.prefix_ranks.flat[token]


def _numbers(layout: Layout, token: IntArray, position: IntArray) -> IntArray:
    """The number of each among the tokens of its request on its rank."""
    if layout.owner is not None:
        return layout.owner.numbers(position, layout.cp_size)
    return position if layout.prefix_ranks is None else layout.prefix_numbers[token]
