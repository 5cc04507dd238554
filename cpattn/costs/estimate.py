"""What each way of making a call would cost on a machine: ``cpattn.estimate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch

from cpattn.attention.backend import Backend
from cpattn.attention.registry import BACKENDS
from cpattn.byte_sizes import in_words
from cpattn.costs.launches import Launches
from cpattn.costs.steps.of_strategies import STEPS, tally_of
from cpattn.costs.steps.tally import Choice
from cpattn.errors import OptionError, PrefixError, UnknownNameError, UnsupportedError, shown
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.divided_heads import DividedHeads
from cpattn.exchange.hybrid import ACROSS, hybrid
from cpattn.exchange.registry import strategies_for
from cpattn.exchange.resident import RESIDENT
from cpattn.exchange.schedule import alignments, bytes_sent, num_results
from cpattn.exchange.strategy import Strategy
from cpattn.exchange.two_level import TwoLevel, two_level
from cpattn.machine import TRANSPORTS, KernelCosts, Machine, find_machine
from cpattn.metadata.batch import is_integer
from cpattn.metadata.draw import text_table
from cpattn.metadata.layout import Layout
from cpattn.metadata.problem_checks import check_is_problem, check_problem
from cpattn.problem import Problem

# Groups of KV heads that an all-gather may be split into, where they divide the heads.
_OVERLAPS = (1, 2, 4, 8)
_WIDEST = 256


@dataclass(frozen=True)
class Estimate:
    """One way of making a call, and what it costs the slowest rank. Times are in seconds.

    Attributes:
        strategy, transport, overlap, backend: the way.
        compute: attention launches.
        moves: copies within a GPU: packing, putting in order, merging.
        transfer: messages; exposed: what of them is not hidden by attention.
        host: of the host, for an eager call.
        bytes_sent: by the rank that sends the most.
        launches: kernels on the device.
    """

    strategy: str
    transport: str
    overlap: int
    backend: str
    compute: float
    moves: float
    transfer: float
    exposed: float
    host: float
    bytes_sent: int
    launches: int

    @property
    def graph(self) -> float:
        """Seconds of a call in a CUDA graph."""
        return self.compute + self.moves + self.exposed

    @property
    def eager(self) -> float:
        """Seconds of a call among others that are made one after another: the device's or the host's, whichever is longer."""
        return max(self.graph, self.host)


class Estimates(Sequence[Estimate]):
    """Estimates of all ways, the fastest as a CUDA graph first; equal ones by name. It prints as a table.

    Attributes:
        machine: its name.
        passed_over: why other ways cannot serve the call, by strategy and by backend.
    """

    def __init__(self, estimates: Sequence[Estimate], machine: str, passed_over: dict[str, str]) -> None:
        self._estimates = sorted(estimates, key=_order)
        self.machine = machine
        self.passed_over = passed_over

    @overload
    def __getitem__(self, index: int) -> Estimate: ...
    @overload
    def __getitem__(self, index: slice) -> list[Estimate]: ...
    def __getitem__(self, index: int | slice) -> Estimate | list[Estimate]:
        return self._estimates[index]

    def __len__(self) -> int:
        return len(self._estimates)

    def __iter__(self) -> Iterator[Estimate]:
        return iter(self._estimates)

    def __repr__(self) -> str:
        return "\n".join([f"on {self.machine}; times in us", text_table(*as_table(self), left=(0, 1, 3))])


def as_table(estimates: Sequence[Estimate]) -> tuple[list[str], list[list[str]]]:
    """A header and lines of text; times are in us."""
    header = ["strategy", "transport", "overlap", "backend", "graph", "eager", "compute", "moves", "exposed", "transfer", "host"]
    lines = []
    for one in estimates:
        seconds = one.graph, one.eager, one.compute, one.moves, one.exposed, one.transfer, one.host
        times = [f"{value * 1e6:,.1f}" for value in seconds]
        lines.append([one.strategy, one.transport, str(one.overlap), one.backend, *times, in_words(one.bytes_sent), str(one.launches)])
    return [*header, "sent", "launches"], lines


def estimate(plan: Layout, problem: Problem, machine: Machine | str) -> Estimates:
    """What each way of making a call would cost on a kind of machine, the fastest first. Pure, and the same on every rank.

    >>> import cpattn, torch
    >>> plan = cpattn.plan([(0, 32768)], cp_size=2)
    >>> problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, q_heads=32, kv_heads=8, head_dim=128, v_head_dim=128)
    >>> best = cpattn.estimate(plan, problem, "h200-nvlink")[0]
    >>> best.strategy, best.transport, 5e-3 < best.graph < 9e-3
    ('all_gather', 'peer_memory', True)

    It knows the library's own strategies, over collectives and the memory of peers; for a group over several hosts :func:`cpattn.hybrid`
    of as many ranks as a host has, or of a divisor of that, and :func:`cpattn.two_level`; an all-gather in one or more groups of heads; and
    the backends that the machine has constants for, whatever is installed here. Nothing is computed, and no GPU is needed.

    Args:
        plan: of the batch.
        problem: what the call asks for, in bf16 or fp16; its ``rows`` are those of the plan. ``device`` and ``overlap`` are ignored.
        machine: a :class:`Machine`, or the name of one of :data:`cpattn.MACHINES`.

    Returns:
        :class:`Estimates`, a sequence of :class:`Estimate`.

    Raises:
        UnknownNameError: there is no machine of that name, or no backend of one that it has constants for.
        OptionError: plan, problem or machine are something else, or the problem is of another plan, or asks for what no call could.
        PrefixError: the plan has prefixes, and the problem no cache.
        HeadCountError: query heads are no multiple of key/value heads.
        UnsupportedError: another dtype, head dims above 256, or nothing that the model knows can serve the call.
    """
    machine = find_machine(machine)
    _check_backends(machine)
    _check(plan, problem)
    refused: dict[str, str] = {}
    attention = Launches(plan, problem.attended, machine)
    found: list[Estimate] = []
    over_hosts = [] if plan.all_queries else _over_hosts(plan, machine)
    for strategy in (*strategies_for(plan).values(), *over_hosts):
        name = strategy.name
        reason = strategy.refusal(problem, plan) or why_unknown(strategy, problem)
        if reason:
            refused[name] = reason
            continue
        for kernel in machine.kernels:
            reason = _why_not(kernel, problem, plan, strategy, machine.capability[0])
            if reason:
                refused[f"{name}, {kernel.backend}"] = reason
            else:
                found += _of_backend(plan, problem, machine, strategy, kernel, attention)
    if not found:
        raise UnsupportedError(
            f"nothing that is known of {machine.name!r} can serve this call: " + "; ".join(f"{way}: {why}" for way, why in refused.items())
        )
    return Estimates(found, machine.name, refused)


def _over_hosts(plan: Layout, machine: Machine) -> Iterator[Strategy]:
    """Of a group over several hosts, where the ranks of a group that divides heads are on one; and an all-gather in two levels."""
    if plan.cp_size > machine.ranks_per_host:
        if plan.cp_size % machine.ranks_per_host == 0 and machine.ranks_per_host > 1:
            yield two_level(machine.ranks_per_host)
        for within in range(2, machine.ranks_per_host + 1):
            if plan.cp_size % within == 0 and machine.ranks_per_host % within == 0:
                yield from (hybrid(within, across) for across in ACROSS)


def _of_backend(
    plan: Layout, problem: Problem, machine: Machine, strategy: Strategy, kernel: KernelCosts, attention: Launches
) -> Iterator[Estimate]:
    """Over all transports and overlaps."""
    overlaps = _OVERLAPS if strategy.name == "all_gather" and plan.cp_size > 1 and not plan.sharded else (1,)
    for overlap in overlaps:
        if problem.kv_heads % overlap or (problem.expands and overlap > 1):
            continue
        split = replace(problem, overlap=overlap)
        schedule = strategy.schedule(split, plan)
        for transport in TRANSPORTS:
            link = machine.link(transport, plan.cp_size)
            if link is not None:
                backend = BACKENDS[kernel.backend]
                choice = Choice(plan, split, machine, schedule, transport, link, backend, kernel, attention, num_results(schedule))
                yield estimate_of(strategy, choice)


def estimate_of(strategy: Strategy, choice: Choice) -> Estimate:
    """One way of making a call, by a strategy that :func:`cpattn.costs.steps.of_strategies.steps_of` knows."""
    tally = tally_of(strategy, choice)
    return Estimate(
        strategy.name,
        choice.transport,
        choice.problem.overlap,
        choice.backend.name,
        tally.compute,
        tally.moves,
        tally.transfer,
        tally.exposed,
        choice.machine.host_call + tally.host,
        int(bytes_sent(choice.schedule).max(initial=0)),
        tally.launches,
    )


def _order(one: Estimate) -> tuple[int, str, str, int, str]:
    """To a nanosecond, so that what differs in the last bit only is equal."""
    return round(one.graph * 1e9), one.strategy, one.backend, one.overlap, one.transport


def why_unknown(strategy: Strategy, problem: Problem) -> str | None:
    """Why the model does not know how long a strategy takes, or None."""
    attends = strategy.across if isinstance(strategy, DividedHeads) else strategy
    if strategy.name not in STEPS and not isinstance(strategy, (DividedHeads, TwoLevel)):
        return "its steps are not estimated"
    if problem.window is not None and attends not in (ALL_GATHER, RESIDENT) and not isinstance(strategy, TwoLevel):
        return "with a window its hops are not estimated"
    return None


def _why_not(kernel: KernelCosts, problem: Problem, plan: Layout, strategy: Strategy, major: int) -> str | None:
    """Of the rules of a backend those that hold on any machine: what is installed here does not count."""
    attended = problem.attended
    anywhere: Backend = replace(
        BACKENDS[kernel.backend],
        device_types=None,
        unavailable=lambda: None,
        refuses=lambda problem: None,
        reads_pages=lambda problem: kernel.reads_pages(problem.page_size),
    )
    return anywhere.refuses_head_dims(problem.head_dim, problem.v_head_dim, major) or anywhere.why_not(
        attended, alignments(strategy.schedule(problem, plan))
    )


def _check_backends(machine: Machine) -> None:
    for kernel in machine.kernels:
        if kernel.backend not in BACKENDS:
            raise UnknownNameError(
                f"{machine.name!r} has constants for backend={shown(kernel.backend)}, which is unknown; its rules are needed: "
                f"choose one of {', '.join(map(repr, BACKENDS))}"
            )


def _check(plan: Any, problem: Any) -> None:
    if not isinstance(plan, Layout):
        raise OptionError(f"plan is a {type(plan).__name__}; pass what cpattn.plan(batch, cp_size) returns")
    check_is_problem(problem)
    if problem.rows != plan.rows:
        raise OptionError(f"problem.rows={shown(problem.rows)}, but the plan's ranks have {plan.rows}; pass rows=plan.rows")
    check_problem(problem)
    _check_cache(plan, problem)
    if problem.dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedError(f"problem.dtype={problem.dtype}; estimates are for torch.bfloat16 and torch.float16")
    for name in ("head_dim", "v_head_dim"):
        if getattr(problem, name) > _WIDEST:
            raise UnsupportedError(f"problem.{name}={shown(getattr(problem, name))}; estimates are for head dims up to {_WIDEST}")


def _check_cache(plan: Layout, problem: Problem) -> None:
    """Such that a call could have it."""
    if problem.cache not in (None, "packed", "paged"):
        raise OptionError(f"problem.cache={shown(problem.cache)}; it must be 'packed', 'paged' or None")
    if problem.cache is None and plan.num_prefix_tokens:
        raise PrefixError(f"problem.cache=None, but the batch has {plan.num_prefix_tokens} prefix tokens; pass cache='packed' or 'paged'")
    size: Any = problem.page_size
    if problem.cache == "paged" and (not is_integer(size) or size < 1):
        raise OptionError(f"problem.page_size={shown(size)} with cache='paged'; pass the tokens of a page, an integer of at least 1")
    if problem.cache != "paged" and size is not None:
        raise OptionError(f"problem.page_size={shown(size)}, but there are no pages with cache={shown(problem.cache)}; leave it out")
