"""When a ring's ranks compute and send, by a simple model: a schedule to draw, not a forecast.

Computing takes time in proportion to query-key pairs, the same on every rank. A transfer begins when both its ends are
ready and takes the same time at every hop, since messages are of one size. A rank goes on to the next hop when it has
computed this one, has sent its message on and has received the next: what :mod:`cpattn.exchange.ring` does where all keys go around.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cpattn.device_tables import IntArray
from cpattn.errors import PlanError
from cpattn.exchange.ring import prefix_hop, shard_hop
from cpattn.exchange.schedule import hop_pairs, sends
from cpattn.metadata.plan import Plan
from cpattn.problem import Problem

_MOST_RANKS, _LONGEST_TRANSFER = 256, 10**6


class Stretch(NamedTuple):
    """From ``begin`` to ``end`` a rank is busy at its ``hop`` with the keys that are those of rank ``owner``."""

    rank: int
    hop: int
    owner: int
    begin: float
    end: float


class RingSchedule(NamedTuple):
    """Times in query-key pairs.

    Attributes:
        computing: for each rank and hop, its attention over the keys at hand (in hop 0 also over the cached prefix).
        sending: for each rank and hop but the last, its message to the next rank.
        end: when the last rank is done.
        transfer: what a transfer was taken to last, in hops of attention.
    """

    plan: Plan
    computing: tuple[Stretch, ...]
    sending: tuple[Stretch, ...]
    end: float
    transfer: float

    @property
    def busy(self) -> float:
        """The share of the time in which a rank computes, on average; 1.0 if there is nothing to do."""
        return sum(self.plan.rank_pairs) / (self.plan.cp_size * self.end) if self.end else 1.0


def ring_schedule(plan: Plan, transfer: float = 0.5) -> RingSchedule:
    """The schedule of a ring over this plan.

    Args:
        transfer: how long a transfer takes, where 1 is what a hop's attention takes on average.

    Raises PlanError if ``transfer`` is negative or beyond a million, or the plan has more than 256 ranks.
    """
    if not 0 <= transfer <= _LONGEST_TRANSFER:
        raise PlanError(
            f"transfer={transfer}; it must be at least 0: the time of a transfer, in hops of attention, {_LONGEST_TRANSFER:,} at most"
        )
    cp_size = plan.cp_size
    if cp_size > _MOST_RANKS:
        raise PlanError(
            f"a ring over {cp_size} ranks has as many hops, too many to show; {_MOST_RANKS} ranks at most: a smaller cp_size shows the "
            "same pattern"
        )
    pairs = _pairs_by_hop(plan)
    transfer_time = transfer * sum(plan.rank_pairs) / cp_size**2 if plan.rows else 0.0
    computing: list[Stretch] = []
    sending: list[Stretch] = []
    begins = [0.0] * cp_size
    for hop in range(cp_size):
        ready = []
        for rank in range(cp_size):
            owner = (rank - hop) % cp_size
            work = float(pairs[hop][rank])
            computing.append(Stretch(rank, hop, owner, begins[rank], begins[rank] + work))
            ready.append(begins[rank] + work)
        if hop + 1 == cp_size:
            return RingSchedule(plan, tuple(computing), tuple(sending), max(ready), transfer)
        for rank in range(cp_size):
            receiver = (rank + 1) % cp_size
            begin = max(begins[rank], begins[receiver])
            sending.append(Stretch(rank, hop, (rank - hop) % cp_size, begin, begin + transfer_time))
            for end in (rank, receiver):
                ready[end] = max(ready[end], begin + transfer_time)
        begins = ready
    raise AssertionError("a plan has at least one rank")


def _pairs_by_hop(plan: Plan) -> list[IntArray]:
    """``[cp_size]`` what each rank computes in each hop of a ring; prefixes that lie on every rank, in the first."""
    problem = Problem(torch.device("cpu"), torch.bfloat16, rows=plan.rows, q_heads=1, kv_heads=1, head_dim=1, v_head_dim=1)
    before, pairs = np.zeros(plan.cp_size, dtype=np.int64), []
    nothing = sends(problem, plan, 0)
    for hop in (*prefix_hop(problem, plan), *(shard_hop(problem, plan, 0, keys, nothing) for keys in range(plan.cp_size))):
        if hop.keys == "prefix":
            before = hop_pairs(plan, hop)
        else:
            pairs.append(before + hop_pairs(plan, hop))
            before = np.zeros_like(before)
    return pairs
