"""When the last tiles of launches end whose programs take tiles in turn: a few tiles more than programs are a round more."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpattn.costs.hop_spans import RankSpans
from cpattn.costs.tile_costs import FloatArray, TileCosts
from cpattn.device_tables import IntArray
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
    sees = spans.k_len > 0
    many = np.add.reduceat(-(-spans.q_len // costs.tokens) * sees, begins, axis=-1)
    heads = problem.q_heads // groups // costs.pack
    items = many * heads
    is_few = (items > costs.multiprocessors) & (items <= MOST_ROUNDS * costs.multiprocessors)
    if asked is not None:
        is_few &= asked[stays].any(axis=0)
    for form in is_few.any(axis=-1).nonzero()[0] if stays else ():
        few, of_few = is_few[form], spans
        if not (few.all() and sees.all()):
            taken = (few.repeat(np.diff(begins, append=len(sees))) & sees).nonzero()[0]
            of_few = RankSpans._make([column[taken] for column in spans])
        tiles = TilesOfSpans.of(of_few, int(costs.tokens[form, 0]), costs.block_n, problem.window)
        # A line of each rank, whose tiles follow each other.
        of_rank = many[form, few][:, None]
        is_tile = np.arange(of_rank.max()) < of_rank
        for kernel in stays:
            work = np.zeros(is_tile.shape, dtype=np.int64)
            work[is_tile] = (tiles.blocks + costs.kernels[kernel].tile) * costs.last[kernel, form].take(tiles.tokens)
            alone = costs.rates(problem, groups, over_pages)[1][kernel, 0, 0]
            found[kernel, form, few] = makespan(work, int(heads[form, 0]), costs.multiprocessors) * alone
    return found
