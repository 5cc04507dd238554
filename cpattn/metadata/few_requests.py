"""Every division of a few requests: which of them are cut, and who has which of the others.

Where requests are few, each is a large part of a rank's share, and what is placed one by one may miss a division that is
even. There are few enough to look at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.division import Division
from cpattn.metadata.work import BITS, Pieces, Work

# Of 8 requests over 8 ranks there are 21,147 divisions.
MOST_REQUESTS = 8
_MOST_DIVISIONS = 16


def best_of_few(work: Work) -> Iterator[Callable[[], tuple[IntArray, Pieces]]]:
    """The divisions with the most even pairs, by doublings of 2%, and of those with the fewest cuts, the best first, each when called.

    Bins are alike but for one token, and the cut requests make tokens even, each in proportion to the room there is. What
    whole tokens make of that is not known here, so there are several.
    """
    requests = work.tokens.nonzero()[0]
    bin_of = _divisions(len(requests), len(work.room))
    tokens = _sums(bin_of, work.tokens[requests], len(work.room))
    fits = tokens.max(axis=1) <= max(work.room)
    bin_of, tokens = bin_of[fits], tokens[fits]
    pairs = _sums(bin_of, work.pair_part[requests], len(work.room))
    # Bins trade names, so that those with more tokens are those that are to have one more.
    order = np.argsort(-tokens, axis=1, kind="stable")
    room = np.array(work.room) - np.take_along_axis(tokens, order, axis=1)
    cut = bin_of < 0
    poured = work.all_tokens - tokens.sum(axis=1)
    # One token cannot be cut.
    possible = (room >= 0).all(axis=1) & ~(cut & (work.tokens[requests] == 1)).any(axis=1)
    loads = np.take_along_axis(pairs, order, axis=1) + (cut @ work.pair_part[requests])[:, None] * room // np.maximum(poured, 1)[:, None]
    off = np.abs(loads * len(work.room) - (1 << BITS)).max(axis=1)
    sure = np.isin(requests, work.oversized)
    cuts = (cut & ~sure).sum(axis=1)
    uneven = np.frexp((50 * off >> BITS).astype(np.float64))[1]
    # Lexicographic: with at most 16 bins off is below 2**34.
    cost = np.where(possible, (uneven * (MOST_REQUESTS + 1) + cuts) << 34 | off, np.iinfo(np.int64).max)
    for best in cost.argsort(kind="stable")[:_MOST_DIVISIONS]:
        if possible[best]:
            names = np.full(len(work.room) + 1, -1, dtype=np.int64)
            names[order[best]] = np.arange(len(work.room))
            yield partial(_division, work, requests, names[bin_of[best]])


def _division(work: Work, requests: IntArray, bins: IntArray) -> tuple[IntArray, Pieces]:
    division = Division(work)
    division.assign(requests[bins >= 0], bins[bins >= 0])
    for request in requests[bins < 0].tolist():
        division.pour(request)
    return division.rank_of, division.pieces()


def _sums(bin_of: IntArray, values: IntArray, num_bins: int) -> IntArray:
    """``[d, num_bins]`` of each division what its bins have of the values."""
    # One more, for requests that are cut: number -1.
    cells = (bin_of + 1 + np.arange(len(bin_of))[:, None] * (num_bins + 1)).ravel()
    # Sums in float64 are exact: they are at most 2**31.
    sums = np.bincount(cells, np.tile(values, len(bin_of)), minlength=len(bin_of) * (num_bins + 1))
    return sums.astype(np.int64).reshape(len(bin_of), num_bins + 1)[:, 1:]


@lru_cache(maxsize=64)
def _divisions(num_requests: int, num_bins: int) -> IntArray:
    """``[d, num_requests]`` the bin of each request, or -1 if it is cut. Bins are numbered by their first request, so that
    no division comes twice under other names."""
    table, used = np.zeros((1, 0), dtype=np.int64), np.zeros(1, dtype=np.int64)
    for _ in range(num_requests):
        # Cut, on a bin that has one already, or on the next.
        row, which = (np.arange(-1, num_bins) <= np.minimum(used, num_bins - 1)[:, None]).nonzero()
        table = np.concatenate([table[row], which[:, None] - 1], axis=1)
        used = np.maximum(used[row], which)
    return table
