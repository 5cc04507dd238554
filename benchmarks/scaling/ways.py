"""The ways of making a call over a batch: on how many GPUs, by which partition, strategy, transport and backend."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from peers import ours
from peers.ours import NO_TRANSFER, PAGE_SIZE
from peers.variants import Kind, Variant
from peers.work import Heads

import cpattn
from cpattn.exchange.registry import able_strategies

# In place of a strategy: a rank's attention alone, on keys in order.
LAUNCH = "launch alone"
# A rate that long launches come near to, by which it is told what there is time for.
USUAL_FLOPS = 600e12


class Case(NamedTuple):
    """A batch, and what of it is timed.

    Attributes:
        partitions: over which every strategy is timed; with the others ``auto`` alone.
        with_auto: those others.
        sharded: whether each rank holds a share of every prefix, in pages.
        all_sizes: whether on fewer GPUs too, or on all of them only.
        sends_queries: whether strategies are timed that send queries and partial results. Of a long prompt these are several times
            its keys, and memory that ranks share for them stays.
    """

    batch: list[tuple[int, int]]
    heads: Heads
    partitions: tuple[str, ...] = ("zigzag",)
    with_auto: tuple[str, ...] = ()
    sharded: bool = False
    all_sizes: bool = True
    sends_queries: bool = True

    @property
    def flops(self) -> float:
        """Of the whole batch: two products of D multiply-adds for each head and each pair of a query and a key that it sees."""
        pairs = sum(extend * prefix + extend * (extend + 1) // 2 for prefix, extend in self.batch)
        return 4.0 * pairs * self.heads.query * self.heads.dim

    def plan(self, ranks: int, partition: str) -> cpattn.Plan:
        shards = ours.prefix_shards(self.batch, ranks) if self.sharded else None
        return cpattn.plan(self.batch, ranks, partition=partition, prefix_shards=shards)

    def problem(self, plan: cpattn.Plan) -> cpattn.Problem:
        heads = self.heads
        problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, heads.query, heads.kv, heads.dim, heads.dim)
        return replace(problem, cache="paged", page_size=PAGE_SIZE) if self.sharded else problem


class Way(NamedTuple):
    """How a call is made; it prints as a variant's name. A launch alone has no transport."""

    ranks: int
    partition: str
    strategy: str
    transport: str
    backend: str

    def __str__(self) -> str:
        choices = [self.strategy, self.transport, self.backend]
        if choices == ["auto"] * 3:
            choices = ["auto"]
        return ", ".join([f"{self.ranks} GPU{'s' * (self.ranks > 1)}", self.partition, *filter(None, choices)])

    @property
    def kind(self) -> Kind:
        if self.strategy == LAUNCH:
            return "launch"
        if self.transport == NO_TRANSFER:
            return "no transfer"
        return "auto" if self.strategy == "auto" else "fixed"

    def variant(self, case: Case) -> Variant:
        if self.strategy == LAUNCH:
            return Variant(partial(ours.launch, backend=self.backend, partition=self.partition), "launch", ranks=self.ranks)
        call = {"strategy": self.strategy, "transport": self.transport, "backend": self.backend, "partition": self.partition}
        make = partial(ours.cp_attention, **call, sharded=case.sharded)  # type: ignore[arg-type]
        return Variant(make, self.kind, str(self._replace(transport=NO_TRANSFER)), ranks=self.ranks)


def ways_of(case: Case, sizes: list[int], device_type: str) -> list[Way]:
    """Those first that matter most, as there may not be time for all: ``auto`` on every number of GPUs, then the launches alone on
    all of them, then fixed choices there, and on fewer.

    On fewer GPUs, and of those that send queries where no cache is sharded, the backend is left to ``"auto"``.
    """
    is_gpu = device_type == "cuda"
    backends = ours.backends_here(device_type)
    transports = ("peer_memory", "collectives") if is_gpu else ("collectives",)
    top = max(sizes)
    used = sizes if case.all_sizes else [top]
    split = sorted({size for size in used if size > 1}, reverse=True)
    found: list[Way] = [Way(1, "zigzag", "auto", "auto", "auto")] if 1 in used else []
    for transport in ("auto", NO_TRANSFER):
        found += [Way(size, partition, "auto", transport, "auto") for size in split for partition in case.partitions]
    launched = [Way(top, partition, LAUNCH, "", backend) for partition in case.partitions for backend in backends]
    found += launched
    for size in split:
        for partition in case.partitions:
            plan = case.plan(size, partition)
            for strategy in able_strategies(case.problem(plan), plan):
                sends_queries = strategy.name.startswith("pass_q")
                if sends_queries and not case.sends_queries:
                    continue
                chosen = backends if size == top and (case.sharded or not sends_queries) else ("auto",)
                found += [
                    Way(size, partition, strategy.name, transport, backend)
                    for backend in chosen
                    for transport in (*transports, NO_TRANSFER)
                ]
        if size == top:
            found += [Way(top, partition, "auto", transport, "auto") for partition in case.with_auto for transport in ("auto", NO_TRANSFER)]
    # On one GPU all partitions are the same.
    fewer = [way._replace(ranks=size) for size in used if size < top for way in launched]
    found += [way._replace(partition="zigzag") if way.ranks == 1 else way for way in fewer]
    return list(dict.fromkeys(found))


def expected_seconds(case: Case, variant: Variant) -> float:
    """That a call takes at least, about."""
    return case.flops / (variant.ranks * USUAL_FLOPS)
