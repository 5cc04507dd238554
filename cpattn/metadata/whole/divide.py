"""Partition ``whole``: each request whole on one rank, as far as that keeps ranks even.

In this order: tokens even to within one; query-key pairs within 2% of the mean; as few requests cut as possible. Several
divisions are made, with more requests cut each time, until one has even pairs and few enough cuts. A request that is cut is
cut by zigzag, whose runs at front and back are such that pairs come out even: :mod:`cpattn.metadata.whole.zigzag_cut`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.chunks import Chunks, pairs_of
from cpattn.metadata.whole.candidates import candidates
from cpattn.metadata.whole.work import BITS, Pieces, Work
from cpattn.metadata.whole.zigzag_cut import Share, cut_by_zigzag, in_halves

# More pieces than this are first cut into runs of equal lengths, which is quick, and left so where pairs are off by less
# than such a part.
_MANY_PIECES, _GOOD = 48, 200


def divide_whole(batch: IntArray, cp_size: int) -> Chunks:
    """The chunks of a batch ``[n, 2]`` over cp_size ranks; see the module."""
    extend = batch[:, 1]
    if cp_size == 1:
        held = extend.nonzero()[0]
        return Chunks(held, np.zeros_like(held), extend[held], np.zeros_like(held))
    share, more = divmod(int(extend.sum()), cp_size)
    best = _best(Work(batch, [share + (rank < more) for rank in range(cp_size)]))
    held = (best.rank_of >= 0).nonzero()[0]
    table = Chunks(held, np.zeros_like(held), extend[held], best.rank_of[held])
    # Within a request by start already.
    order = np.concatenate([held, best.cut.request]).argsort(kind="stable")
    return Chunks._make(np.concatenate(columns)[order] for columns in zip(table, best.cut, strict=True))


class _Tried(NamedTuple):
    """A division and how good it is: less is better, field by field.

    Attributes:
        uneven: 0 where pairs are within 2% of the mean, 1 within 4%, 2 within 8%, and so on.
        cuts: requests that are cut, though they are not larger than a share.
        off: the most that pairs are off the mean, in units of 2**-30.
        rank_of ``[n]``: the rank that has the whole request; -1 of others.
        cut: the chunks of requests that are cut.
    """

    uneven: int
    cuts: int
    off: int
    rank_of: IntArray
    cut: Chunks


def _best(work: Work) -> _Tried:
    """The best of several divisions, of which each is only made where those before are not good enough."""
    best: _Tried | None = None
    uneven = []
    for needless_at, make in candidates(work):
        if best is not None and not best.uneven and best.cuts <= needless_at:
            return best
        made = make()
        if made is None:
            continue
        if _must_be_uneven(work, *made):
            # Whatever is even is better, and cutting takes as long as dividing.
            uneven.append(made)
        else:
            best = _better(best, _judged(work, *made))
    if best is None or best.uneven:
        for made in uneven:
            best = _better(best, _judged(work, *made))
    assert best is not None
    return best


def _better(best: _Tried | None, tried: _Tried) -> _Tried:
    return tried if best is None else min(best, tried, key=lambda tried: tried[:3])


def _whole_loads(work: Work, rank_of: IntArray) -> IntArray:
    """The pairs of each rank's whole requests, and of those that no rank has whole."""
    loads = np.zeros(len(work.room) + 1, dtype=np.int64)
    np.add.at(loads, rank_of, work.pairs)
    return loads


def _must_be_uneven(work: Work, rank_of: IntArray, pieces: Pieces) -> bool:
    """Whether pairs of a rank are off by more than 2% however requests are cut."""
    if sum(map(len, pieces.values())) > _MANY_PIECES:
        return False
    loads = _whole_loads(work, rank_of)[:-1].tolist()
    changes = [0] * len(loads)
    for request, of_request in pieces.items():
        length, pairs = work.token_list[request], work.pair_list[request]
        for rank, tokens in of_request:
            loads[rank] += pairs * tokens // length
            # From the middle of the request to its end.
            changes[rank] += tokens * (length - tokens) // 2
    share = work.all_pairs // len(loads)
    # A little more than 2%, which rounding stays within.
    return any(49 * (abs(load - share) - change) > share for load, change in zip(loads, changes, strict=True))


def _judged(work: Work, rank_of: IntArray, pieces: Pieces) -> _Tried:
    sums = _whole_loads(work, rank_of)
    loads, cut, off = sums[:-1].tolist(), None, 0
    if sum(map(len, pieces.values())) > _MANY_PIECES:
        cut = in_halves(pieces)
        np.add.at(sums, cut.rank, pairs_of(cut, work.prefix))
        off = work.off(sums[:-1].tolist())
    if cut is None or off * _GOOD > 1 << BITS:
        cut = _zigzag(work, loads, pieces)
        off = work.off(loads)
    cuts = sum(len(pieces[request]) > 1 for request in pieces.keys() - set(work.oversized))
    return _Tried((50 * off >> BITS).bit_length(), cuts, off, rank_of, cut)


def _zigzag(work: Work, loads: list[int], pieces: Pieces) -> Chunks:
    """Cuts so that pairs come out as even as can be; ``loads``, the pairs of each rank, gets those of the pieces as well."""
    evens = {request: [work.even(request, tokens) for _, tokens in of_request] for request, of_request in pieces.items()}
    for request, of_request in pieces.items():
        for (rank, _), even in zip(of_request, evens[request], strict=True):
            loads[rank] += even
    runs, share = [], work.all_pairs // len(loads)
    # The longest last: it has the most to choose from.
    for _, request in sorted((work.token_list[request], request) for request in pieces):
        missing = [share - loads[rank] for rank, _ in pieces[request]]
        common = sum(missing) // len(missing)
        wanted = [
            Share(rank, tokens, even, even + lacks - common)
            for (rank, tokens), even, lacks in zip(pieces[request], evens[request], missing, strict=True)
        ]
        cut, got = cut_by_zigzag(int(work.prefix[request]), wanted)
        runs += [(request, *run) for run in cut]
        for (rank, _, even, _), pairs in zip(wanted, got, strict=True):
            loads[rank] += pairs - even
    return Chunks._make(np.array(runs, dtype=np.int64).reshape(-1, 4).T)
