"""When the last tiles of launches end whose programs take tiles in turn: a few tiles more than programs are a round more."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpattn.costs.hop_spans import RankSpans
from cpattn.costs.tile_costs import FloatArray, TileCosts
from cpattn.device_tables import IntArray, exclusive_cumsum
from cpattn.kernels.tiles import TilesOfSpans
from cpattn.problem import Problem
from cpattn.rounds import MOST_ROUNDS, makespan


def until_last(
    spans: RankSpans,
    begins: IntArray,
    problem: Problem,
    costs: TileCosts,
    groups: int,
    over_pages: bool,
    asked: npt.NDArray[np.bool_] | None = None,
) -> FloatArray:
    """``[kernels, forms, ranks]`` seconds until the last tile ends, of spans by rank, where each rank's begin.

    0 where a rank has one round of tiles, or many; and of kernels whose programs do not stay: those were measured to take what their load
    and their longest tile take. Likewise where nobody has ``asked`` of any kernel, ``[kernels, forms, ranks]``.
    """
    found = np.zeros((len(costs.kernels), len(costs.forms), len(begins)))
    stays = [number for number, kernel in enumerate(costs.kernels) if kernel.stays]
    alone = costs.rates(problem, groups, over_pages)[1][:, 0, 0]
    sees = spans.k_len > 0
    many = np.add.reduceat(-(-spans.q_len // costs.tokens) * sees, begins, axis=-1)
    heads = problem.q_heads // groups // costs.pack
    rounds = -(-many * heads // costs.multiprocessors)
    is_few = (rounds > 1) & (rounds <= MOST_ROUNDS)
    if asked is not None:
        is_few &= asked[stays].any(axis=0)
    place = np.zeros(len(spans.rank), dtype=np.int64)
    place[begins[1:]] = 1
    place = place.cumsum()
    for form in is_few.any(axis=-1).nonzero()[0] if stays else ():
        taken = (is_few[form][place] & sees).nonzero()[0]
        of_few = RankSpans._make([column[taken] for column in spans])
        tiles = TilesOfSpans.of(of_few, int(costs.tokens[form, 0]), costs.block_n, problem.window)
        ranks = is_few[form].nonzero()[0]
        row = (is_few[form].cumsum() - 1)[place[taken]][tiles.span]
        column = np.arange(len(row)) - exclusive_cumsum(many[form, ranks])[row]
        work = np.zeros((len(ranks), int(many[form, ranks].max())), dtype=np.int64)
        for kernel in stays:
            work[row, column] = (tiles.blocks + costs.kernels[kernel].tile) * costs.last[kernel, form].take(tiles.tokens)
            found[kernel, form, ranks] = makespan(work, int(heads[form, 0]), costs.multiprocessors) * alone[kernel]
    return found
