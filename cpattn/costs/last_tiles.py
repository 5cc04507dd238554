"""When the last tiles of launches end whose programs take tiles in turn: a few tiles more than programs are a round more."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpattn.costs.hop_spans import RankSpans
from cpattn.costs.tile_costs import FloatArray, TileCosts
from cpattn.device_tables import IntArray
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
    items = many * (problem.q_heads // groups // costs.pack)
    is_few = (items > costs.multiprocessors) & (items <= MOST_ROUNDS * costs.multiprocessors)
    if asked is not None:
        is_few &= asked[stays].any(axis=0)
    for form in is_few.any(axis=-1).nonzero()[0] if stays else ():
        found[:, form] = until_last_of_form(spans, begins, many[form], is_few[form], form, problem, costs, groups, over_pages)
    return found


def until_last_of_form(
    spans: RankSpans,
    begins: IntArray,
    tiles: IntArray,
    few: npt.NDArray[np.bool_],
    form: int,
    problem: Problem,
    costs: TileCosts,
    groups: int,
    over_pages: bool,
) -> FloatArray:
    """``[kernels, ranks]`` of the form of that number: of ranks that have ``few`` tiles, given how many each has."""
    sees, tokens = spans.k_len > 0, int(costs.tokens[form, 0])
    if not (few.all() and sees.all()):
        taken = (few.repeat(np.diff(begins, append=len(sees))) & sees).nonzero()[0]
        spans = RankSpans._make([column[taken] for column in spans])
    blocks, ends = _blocks_of_tiles(spans, tokens, costs.block_n, problem.window)
    # A line of each rank, whose tiles follow each other.
    of_rank = tiles[few][:, None]
    is_tile = np.arange(of_rank.max()) < of_rank
    heads = problem.q_heads // groups // int(costs.pack[form, 0])
    found = np.zeros((len(costs.kernels), len(few)))
    for number, kernel in enumerate(costs.kernels):
        if kernel.stays:
            cost = costs.last[number, form]
            of_tiles = (blocks + kernel.tile) * cost[tokens]
            # The last one of a span has its rest.
            of_tiles[ends - 1] = (blocks[ends - 1] + kernel.tile) * cost.take((spans.q_len - 1) % tokens + 1)
            work = np.zeros(is_tile.shape, dtype=np.int64)
            work[is_tile] = of_tiles
            alone = costs.rates(problem, groups, over_pages)[1][number, 0, 0]
            found[number, few] = makespan(work, heads, costs.multiprocessors) * alone
    return found


def _blocks_of_tiles(spans: RankSpans, tokens: int, block_n: int, window: int | None) -> tuple[IntArray, IntArray]:
    """The key blocks that each tile of spans visits, one after another, and where the tiles of each span end."""
    many = -(-spans.q_len // tokens)
    ends = many.cumsum()
    # A full tile's last query sees so many, and so would that of a span's last tile, whose queries see all keys.
    sees = np.arange(tokens, tokens * (int(ends[-1]) + 1), tokens)
    sees += (spans.diagonal - 1 - tokens * (ends - many)).repeat(many)
    keys = np.minimum(sees, spans.k_len.repeat(many))
    if window is not None:
        # Of the first query's window.
        keys -= np.maximum(sees - (tokens - 1) - window, 0) // block_n * block_n
        keys = np.maximum(keys, 0)
    return -(-keys // block_n), ends
