"""When the programs of a launch have computed all of its items, of which each takes the next one as soon as it is done."""

from __future__ import annotations

from math import gcd

import numpy as np
import numpy.typing as npt

# With more items a program, what the last ones do longer than others is less than an eighth of the whole, and mostly a part of that.
MOST_ROUNDS = 8
# A third of the programs takes an item each at once, of those that are done first. One by one it takes ten times as long, and differs by
# 0.2% in the mean.
_PARTS = 3


def makespan(costs: npt.NDArray[np.int64], each: int, programs: int) -> npt.NDArray[np.float64]:
    """``[...]`` when all is done, of tiles with those costs ``[..., n]``, with ``each`` items of every tile.

    Programs take items in turn, the longest first. So it is no less than a mean program's load, and no less than the longest item; and no
    more than both together, as those that are done first take the longest items: none gets more than an item ahead of another. Where
    items are few, programs that get one more than others end last: 133 items that are alike take 132 programs twice as long as 132 do.

    >>> [float(makespan(np.array([5] * tiles), each=11, programs=132)) for tiles in (12, 13, 24)]
    [5.0, 10.0, 10.0]
    >>> float(makespan(np.array([5, 4, 3, 3, 3]), each=1, programs=2))  # 5 + 3, and 4 + 3 + 3
    10.0
    """
    # Items of a tile are alike, and so are programs, of which as many do the same as divide both, and what is taken at once.
    alike = gcd(each, programs, -(-programs // _PARTS))
    tiles, each, programs = costs.shape[-1], each // alike, programs // alike
    rounds = -(-tiles * each // programs)
    if not 1 < rounds <= MOST_ROUNDS:
        load = costs.sum(axis=-1) * (each / programs)
        return np.maximum(load, costs.max(axis=-1, initial=0))  # type: ignore[no-any-return]
    items = np.sort(costs, axis=-1)[..., ::-1].repeat(each, axis=-1)
    done = items[..., programs - 1 :: -1].copy()
    at_once = -(-programs // _PARTS)
    first_done = done[..., :at_once]
    for begin in range(programs, items.shape[-1] - at_once + 1, at_once):
        first_done += items[..., begin : begin + at_once]
        done.sort()
    left = (items.shape[-1] - programs) % at_once
    if left:
        first_done[..., :left] += items[..., -left:]
        done.sort()
    return done[..., -1].astype(np.float64)  # type: ignore[no-any-return]
