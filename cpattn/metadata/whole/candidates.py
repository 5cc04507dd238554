"""The divisions that partition ``whole`` tries, one after the other.

Those with few cuts come first:

1. Of several requests larger than a rank's share, each rank takes what it lacks, dense tokens and sparse ones
   (:mod:`cpattn.metadata.whole.share_out`); the others are placed whole, where that can come out at all
   (:mod:`cpattn.metadata.whole.completion`).
2. Requests larger than a rank's share are cut among as few ranks as can take them. Of the others the middling ones are
   dealt in turn; the largest and then the smallest are placed one by one, each where there is least yet (the rule of
   Graham, Bounds on Multiprocessing Timing Anomalies, 1969, for tokens and pairs in sum). In the end decodes make tokens
   even where no request is cut, and else the longest one that is. Before that, requests change ranks so that this will
   make pairs even as well.
3. As 2, with the largest of the others cut as well, and each cut one in a piece for every rank.
4. As 1, with more requests cut: those with the most pairs for their tokens, and those with the fewest.
5. As 3, with as many cut as in 4.
6. As 1, with all requests cut: pairs come out even whatever the batch, as far as whole tokens allow.
7. Where requests and ranks are few and whole tokens did not allow it, all divisions are looked at.

Where ranks are many, 2, 3 and 5 would take too long. Where all requests are decodes there is nothing to cut, and one division.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.whole.completion import may_come_out
from cpattn.metadata.whole.division import Division
from cpattn.metadata.whole.even_out import Filler, even_out
from cpattn.metadata.whole.few_requests import MOST_BINS, MOST_DIVISIONS, MOST_REQUESTS, FewRequests
from cpattn.metadata.whole.share_out import share_out
from cpattn.metadata.whole.work import BITS, Pieces, Work

# Requests that are placed one by one: so many of the largest, and of the smallest. Those between are dealt in turn before.
_LARGEST, _SMALLEST = 24, 16
# More ranks than this are many.
_MOST_RANKS = 16
# Where ranks share out cut requests, pairs may be off by such a part: somewhat more than 2%, as zigzag makes up for some.
_TOLERANCE = 30

# Each request's rank, -1 if it is cut, and the pieces of those; None where it has not come out.
Made = tuple[IntArray, Pieces] | None


def candidates(work: Work) -> Iterator[tuple[int, Callable[[], Made]]]:
    """Ways to divide, each with how many cuts, of requests not larger than a share, make it needless: that many or fewer."""
    num_ranks, num_prompts = len(work.room), len(work.prompts)
    most = min(num_ranks - 1, num_prompts)
    are_many = num_ranks > _MOST_RANKS
    if work.oversized or _may_need_no_cut(work):
        if len(work.oversized) > 1 or are_many:
            yield 0, partial(_completed, work)
        if not are_many:
            yield 0, partial(_placed, work, 0)
    if not len(work.oversized) + num_prompts:
        return
    if most and not are_many:
        yield 1, partial(_placed, work, 1)
    for further in (num_ranks // 4, most):
        if 1 < further <= most:
            yield further, partial(_shared_out, work, further)
    if most > 1 and not are_many:
        yield most, partial(_placed, work, most)
    yield num_prompts, partial(_all_shared_out, work)
    if len(work.tokens) <= MOST_REQUESTS and num_ranks <= MOST_BINS:
        few = FewRequests(work)
        for nth in range(MOST_DIVISIONS):
            yield num_prompts, partial(few.division, nth)


def _may_need_no_cut(work: Work) -> bool:
    """Without decodes and without a cut, tokens come out even where all lengths are alike, or by chance."""
    lengths = work.tokens[work.prompts]
    return bool(len(work.decodes) or len(lengths) <= _LARGEST or lengths.min() == lengths.max())


def _placed(work: Work, further: int) -> Made:
    """Cuts so many requests that are not larger than a share, keeps the others whole as far as they fit, and makes tokens even.

    Those larger than a share go to as few ranks as can be where no other is cut, and else to all.
    """
    division, cut = Division(work), work.oversized + work.prompts[:further].tolist()
    filler = max(cut, key=lambda request: (work.token_list[request], -request), default=None)
    if filler is not None:
        division.deal(work.decodes)
    for request in cut:
        if further:
            division.spread(request)
        else:
            division.level(request)
    prompts = work.prompts[further:]
    if len(prompts) > _LARGEST + _SMALLEST:
        division.deal(prompts[_LARGEST:-_SMALLEST])
        prompts = np.concatenate([prompts[:_LARGEST], prompts[-_SMALLEST:]])
    misfits = division.place(np.concatenate([prompts, np.array(division.make_room(filler), dtype=np.int64)]), filler)
    for request in misfits:
        division.fill_up(request, filler)
    if filler is not None:
        even_out(division, _filler(work, [filler]), [-tokens for tokens in division.cut[filler]])
        division.settle(filler)
    elif len(work.decodes):
        # Where several are cut already, the next division will do better by cutting one for this.
        if len(misfits) <= 1 or work.is_few:
            even_out(division, _filler(work, work.decodes), [0] * len(work.room))
        division.deal_into_rooms(work.decodes)
    if len(work.decodes) and not division.is_even():
        # Nothing fills up any more. What trades places now is of one length; or the odd token does.
        share = min(work.room)
        odd = [int(room > share) for room in work.room]
        even_out(division, Filler(1, 0), [any(odd) * (room - share - 1) for room in work.room], odd)
    return division.rank_of, division.pieces()


def _filler(work: Work, requests: IntArray | list[int]) -> Filler:
    return Filler(int(work.token_part[requests].sum()), int(work.pair_part[requests].sum()))


def _completed(work: Work) -> Made:
    """Cuts those alone that are larger than a share, if there are any; else decodes make tokens even."""
    # Of a single one there is nothing to choose, but its zigzag may still make pairs even.
    must_be_even = len(work.oversized) > 1
    if must_be_even and not may_come_out(work, work.prompts, _TOLERANCE):
        return None
    division = Division(work)
    if work.oversized:
        division.deal(work.decodes)
    if division.place(work.prompts):
        return None
    if work.oversized:
        return _complete(division, work.oversized, must_be_even)
    division.deal_into_rooms(work.decodes)
    return None if any(division.room) else (division.rank_of, {})


def _shared_out(work: Work, further: int) -> Made:
    """Cuts so many requests that are not larger than a share, so that ranks may take what they lack, be it dense or sparse."""
    by_gain = (work.pair_part - work.token_part)[work.prompts].argsort(kind="stable")
    is_cut = np.zeros(len(by_gain), dtype=bool)
    is_cut[by_gain[: further // 2]] = is_cut[by_gain[further // 2 - further :]] = True
    division = Division(work)
    division.deal(work.decodes)
    if division.place(work.prompts[~is_cut]):
        return None
    return _complete(division, work.oversized + work.prompts[is_cut].tolist())


def _all_shared_out(work: Work) -> Made:
    return _complete(Division(work), work.tokens.nonzero()[0].tolist(), must_be_even=False)


def _complete(division: Division, cut: list[int], must_be_even: bool = True) -> Made:
    """Cuts requests so that each rank gets what it still lacks."""
    work = division.work
    goals = [work.all_pairs * (work.share - load) >> BITS for load in division.pair_load]
    tolerance = work.all_pairs // (len(goals) * _TOLERANCE) if must_be_even else None
    pieces = share_out(work, cut, division.room, goals, tolerance)
    if pieces is None:
        return None
    # What is in one piece is not cut after all.
    for request in [request for request, of_request in pieces.items() if len(of_request) == 1]:
        division.rank_of[request] = pieces.pop(request)[0][0]
    return division.rank_of, pieces
