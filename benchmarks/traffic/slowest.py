"""Which ranks may take longest of a call, of those that are timed one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import cpattn
from cpattn.costs.launches import Launches
from cpattn.exchange.divided_heads import DividedHeads, busiest_share, shares_of
from cpattn.exchange.registry import find_strategy
from cpattn.metadata.layout import Layout
from cpattn.metadata.united import united_layout

# By how much more of something another rank must have for it to be looked at.
MORE = 1.02


def slowest_ranks(strategy: str, plan: cpattn.Plan, problem: cpattn.Problem, machine: cpattn.Machine) -> tuple[int, ...]:
    """The rank with the most query-key pairs; and, where they have more of it by over 2%, the one that reads the most keys, which takes the
    time of decodes, and the one that is estimated to take longest of both together.

    >>> import torch
    >>> plan = cpattn.plan([(0, 2048), (60_000, 1)], 2, partition="uncut")  # one rank has the prompt, the other the decode
    >>> problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 32, 8, 128, 128, cache="packed")
    >>> slowest_ranks("all_gather", plan, problem, cpattn.MACHINES["h100-nvlink"])
    (0, 1)

    Where ranks divide heads each of a group has all of its rows, and so the one with the most heads the most work: all alike, if these are
    even.
    """
    found = find_strategy(strategy)
    if not isinstance(found, DividedHeads):
        return _slowest(plan, problem, machine)
    size = found.group_size(plan)
    busiest = int(np.argmax([share.q_heads for share in shares_of(problem, size)]))
    of_groups = _slowest(united_layout(plan, size), busiest_share(problem, plan, size), machine)
    return tuple(group * size + busiest for group in of_groups)


def _slowest(plan: Layout, problem: cpattn.Problem, machine: cpattn.Machine) -> tuple[int, ...]:
    request, start, length, rank = plan.chunk_table
    keys = np.bincount(rank, plan.prefix_lens[request] + start + length, plan.cp_size)
    (hop,) = cpattn.STRATEGIES["all_gather"].schedule(problem, plan)
    seconds = Launches(plan, problem, machine).seconds(hop, machine.kernels[0])
    ranks: list[int] = []
    measures: tuple[NDArray[Any], ...] = np.array(plan.rank_pairs), keys, seconds
    for of_ranks in measures:
        if of_ranks.max() > MORE * of_ranks[ranks].max(initial=-1.0):
            ranks.append(int(of_ranks.argmax()))
    return tuple(ranks)
