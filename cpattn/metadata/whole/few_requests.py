"""Every division of a few requests: which of them are cut, and who has which of the others.

Where requests are few, each is a large part of a rank's share, and what is placed one by one may miss a division that is
even. There are few enough to look at all.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.whole.division import Division
from cpattn.metadata.whole.work import BITS, Pieces, Work

# Of 8 requests over 8 ranks there are 21,147 divisions, which take about 10 ms.
MOST_REQUESTS, MOST_BINS = 8, 8
# So many of them are tried.
MOST_DIVISIONS = 16


class FewRequests:
    """See the module. The work of looking at all divisions is done once, and not before one is asked for."""

    def __init__(self, work: Work) -> None:
        self._work, self._requests = work, work.tokens.nonzero()[0]

    def division(self, nth: int) -> tuple[IntArray, Pieces] | None:
        """The nth best: with the most even pairs, by doublings of 2%, and of those with the fewest cuts. None if there are not so many.

        Bins are alike but for one token, and the cut requests make tokens even, each in proportion to the room there is.
        What whole tokens make of that is not known here, so there are several.
        """
        if nth >= len(self._best):
            return None
        division, bins = Division(self._work), self._best[nth]
        division.assign(self._requests[bins >= 0], bins[bins >= 0])
        for request in self._requests[bins < 0].tolist():
            division.pour(request)
        return division.rank_of, division.pieces()

    @cached_property
    def _best(self) -> IntArray:
        """``[b, n]`` of the best divisions the rank of each request, -1 if it is cut."""
        work, requests, num_bins = self._work, self._requests, len(self._work.room)
        bin_of = _divisions(len(requests), num_bins)
        tokens = _sums(bin_of, work.tokens[requests], num_bins)
        # One token cannot be cut.
        fits = (tokens.max(axis=1) <= max(work.room)) & ~((bin_of < 0) & (work.tokens[requests] == 1)).any(axis=1)
        bin_of, tokens = bin_of[fits], tokens[fits]
        # Bins trade names, so that those with more tokens are those that are to have one more.
        order = np.argsort(-tokens, axis=1, kind="stable")
        room = np.array(work.room) - np.take_along_axis(tokens, order, axis=1)
        possible = (room >= 0).all(axis=1)
        bin_of, order, room = bin_of[possible], order[possible], room[possible]
        cut = bin_of < 0
        poured = np.maximum(room.sum(axis=1), 1)
        pairs = np.take_along_axis(_sums(bin_of, work.pair_part[requests], num_bins), order, axis=1)
        loads = pairs + (cut @ work.pair_part[requests])[:, None] * room // poured[:, None]
        off = np.abs(loads * num_bins - (1 << BITS)).max(axis=1)
        cuts = (cut & ~np.isin(requests, work.oversized)).sum(axis=1)
        best = np.lexsort((off, cuts, np.frexp((50 * off >> BITS).astype(np.float64))[1]))[:MOST_DIVISIONS]
        names = np.full((len(best), num_bins + 1), -1, dtype=np.int64)
        np.put_along_axis(names[:, :-1], order[best], np.arange(num_bins)[None], axis=1)
        return np.take_along_axis(names, bin_of[best], axis=1)


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
