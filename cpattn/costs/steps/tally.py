"""What one call of a strategy adds up to, in seconds: it attends, moves rows within a GPU, and sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from cpattn.attention.backend import Backend
from cpattn.costs.launches import Launches
from cpattn.exchange.schedule import Hop, Schedule
from cpattn.expansion import head_groups
from cpattn.keys import PREFIX_UNIT
from cpattn.machine import KernelCosts, LinkCosts, Machine
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import View
from cpattn.metadata.own_keys import rows_put
from cpattn.problem import Problem

# Kernels that expand a group of heads: of the keys, of the values, and of the part of a key that heads share.
_PRODUCTS = 3


class Choice(NamedTuple):
    """What is estimated.

    Attributes:
        link: what carries the messages; transport: its name.
        kernel: the backend's constants; attention: how long its launches take.
        results: partial results of each query, of the schedule.
    """

    plan: Layout
    problem: Problem
    machine: Machine
    schedule: Schedule
    transport: str
    link: LinkCosts
    backend: Backend
    kernel: KernelCosts
    attention: Launches
    results: int


@dataclass
class Tally:
    """What steps add up to, in seconds; and the launches."""

    choice: Choice
    compute: float = 0.0
    moves: float = 0.0
    transfer: float = 0.0
    exposed: float = 0.0
    host: float = 0.0
    launches: int = 0

    @property
    def seconds(self) -> float:
        """Of the device."""
        return self.compute + self.moves + self.exposed

    def move(self, nbytes: int, launches: int = 1) -> None:
        """Kernels that read and write so many bytes, both counted."""
        machine = self.choice.machine
        self.moves += launches * machine.launch + nbytes / machine.copy
        self.host += launches * machine.host_launch
        self.launches += launches

    def move_rows(self, rows: int, groups: int, launches: int = 1) -> None:
        """The K and V of so many tokens, of one of so many groups of heads; none without any."""
        if rows:
            self.move(2 * rows * self.choice.problem.key_bytes // groups, launches)

    def attend(self, *hops: Hop, groups: int = 1, over_pages: bool = False) -> list[float]:
        """The launches of hops between which ranks do not wait for each other, over one of so many groups of heads, in pages or not.
        Returns the seconds of each on the slowest rank."""
        choice = self.choice
        slowest = [choice.attention.slowest(hop, choice.kernel, groups, over_pages) for hop in hops]
        if len(hops) == 1:
            self.compute += slowest[0]
        else:
            seconds = [choice.attention.seconds(hop, choice.kernel, groups, over_pages) for hop in hops]
            self.compute += float(np.sum(seconds, axis=0).max(initial=0))
        self.host += choice.kernel.host * len(hops)
        self.launches += len(hops)
        return slowest if not choice.problem.expands else [one + self._expand(hop) for one, hop in zip(slowest, hops, strict=True)]

    def _expand(self, hop: Hop) -> float:
        """Seconds of expanding a hop's latents, as if each head took a product with all of a row: a group of heads at a time, each with a
        launch of its own."""
        choice, problem = self.choice, self.choice.problem
        assert problem.latent_dim is not None  # it expands
        num_keys = latents_of(choice.plan, problem, hop)
        groups, numbers = len(head_groups(problem, num_keys)), num_keys * problem.q_heads * (problem.head_dim + problem.v_head_dim)
        # What is written is written beside the products.
        seconds = numbers * max(2 * problem.latent_dim / choice.kernel.flops, problem.dtype.itemsize / choice.machine.copy)
        more = groups - 1
        seconds += groups * _PRODUCTS * choice.machine.launch + more * choice.kernel.overhead
        self.compute += seconds
        self.host += groups * _PRODUCTS * choice.machine.host_launch + more * choice.kernel.host
        self.launches += groups * _PRODUCTS + more
        return seconds

    def gather(self, nbytes: int, cover: float = 0.0, *, comes_late: bool = False) -> None:
        """An all-gather in which a rank receives so many bytes, beside so many seconds of attention, which may wait for each of them. One
        of parts that are needed takes no longer, and the host starts it as fast."""
        link, plan = self.choice.link, self.choice.plan
        seconds, latency, hides = link.gather_seconds(nbytes, plan.cp_size - 1, Most.of(plan).share), link.latency, link.hides_gather
        if comes_late and nbytes:
            seconds, latency, hides = seconds - latency + link.latency_of_late, link.latency_of_late, link.hides_late
        self._send(seconds, latency, link.host_gather, hides, cover)

    def gather_parts(self, nbytes: int, cover: float = 0.0) -> None:
        """The same of parts for one rank each, from point to point, which the host starts as slowly as shifts."""
        link = self.choice.link
        self._send(link.gather_seconds(nbytes), link.latency, link.host_shift, link.hides_gather if cover else 0.0, cover)

    def shift(self, nbytes: int, cover: float) -> None:
        """A message to the next rank, beside so many seconds of attention."""
        link = self.choice.link
        self._send(
            link.shift_seconds(nbytes, self.choice.plan.cp_size - 1), link.latency_of_shift, link.host_shift, link.hides_shift, cover
        )

    def _send(self, seconds: float, latency: float, host: float, hides: float, cover: float) -> None:
        if seconds:
            self.transfer += seconds
            self.exposed += seconds - hides * min(max(0.0, seconds - latency), cover)
            self.host += host
            self.launches += 1

    def cover(self, launches: Sequence[float]) -> float:
        """Seconds of attention beside which a message travels that sets out before these launches. One that kernels carry finds no
        multiprocessor free before the first of them ends, if its programs stay until then."""
        waits = self.choice.link.by_kernels and self.choice.kernel.stays
        return sum(launches[1:] if waits else launches)

    def add(self, other: Tally, count: int) -> None:
        """Adds what was tallied elsewhere, so many times."""
        self.compute += count * other.compute
        self.moves += count * other.moves
        self.transfer += count * other.transfer
        self.exposed += count * other.exposed
        self.host += count * other.host
        self.launches += count * other.launches


def latents_of(plan: Layout, problem: Problem, hop: Hop) -> int:
    """How many of them the queries of a hop see, on the rank that has the most; of the shards that visit it, no more than one has."""
    view = View.of(plan, None if problem.fixed else problem.window)
    if hop.keys == "prefix":
        return int(view.prefix.max())
    if hop.keys == "new":
        return int(view.new.max())
    both = int((view.prefix + view.new).max())
    if hop.keys == "all":
        return both
    shard = plan.largest_shard if plan.sharded else problem.rows
    return min(both, shard) if isinstance(hop.queries, int) else shard


class Most(NamedTuple):
    """What a plan has, in sums and maxima.

    Attributes:
        prefix, new, both: tokens that a rank has in view; see :class:`cpattn.metadata.needed_keys.View`.
        beyond_units: of prefixes the tokens that share a block with new ones.
        put: of a rank's own new tokens those that are put in order where the others are read as they lie; new_put: the same of all that it
            has in view.
        share: of the batch's new tokens those of its largest request: by what ranks, which all read keys in the same order, crowd at one
            of them. After the first request they have drifted apart.
    """

    prefix: int
    new: int
    both: int
    beyond_units: int
    put: int
    new_put: int
    share: float

    @classmethod
    def of(cls, plan: Layout) -> Most:
        """Worked out once."""
        found: Most | None = plan.memo.get("most")
        if found is None:
            view, share = View.of(plan), int(plan.extend_lens.max(initial=0)) / max(1, plan.num_tokens)
            prefix, new, both = (int(tokens.max()) for tokens in (view.prefix, view.new, view.prefix + view.new))
            beyond_units, put = int((plan.prefix_lens % PREFIX_UNIT).sum()), rows_put(plan)
            new_put = int((view.new - plan.rank_tokens + put).max())
            found = plan.memo.keep("most", cls(prefix, new, both, beyond_units, int(put.max()), new_put, share))
        return found


# What one call of a strategy does.
Steps: TypeAlias = Callable[[Choice], Tally]
