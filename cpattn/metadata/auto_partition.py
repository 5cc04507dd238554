"""Partition ``auto``: the one of ``whole`` and ``zigzag`` whose slowest rank is estimated to take less for a layer's attention. Where
it is known what the rest of a model pays for a token, ``uncut`` is one more.

All is counted in query-key pairs, in integers, so that every rank finds the same: a pair of all query heads is the unit of time. It
is a coarse form of :func:`cpattn.estimate`, which takes ten times as long. Short chunks are slow, as they fill tiles badly; cut
requests have keys to send; and a rank must not be given much more than others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from cpattn.device_tables import IntArray
from cpattn.errors import OptionError, shown
from cpattn.machine import Machine, find_machine
from cpattn.metadata.batch import MAX_TOKENS, is_integer
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import View, lacking_rows
from cpattn.metadata.partition import REMAINDERS
from cpattn.metadata.problem_checks import check_is_problem, check_problem
from cpattn.problem import Problem

AUTO = "auto"
# What it chooses from; of equal ones the first, which cuts less.
CANDIDATES = ("whole", "zigzag")
# Uneven in tokens, so that it needs to be known what a token costs.
UNEVEN = "uncut"
# Taken where nobody says what is asked for: the shapes that figures in the documentation are for.
USUAL = Problem(torch.device("cuda"), torch.bfloat16, rows=0, q_heads=32, kv_heads=8, head_dim=128, v_head_dim=128)
USUAL_MACHINE = "h100-nvlink"

# Of :mod:`cpattn.kernels.tile_shapes`, for heads of 128 on Hopper: (query, head) rows and keys of tiles.
_TILE_ROWS, _TILE_KEYS = 128, 128
# A tile that is at most half full costs such a part of a full one, in tenths, by :func:`cpattn.kernels.tiles.block_costs`.
_HALF_FULL = 7

P = TypeVar("P", bound=Layout)


class PairCosts(NamedTuple):
    """What a call's steps cost, each in query-key pairs of all heads.

    Attributes:
        received: of the K and V of a token that come from another rank, as far as attention does not hide it; crowded: so much more
            where all ranks read the same rank's; copied: that are copied on a rank; read: that a launch reads, for queries that are so few
            that this takes the time; expanded: of a latent that is expanded to them.
        message: of a message of no bytes.
        tile: what a tile costs beside its key blocks, in keys.
        tile_key: of a key of the longest tile, while the rest of the machine waits for it.
        packs: how many query heads may share a tile.
        reads_peers: whether ranks read of each other's memory what they need; comes_late: whether that comes while the attention runs.
        in_place: whether packed prefixes are read where they lie.
        seconds: of a pair.
    """

    received: int
    crowded: int
    copied: int
    read: int
    expanded: int
    message: int
    tile: int
    tile_key: int
    packs: tuple[int, ...]
    reads_peers: bool
    comes_late: bool
    in_place: bool
    seconds: float

    @classmethod
    def of(cls, problem: Problem, machine: Machine, cp_size: int) -> PairCosts:
        """On a machine, by its first kernel."""
        kernel = machine.kernels[0]
        pair = 2 * problem.q_heads * (problem.head_dim + problem.v_head_dim) / kernel.flops
        peers = machine.link("peer_memory", cp_size)
        link = peers or machine.link("collectives", cp_size)
        assert link is not None  # every machine has collectives
        reads_where_they_lie = not problem.v_in_k and not problem.expands
        comes_late = peers is not None and kernel.waits_for_keys and reads_where_they_lie
        group = problem.q_heads // problem.kv_heads
        exposed = problem.key_bytes * (1 - link.hides_late * comes_late)
        crowding = 0.0 if link.from_one is None else max(0.0, (cp_size - 1) / link.from_one - 1 / link.gather)

        def pairs(seconds: float) -> int:
            return max(1, round(seconds / pair))

        return cls(
            received=pairs(exposed / link.gather),
            crowded=round(exposed * crowding / pair),
            copied=pairs(2 * problem.key_bytes / machine.copy),
            read=pairs(problem.attended.key_bytes / kernel.read),
            expanded=0 if problem.latent_dim is None else pairs(_products_of_key(problem) / kernel.flops),
            message=pairs(link.latency + link.late_latency * comes_late),
            tile=kernel.tile * _TILE_KEYS,
            tile_key=max(1, _TILE_ROWS * machine.multiprocessors // problem.q_heads),
            packs=(1,) if group == 1 or group > _TILE_ROWS else (1, group),
            reads_peers=peers is not None,
            comes_late=comes_late,
            in_place=kernel.reads_prefix and reads_where_they_lie,
            seconds=pair,
        )


def _products_of_key(problem: Problem) -> int:
    """As if each head took a product with all of a latent's row."""
    return 2 * (problem.latent_dim or 0) * problem.q_heads * (problem.head_dim + problem.v_head_dim)


