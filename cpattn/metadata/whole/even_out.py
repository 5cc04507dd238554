"""Whole requests exchanged between two ranks at a time, so that pairs will be even once tokens are.

In the end something makes tokens even: a request that is cut, or all decodes. A request in the place of as many of its
tokens adds its own pairs less theirs: one number for each, and those are balanced.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import combinations
from operator import add
from typing import NamedTuple, Protocol

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
    """Requests of the rank that gives and of the rank that takes, and the pairs that move from one to the other by it."""

    given: tuple[int, ...]
    taken: tuple[int, ...]
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
    off = [
        (pairs - work.share) * filler.token_part - (tokens - work.share) * filler.pair_part
        for tokens, pairs in zip(division.token_load, division.pair_load, strict=True)
    ]
    goal = work.share * filler.token_part // _GOAL
    moves: _Moves = _FewMoves(division, filler) if work.is_few else _ManyMoves(division, filler)
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
            found = moves.exchange(giver, taker, off[giver] - off[taker], lower, upper)
            if found is not None:
                break
        else:
            return
        off[giver] -= found.gain
        off[taker] += found.gain
        for requests, source, target in ((found.given, giver, taker), (found.taken, taker, giver)):
            for request in requests:
                division.move(request, source, target)
        moves.forget(giver, taker)


class _Moves(Protocol):
    """What may leave each rank, remembered until something does."""

    def exchange(self, giver: int, taker: int, gap: int, lower: int, upper: int) -> _Exchange | None:
        """What the giver gives for what the taker gives, so that the gap is about halved; None without any.

        From ``lower`` to ``upper`` more tokens leave the giver than come.
        """

    def forget(self, giver: int, taker: int) -> None:
        """Ranks whose requests are others now."""


class _ManyMoves:
    """One request at a time, in arrays."""

    def __init__(self, division: Division, filler: Filler) -> None:
        work = division.work
        self._rank_of = division.rank_of
        # One more, for none of the requests.
        self._none = len(work.tokens)
        self._gains = np.zeros(self._none + 1, dtype=np.int64)
        self._gains[:-1] = work.pair_part * filler.token_part - work.token_part * filler.pair_part
        self._lengths = np.zeros(self._none + 1, dtype=np.int64)
        self._lengths[:-1] = work.tokens
        self._is_there = np.ones(self._none + 1, dtype=bool)
        self._of_rank: dict[int, tuple[IntArray, IntArray, IntArray]] = {}

    def exchange(self, giver: int, taker: int, gap: int, lower: int, upper: int) -> _Exchange | None:
        if gap <= 0 or upper < lower:
            return None
        (given, doubled, lengths), (taken, other_doubled, other_lengths) = self._of(giver), self._of(taker)
        missed = np.abs(doubled[:, None] - (other_doubled + gap))
        # As numbers without a sign, those below the lower bound are above all others.
        above = ((lengths - lower)[:, None] - other_lengths).view(np.uint64)
        missed[above > upper - lower] = gap
        row, column = divmod(int(missed.argmin()), len(taken))
        if not _is_worth(int(missed[row, column]), gap):
            return None
        of_giver, of_taker = ((int(request),) if request < self._none else () for request in (given[row], taken[column]))
        return _Exchange(of_giver, of_taker, int(doubled[row] - other_doubled[column]) // 2)

    def forget(self, giver: int, taker: int) -> None:
        self._of_rank.pop(giver)
        self._of_rank.pop(taker)

    def _of(self, rank: int) -> tuple[IntArray, IntArray, IntArray]:
        """Requests and none, twice what each gains, and their tokens."""
        if rank not in self._of_rank:
            np.equal(self._rank_of, rank, out=self._is_there[:-1])
            requests = self._is_there.nonzero()[0]
            if len(requests) > _MOST_TRIED + 1:
                widest = (-np.abs(self._gains[requests[:-1]])).argsort(kind="stable")[:_MOST_TRIED]
                requests = requests[np.concatenate([widest, [-1]])]
            self._of_rank[rank] = requests, 2 * self._gains[requests], self._lengths[requests]
        return self._of_rank[rank]


class _Move(NamedTuple):
    """Requests that may leave a rank together, none among them: what they gain in pairs, and their tokens."""

    gain: int
    length: int
    requests: tuple[int, ...]


class _FewMoves:
    """One request at a time or, where none will do, two; in lists, as ranks have hardly any."""

    def __init__(self, division: Division, filler: Filler) -> None:
        self._division, self._filler = division, filler
        self._of_rank: dict[tuple[int, int], list[_Move]] = {}

    def exchange(self, giver: int, taker: int, gap: int, lower: int, upper: int) -> _Exchange | None:
        if gap <= 0:
            return None
        for at_once in (1, 2):
            found = _halving(self._of(giver, at_once), self._of(taker, at_once), gap, lower, upper)
            if found is not None:
                return found
        return None

    def forget(self, giver: int, taker: int) -> None:
        self._of_rank = {key: moves for key, moves in self._of_rank.items() if key[0] not in (giver, taker)}

    def _of(self, rank: int, at_once: int) -> list[_Move]:
        """By gain, moves of so many requests at most, 1 or 2."""
        if (rank, at_once) not in self._of_rank:
            self._of_rank[rank, at_once] = self._made(rank) if at_once == 1 else _with_couples(self._of(rank, 1))
        return self._of_rank[rank, at_once]

    def _made(self, rank: int) -> list[_Move]:
        work, (token_part, pair_part) = self._division.work, self._filler
        moves = [
            _Move(work.pair_parts[request] * token_part - work.token_parts[request] * pair_part, work.token_list[request], (request,))
            for request in (self._division.rank_of == rank).nonzero()[0].tolist()
        ]
        return sorted([_Move(0, 0, ()), *moves])


def _with_couples(moves: list[_Move]) -> list[_Move]:
    """Adds each two of those that change the most."""
    singles = sorted((move for move in moves if move.requests), key=lambda move: -abs(move.gain))[:_MOST_IN_COUPLES]
    together = [_Move(*map(add, one, other)) for one, other in combinations(singles, 2)]
    return sorted([*moves, *together])


def _halving(givens: list[_Move], takens: list[_Move], gap: int, lower: int, upper: int) -> _Exchange | None:
    """The exchange whose gain is nearest to half the gap, of moves by gain."""
    best, found, gains = gap, None, [taken.gain for taken in takens]
    for gain, length, given in givens:
        wanted = 2 * gain - gap
        middle = bisect_left(gains, wanted / 2)
        # From there on both ways, what comes first and leaves tokens within bounds is the nearest.
        for ats in (range(middle, len(gains)), range(middle - 1, -1, -1)):
            for at in ats:
                missed = abs(2 * gains[at] - wanted)
                if missed >= best:
                    break
                if lower <= length - takens[at].length <= upper:
                    best, found = missed, _Exchange(given, takens[at].requests, gain - gains[at])
                    break
    return found if _is_worth(best, gap) else None


def _is_worth(missed: int, gap: int) -> bool:
    """Whether an exchange leaves enough less of a gap: what gains next to nothing would go on for long."""
    return 20 * missed < 19 * gap
