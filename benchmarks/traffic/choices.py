"""What is timed over a batch of traffic: what ``auto`` takes, and every fixed choice that makes sense."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from peers import ours
from peers.ours import NO_MESSAGE
from peers.variants import Variant
from peers.work import Call, Heads, Work

import cpattn
from cpattn.costs.corrections import corrected
from cpattn.exchange.auto import auto_candidates
from traffic.batches import Batch
from traffic.slowest import slowest_ranks

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


class Timed(NamedTuple):
    """What is timed of the choices over a batch.

    Attributes:
        variants: by their names.
        of: each choice's, by name, of which the slowest counts.
    """

    variants: dict[str, Variant]
    of: dict[Choice, tuple[str, ...]]


def of_all_ranks() -> Timed:
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
    return Timed(found | {ONE_GPU: one_gpu()}, {choice: (str(choice),) for choice in CHOICES})


def one_gpu() -> Variant:
    """The whole batch on each GPU by itself."""
    return Variant(partial(ours.cp_attention, strategy="auto", transport="auto", backend="auto"), "one GPU", ranks=1)


def of_one_rank(batch: Batch, size: int, heads: Heads, machine: cpattn.Machine) -> Timed:
    """What each rank does that may be the slowest, by itself, without messages. Calls that are the same are timed once."""
    variants: dict[str, Variant] = {}
    names: dict[tuple[bytes, str, int], str] = {}
    of: dict[Choice, tuple[str, ...]] = {}
    for choice in (*FIXED, AUTO, AUTO_UNEVEN):
        plan = choice.plan(batch, size)
        strategy = strategy_of(choice, plan, batch, heads, machine)
        calls = [(plan_bytes(plan), strategy, rank) for rank in slowest_ranks(strategy, plan, problem_of(batch, plan.rows, heads), machine)]
        for call in calls:
            if call not in names:
                rank = call[-1]
                names[call] = f"{choice}, rank {rank}"
                make = partial(_one_rank, size=size, rank=rank, choice=choice, strategy=strategy)
                variants[names[call]] = Variant(make, "auto" if choice.is_auto else "fixed")
        of[choice] = tuple(names[call] for call in calls)
    return Timed(variants | {ONE_GPU: one_gpu()}, of)


def plan_bytes(plan: cpattn.Plan) -> bytes:
    """The same for plans that cut a batch alike."""
    return np.stack(plan.chunk_table).tobytes()


def _one_rank(work: Work, size: int, rank: int, choice: Choice, strategy: str) -> Call:
    mine = work.over(None, rank, size)
    return ours.cp_attention(mine, strategy, NO_MESSAGE, "auto", partition=choice.partition, token_cost=choice.token_cost)


def strategy_of(choice: Choice, plan: cpattn.Plan, batch: Batch, heads: Heads, machine: cpattn.Machine) -> str:
    """Of ``auto`` the one that its model takes between ranks that read each other's memory."""
    if not choice.is_auto:
        return choice.strategy
    problem = problem_of(batch, plan.rows, heads)
    names = {strategy.name for strategy in auto_candidates(problem, plan).groups[0]}
    ways = [one for one in _estimates(plan, problem, machine) if one.strategy in names and one.overlap == 1]
    return min(ways, key=lambda one: corrected(one.strategy, one.graph, one.host, as_graph=True)).strategy


def messages_us(strategy: str, backend: str, plan: cpattn.Plan, batch: Batch, heads: Heads, machine: cpattn.Machine) -> float:
    """What the model says of messages that attention does not hide, by the faster transport, with what is copied around them beyond what a
    rank by itself copies, as over collectives. Of a backend that it does not know, what it says of the fastest."""
    if plan.cp_size == 1:
        return 0.0
    ways = [one for one in _estimates(plan, problem_of(batch, plan.rows, heads), machine) if one.strategy == strategy and one.overlap == 1]
    ways = [one for one in ways if one.backend == backend] or [one for one in ways if one.backend == ways[0].backend]
    by_itself = next(one for one in ways if one.transport == "collectives")
    return 1e6 * (ways[0].exposed + ways[0].moves - by_itself.moves)


@lru_cache(maxsize=64)
def _estimates(plan: cpattn.Plan, problem: cpattn.Problem, machine: cpattn.Machine) -> cpattn.Estimates:
    """All ways, the fastest first. Choices have plans in common."""
    return cpattn.estimate(plan, problem, machine)