class AutoChoice(NamedTuple):
    """What ``auto`` goes by, checked."""

    problem: Problem
    machine: Machine
    token_cost: int | None = None

    @classmethod
    def of(cls, problem: Any, machine: Any, token_cost: Any = None) -> AutoChoice:
        """Of what a caller says; None for what is usual. Raises OptionError, HeadCountError or UnknownNameError."""
        if token_cost is not None and (not is_integer(token_cost) or not 0 <= token_cost <= MAX_TOKENS):
            raise OptionError(
                f"token_cost={shown(token_cost)}; pass what the rest of a layer pays for a token, in query-key pairs: an integer from 0 to "
                f"{MAX_TOKENS}"
            )
        if problem is None:
            problem = USUAL
        check_is_problem(problem)
        check_problem(problem)
        machine = find_machine(USUAL_MACHINE if machine is None else machine)
        return cls(problem, machine, None if token_cost is None else int(token_cost))

    def names(self, sharded: bool) -> tuple[str, ...]:
        """Of what it chooses from. With a sharded cache one rank would hold a whole request's tokens, and decode it alone."""
        return CANDIDATES if self.token_cost is None or sharded else (*CANDIDATES, UNEVEN)

    def cheapest(self, plans: Sequence[P]) -> P:
        """The plan whose call takes the least; of equal ones the first."""
        problem, costs = self.problem, PairCosts.of(self.problem, self.machine, plans[0].cp_size)
        best, *others = plans
        least = self.pairs(best, costs)
        for plan in others:
            # What it sends need not be known of one that takes longer without it.
            pairs = _attention(plan, problem, costs) + self._tokens(plan)
            if pairs < least:
                pairs += _transfer(plan, problem, costs)
            if pairs < least:
                best, least = plan, pairs
        return best

    def pairs(self, plan: Layout, costs: PairCosts) -> int:
        """What a layer takes on the slowest rank, transfers included."""
        return _attention(plan, self.problem, costs) + _transfer(plan, self.problem, costs) + self._tokens(plan)

    def _tokens(self, plan: Layout) -> int:
        return (self.token_cost or 0) * max(plan.rank_tokens)


def explain_partition(plan: Layout, problem: Problem, machine: Machine | str | None = None) -> str:
    """What a plan's partition is, and what ``auto`` takes for its batch, with the microseconds of a layer that decide."""
    if plan.cp_size == 1:
        return f"{plan.kind}: there is one rank"
    choice = AutoChoice.of(problem, machine)
    costs = PairCosts.of(problem, choice.machine, plan.cp_size)
    made = [replace(plan, partition=name, remainder=REMAINDERS[0]) for name in CANDIDATES]
    times = ", ".join(f"{choice.pairs(one, costs) * costs.seconds * 1e6:,.0f} us with {one.kind}" for one in made)
    taken = choice.cheapest(made).kind
    return f"{plan.kind}; 'auto' takes {taken}: a layer's attention on {choice.machine.name} is estimated at {times}"


