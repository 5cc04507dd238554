"""When the programs of a launch have computed all of its items, of which each takes the next one as soon as it is done."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# With more items a program, what the last ones do longer than others is less than an eighth of the whole, and mostly a part of that.
MOST_ROUNDS = 8


def makespan(costs: npt.NDArray[np.int64], each: int, programs: int) -> npt.NDArray[np.float64]:
    """``[...]`` about when all is done, of tiles with those costs ``[..., n]``, with ``each`` items of every tile.

    Programs take items in turn, the longest first. So it is no less than a mean program's load, and no less than the longest item. Where
    items are few, programs that get one more than others end last: 133 items that are alike take 132 programs twice as long as 132 do.

    >>> [float(makespan(np.array([5] * tiles), each=11, programs=132)) for tiles in (12, 13, 24)]
    [5.0, 10.0, 10.0]
    >>> float(makespan(np.array([5, 4, 3, 3, 3]), each=1, programs=2))  # 5 + 3, and 4 + 3 + 3
    10.0
    """
    tiles = costs.shape[-1]
    rounds = -(-tiles * each // programs)
    load = costs.sum(axis=-1) * (each / programs)
    if not 1 < rounds <= MOST_ROUNDS:
        return np.maximum(load, costs.max(axis=-1, initial=0))  # type: ignore[no-any-return]
    ordered = np.zeros((*costs.shape[:-1], tiles + 1), dtype=np.float64)
    ordered[..., :tiles] = -np.sort(-costs, axis=-1)
    # What is missing in the last round takes no time.
    items = ordered.take(np.minimum(np.arange(rounds * programs) // each, tiles), axis=-1)
    items = items.reshape(*costs.shape[:-1], rounds, programs)
    # The first item of a round begins no later than a mean program has done those before it.
    before = items.sum(axis=-1).cumsum(axis=-1) / programs
    begun = np.maximum(items[..., 0, 0], (before[..., :-1] + items[..., 1:, 0]).max(axis=-1))
    if (begun <= load).all():
        return load  # type: ignore[no-any-return]
    # And all are done no later than if each takes one a round, who is done first the longest.
    done = items[..., 0, :]
    for number in range(1, rounds):
        done = np.sort(done, axis=-1) + items[..., number, :]
    return np.minimum(np.maximum(load, begun), done.max(axis=-1))  # type: ignore[no-any-return]
