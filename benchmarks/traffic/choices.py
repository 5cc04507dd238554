"""What is timed over a batch of traffic: what ``auto`` takes, and every fixed choice that makes sense."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from peers import ours
from peers.ours import NO_TRANSFER
from peers.variants import Variant
from peers.work import Call, Heads, Work

import cpattn
from cpattn.costs.corrections import corrected
from cpattn.exchange.auto import auto_candidates
from traffic.batches import Batch

ONE_GPU = "one GPU"


class Choice(NamedTuple):
    """A partition and a strategy.

    Attributes:
        token_cost: as of :func:`cpattn.plan`.
    """

    partition: str
    strategy: str
    token_cost: int | None = None

    def __str__(self) -> str:
        cost = "" if self.token_cost is None else f", token_cost={self.token_cost}"
        return f"auto{cost}" if self.is_auto else f"{self.partition}, {self.strategy}"

    @property
    def is_auto(self) -> bool:
        return self.partition == "auto"

    @property
    def keeps_even(self) -> bool:
        """Whether ranks have as many tokens, to within one."""
        return self.partition != "uncut" and self.token_cost is None

    def plan(self, batch: Batch, size: int) -> cpattn.Plan:
        """Of the batch."""
        machine = ours.machine_here() if self.is_auto else None
        return cpattn.plan(batch, size, partition=self.partition, token_cost=self.token_cost, machine=machine)


AUTO = Choice("auto", "auto")
# A token costs nothing beside its attention, as none is timed: where one rank alone is faster, it is taken.
AUTO_UNEVEN = Choice("auto", "auto", token_cost=0)
FIXED = (
    Choice("zigzag", "all_gather"),
    Choice("zigzag", "ring"),
    Choice("zigzag", "ulysses"),
    Choice("whole", "all_gather"),
    Choice("whole", "ring"),
    Choice("uncut", "all_gather"),
    Choice("uncut", "ring"),
)
CHOICES = (AUTO, AUTO_UNEVEN, *FIXED)


def problem_of(batch: Batch, rows: int, heads: Heads) -> cpattn.Problem:
    """As calls over it ask for."""
    cache = "packed" if any(prefix for prefix, _ in batch) else None
    return cpattn.Problem(torch.device("cuda"), torch.bfloat16, rows, heads.query, heads.kv, heads.dim, heads.dim, cache=cache)  # type: ignore[arg-type]


def measured_variants() -> dict[str, Variant]:
    """Over all ranks, each with the backend and the transport that ``auto`` takes; and the whole batch on each GPU."""
    found = {
        str(choice): Variant(
            partial(
                ours.cp_attention,
                strategy=choice.strategy,
                transport="auto",
                backend="auto",
                partition=choice.partition,
                token_cost=choice.token_cost,
            ),
            "auto" if choice.is_auto else "fixed",
        )
        for choice in CHOICES
    }
    return found | {ONE_GPU: one_gpu()}


def one_gpu() -> Variant:
    """The whole batch on each GPU by itself."""
    return Variant(partial(ours.cp_attention, strategy="auto", transport="auto", backend="auto"), "one GPU", ranks=1)


def one_rank_variants(batch: Batch, size: int, heads: Heads, machine: cpattn.Machine) -> dict[str, Variant]:
    """What the rank with the most work does of each choice, with local copies in place of what others would send."""
    found = {}
    for choice in CHOICES:
        plan = choice.plan(batch, size)
        make = partial(
            _one_rank,
            size=size,
            rank=int(np.argmax(plan.rank_pairs)),
            choice=choice,
            strategy=strategy_of(choice, plan, batch, heads, machine),
        )
        found[str(choice)] = Variant(make, "auto" if choice.is_auto else "fixed")
    return found | {ONE_GPU: one_gpu()}


def _one_rank(work: Work, size: int, rank: int, choice: Choice, strategy: str) -> Call:
    mine = work.over(None, rank, size)
    return ours.cp_attention(mine, strategy, NO_TRANSFER, "auto", partition=choice.partition, token_cost=choice.token_cost)


def strategy_of(choice: Choice, plan: cpattn.Plan, batch: Batch, heads: Heads, machine: cpattn.Machine) -> str:
    """Of ``auto`` the one that its model takes between ranks that read each other's memory."""
    if not choice.is_auto:
        return choice.strategy
    problem = problem_of(batch, plan.rows, heads)
    names = {strategy.name for strategy in auto_candidates(problem, plan).groups[0]}
    ways = [one for one in _estimates(plan, problem, machine) if one.strategy in names and one.overlap == 1]
    return min(ways, key=lambda one: corrected(one.strategy, one.graph, one.host, as_graph=True)).strategy


def exposed_us(strategy: str, backend: str, plan: cpattn.Plan, batch: Batch, heads: Heads, machine: cpattn.Machine) -> float:
    """What the model says of the messages that attention does not hide, by the faster transport; of a backend that it does not know,
    what it says of the fastest."""
    if plan.cp_size == 1:
        return 0.0
    ways = [one for one in _estimates(plan, problem_of(batch, plan.rows, heads), machine) if one.strategy == strategy and one.overlap == 1]
    return 1e6 * next((one for one in ways if one.backend == backend), ways[0]).exposed


@lru_cache(maxsize=64)
def _estimates(plan: cpattn.Plan, problem: cpattn.Problem, machine: cpattn.Machine) -> cpattn.Estimates:
    """All ways, the fastest first. Choices have plans in common."""
    return cpattn.estimate(plan, problem, machine)