def _attention(plan: Layout, problem: Problem, costs: PairCosts) -> int:
    request, start, length, rank = plan.chunk_table
    before = plan.prefix_lens[request] + start
    # Keys within the windows of a chunk's queries.
    window = MAX_TOKENS if problem.window is None else problem.window
    reading = (np.minimum(before, window) + length) * costs.read
    expanding: IntArray = np.zeros(plan.cp_size, dtype=np.int64)
    if costs.expanded:
        # Whose queries see a latent expands it.
        view = View.of(plan, problem.window)
        expanding = costs.expanded * (view.prefix + view.new)
    of_forms: list[IntArray] = []
    for halves in (1, 2):
        longest_tiles = 0
        for pack in costs.packs:
            tiles = _Tiles.of(length, before, max(1, _TILE_ROWS // (halves * pack)), window, halves, costs.tile)
            longest = np.zeros(plan.cp_size, dtype=np.int64)
            np.maximum.at(longest, rank, tiles.longest * costs.tile_key)
            loads = plan.by_rank.sums(np.maximum(tiles.pairs, reading))
            of_forms.append(np.maximum(loads, longest) + expanding)
            longest_tiles += int((longest > loads).any())
        if longest_tiles < len(costs.packs):
            # Tiles of half as many rows are for launches that wait for their longest tile.
            break
    # Kernels take the form that suits the batch of their rank.
    return int(np.min(of_forms, axis=0).max(initial=0))


class _Tiles(NamedTuple):
    """What tiles of so many queries make of each chunk; int64 ``[c]``.

    Attributes:
        pairs: that they compute; longest: the keys of the last one, which has the most. Both as of full tiles.
    """

    pairs: IntArray
    longest: IntArray

    @classmethod
    def of(cls, length: IntArray, before: IntArray, tile: int, window: int, halves: int, beside: int) -> _Tiles:
        """Of chunks of which ``before`` keys come before their own; tiles have 1/halves of the rows of full ones, and cost ``beside`` keys
        more than they see."""
        full = (length - 1) // tile
        rest = length - full * tile
        most, overhead = window + tile, _TILE_KEYS // 2 + beside
        # The first tiles see all keys before them, and each a tile more; from some on a window bounds what they see.
        growing = full if window == MAX_TOKENS else np.clip((most - before) // tile, 0, full)
        keys = growing * (before + (growing + 1) * tile // 2) + (full - growing) * most + full * overhead
        seen = np.minimum(before + length, most) + overhead
        if halves > 1:
            return cls(halves * tile * (keys + seen) * _HALF_FULL // 10, seen * _HALF_FULL // 10)
        is_half_full = 2 * rest <= tile
        last = seen * np.where(is_half_full, _HALF_FULL, 10) // 10
        return cls(tile * (keys + last), np.where(is_half_full & (full == 0), last, seen))


def _transfer(plan: Layout, problem: Problem, costs: PairCosts) -> int:
    """What is received and copied before the attention, of an all-gather; the same of every partition where all keys travel anyway."""
    if plan.cp_size == 1 or plan.sharded or problem.fixed or problem.cache == "paged":
        return 0
    lacking, view = lacking_rows(plan, problem.window), View.of(plan)
    prefix, new = int(view.prefix.max(initial=0)), int(view.new.max())
    copied = 0 if costs.in_place else prefix
    if not lacking.most:
        return (copied + new * (prefix > 0)) * costs.copied
    everything = (plan.cp_size - 1) * plan.rows
    received = everything if lacking.is_nearly_all(everything) else lacking.most
    if costs.reads_peers:
        received = int(lacking.received.max())
    # Where others' rows come late a rank's own are put in order alone; else they are packed, and all of them put in order.
    copied += plan.rows if costs.comes_late else plan.rows + new
    # They crowd while they read the largest request, and have drifted apart then.
    crowding = received * costs.crowded * int(plan.extend_lens.max()) // plan.num_tokens
    return received * costs.received + crowding + copied * costs.copied + costs.message
