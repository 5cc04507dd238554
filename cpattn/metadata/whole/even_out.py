"""Whole requests exchanged between two ranks at a time, so that pairs will be even once tokens are.

In the end something makes tokens even: a request that is cut, or all decodes. A request in the place of as many of its
tokens adds its own pairs less theirs: one number for each, and those are balanced.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.whole.division import Division

# Pairs may be off the mean by 2%, a 50th; requests change ranks until all are within 1.5%.
_GOAL = 66
# Of each of two ranks, as many requests at most are tried against those of the other; and as many in couples where no single one does.
_MOST_TRIED, _MOST_IN_COUPLES = 48, 12


class Filler(NamedTuple):
    """What makes tokens even in the end. Each token of it counts for as many pairs."""

    token_part: int
    pair_part: int


class _Exchange(NamedTuple):
    """Requests of the rank that gives and of the rank that takes, and what moves from one to the other by it."""

    given: list[int]
    taken: list[int]
    gain: int


def even_out(division: Division, filler: Filler, least_room: list[int], most_room: list[int] | None = None) -> None:
    """Moves and swaps whole requests until pairs are even, or nothing brings them nearer to that.

    Args:
        division: what to change.
        filler: what will make tokens even.
        least_room: the tokens that each rank may lack, at least.
        most_room: likewise, at most; None for as many as there are.
    """
    work, num_ranks = division.work, len(division.room)
    # One more, for no request: number -1.
    gains = np.append(work.pair_part * filler.token_part - work.token_part * filler.pair_part, 0)
    lengths = np.append(work.tokens, 0)
    off = [
        (pairs - work.share) * filler.token_part - (tokens - work.share) * filler.pair_part
        for tokens, pairs in zip(division.token_load, division.pair_load, strict=True)
    ]
    goal = work.share * filler.token_part // _GOAL
    for _ in range(4 * num_ranks):
        order = sorted(range(num_ranks), key=off.__getitem__)
        most, least = order[-1], order[0]
        if off[most] <= goal and off[least] >= -goal:
            return
        worst_gives = off[most] > -off[least]
        for partner in order[:4] if worst_gives else order[:-5:-1]:
            giver, taker = (most, partner) if worst_gives else (partner, least)
            # How many tokens may leave the giver.
            lower, upper = least_room[giver] - division.room[giver], division.room[taker] - least_room[taker]
            if most_room is not None:
                lower, upper = max(lower, division.room[taker] - most_room[taker]), min(upper, most_room[giver] - division.room[giver])
            found = _find_exchange(division, (giver, taker), off[giver] - off[taker], (gains, lengths), (lower, upper))
            if found is not None:
                break
        else:
            return
        off[giver] -= found.gain
        off[taker] += found.gain
        for requests, source, target in ((found.given, giver, taker), (found.taken, taker, giver)):
            for request in requests:
                division.move(request, source, target)


def _find_exchange(
    division: Division, ranks: tuple[int, int], gap: int, of_requests: tuple[IntArray, IntArray], bounds: tuple[int, int]
) -> _Exchange | None:
    """Requests of the giver, of the taker, or both, whose exchange about halves the gap; None without any."""
    if gap <= 0:
        return None
    (gains, lengths), (lower, upper) = of_requests, bounds
    given, taken = ((division.rank_of == rank).nonzero()[0] for rank in ranks)
    for sets_of in (_singles, _couples) if division.work.is_few else (_singles,):
        givens, takens = sets_of(given, gains), sets_of(taken, gains)
        swapped = _of_sets(gains, givens)[:, None] - _of_sets(gains, takens)
        moved = _of_sets(lengths, givens)[:, None] - _of_sets(lengths, takens)
        missed = np.where((moved >= lower) & (moved <= upper), np.abs(2 * swapped - gap), gap)
        row, column = divmod(int(missed.argmin()), len(takens))
        # What gains next to nothing would go on for long.
        if 20 * int(missed[row, column]) < 19 * gap:
            of_giver, of_taker = ([request for request in each.tolist() if request >= 0] for each in (givens[row], takens[column]))
            return _Exchange(of_giver, of_taker, int(swapped[row, column]))
    return None


_NONE = np.array([-1])


def _widest(requests: IntArray, gains: IntArray, most: int) -> IntArray:
    """At most some of the requests, those that change the most."""
    if len(requests) <= most:
        return requests
    return requests[(-np.abs(gains[requests])).argsort(kind="stable")[:most]]


def _singles(requests: IntArray, gains: IntArray) -> IntArray:
    """``[s, 1]`` none or one of the requests; -1 is none."""
    return np.concatenate([_widest(requests, gains, _MOST_TRIED), _NONE])[:, None]


def _of_sets(values: IntArray, sets: IntArray) -> IntArray:
    """The sum of the values of each set."""
    sums: IntArray = values[sets[:, 0]] if sets.shape[1] == 1 else values[sets].sum(axis=1)
    return sums


def _couples(requests: IntArray, gains: IntArray) -> IntArray:
    """``[s, 2]`` none, one or two of the requests."""
    some = np.concatenate([_widest(requests, gains, _MOST_IN_COUPLES), _NONE])
    first, second = _pairs_of(len(some))
    return np.concatenate([np.stack([some[first], some[second]], axis=1), [[-1, -1]]])


@lru_cache(maxsize=_MOST_IN_COUPLES + 1)
def _pairs_of(many: int) -> tuple[IntArray, IntArray]:
    """Of so many numbers each two, the lesser first."""
    first, second = np.triu_indices(many, 1)
    return first, second
