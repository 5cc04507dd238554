"""What the steps of a call cost, in query-key pairs: the constants by which partition ``auto`` compares layouts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.machine import KernelCosts, Machine
from cpattn.problem import Problem

# Of :mod:`cpattn.kernels.tile_shapes`, for heads of 128 on Hopper: (query, head) rows and keys of tiles.
TILE_ROWS, TILE_KEYS = 128, 128
# What a tile costs that is at most half full, and one that is full, in tenths, by :func:`cpattn.kernels.tiles.block_costs`.
HALF_FULL, FULL = 7, 10
# A result in half precision and one in fp32 are read, and one is written.
_KERNELS_OF_MERGE, _BYTES_OF_MERGE = 2, 2 + 4 + 4
# A kernel's pairs are as many of the first one's, in such parts.
_PARTS = 1 << 20


class Messages(NamedTuple):
    """What keys and values cost that come from other ranks, and copies, by one kernel: each in its pairs.

    Attributes:
        received: of the K and V of a token that come from another rank; crowded: so much more where all ranks read the same rank's;
            copied: that are copied on a rank.
        message: of a message of no bytes.
        comes_late: whether they come while the attention runs; hidden: how much that hides of what comes beside it, in hundredths.
        in_place: whether packed prefixes are read where they lie, and own rows of requests that are whole on a rank.
        hop: of a launch more, over a part of the keys; merged: of a row of its result, which is merged; shifted: of the K and V of a
            token that come beside such launches; shift: of a message of those, of no bytes.
    """

    received: int
    crowded: int
    copied: int
    message: int
    comes_late: bool
    hidden: int
    in_place: bool
    hop: int
    merged: int
    shifted: int
    shift: int


class Form(NamedTuple):
    """How queries are cut into tiles.

    Attributes:
        tokens: of a full tile; of_full: of one with the most rows, which as many heads share.
        each: how many groups of heads there are, each with a tile of its own.
        is_half: whether it has half of the rows.
    """

    tokens: int
    of_full: int
    each: int
    is_half: bool


class PairCosts(NamedTuple):
    """By the kernels that may serve a call, each in query-key pairs of all heads as that kernel computes them. Arrays are
    ``[kernels, 1]``.

    Attributes:
        messages: of each kernel.
        beside: what a tile costs beside the keys that it sees, in keys: its own ones, in the mean, and to begin and end.
        half_full: what a tile costs that is at most half full, in tenths.
        read: of a key that a launch reads, for queries that are so few that this takes the time.
        expanded: of a latent that is expanded to keys and values.
        tile_key: of a key of the longest tile, while the rest of the machine waits for it; 0 where several programs share it.
        parts: of each kernel a pair in those of the first, in parts of 2**-20; overhead: of a launch, in pairs of the first.
        stays: the numbers of the kernels whose programs take tiles in turn; programs: how many there are.
        leading: the form of tiles that is never more work than others, as all heads that can share one. halves: the same with half of the
            rows; unpacked: a tile for each head, of which the last one may end earlier. None where that is the same.
        reads_peers: whether ranks read of each other's memory what they need.
        seconds: of a pair of the first kernel.
    """

    messages: tuple[Messages, ...]
    beside: IntArray
    half_full: IntArray
    read: IntArray
    expanded: IntArray
    tile_key: IntArray
    parts: tuple[int, ...]
    overhead: tuple[int, ...]
    stays: tuple[int, ...]
    programs: int
    leading: Form
    halves: Form
    unpacked: Form | None
    reads_peers: bool
    seconds: float

    @classmethod
    def of(cls, problem: Problem, machine: Machine, cp_size: int) -> PairCosts:
        """On a machine; worked out once for calls that are alike."""
        key = "pair costs", problem, cp_size
        found: PairCosts | None = machine.memo.get(key)
        return machine.memo.keep(key, cls._of(problem, machine, cp_size)) if found is None else found

    @classmethod
    def _of(cls, problem: Problem, machine: Machine, cp_size: int) -> PairCosts:
        readers = [kernel for kernel in machine.kernels if kernel.reads_pages(problem.page_size)]
        # As a call does, which takes no copy of pages where a kernel reads them.
        kernels = readers or list(machine.kernels)
        peers, group = machine.link("peer_memory", cp_size), problem.q_heads // problem.kv_heads
        pairs = [_seconds_of_pair(problem, kernel) for kernel in kernels]

        def column(values: list[int]) -> IntArray:
            return np.array(values, dtype=np.int64)[:, None]

        def by_kernel(seconds: list[float]) -> list[int]:
            return [_at_least_1(of_kernel / pair) for of_kernel, pair in zip(seconds, pairs, strict=True)]

        operations = 0 if problem.latent_dim is None else _products_of_key(problem)

        def form(rows: int) -> Form:
            pack = max(heads for heads in range(1, min(group, rows) + 1) if group % heads == 0)
            return Form(rows // pack, TILE_ROWS // pack, problem.q_heads // pack, rows < TILE_ROWS)

        leading = form(TILE_ROWS)
        tile_key = max(1, TILE_ROWS * machine.multiprocessors // problem.q_heads)
        return cls(
            messages=tuple(_messages(problem, machine, cp_size, *of) for of in zip(kernels, pairs, strict=True)),
            beside=column([TILE_KEYS // 2 + kernel.tile * TILE_KEYS for kernel in kernels]),
            half_full=column([HALF_FULL if kernel.least_rows < TILE_ROWS else FULL for kernel in kernels]),
            read=column(by_kernel([problem.attended.key_bytes / kernel.read for kernel in kernels])),
            expanded=column(by_kernel([operations / kernel.flops for kernel in kernels]) if operations else [0] * len(kernels)),
            tile_key=column([0 if kernel.splits else tile_key for kernel in kernels]),
            parts=tuple(round(_PARTS * pair / pairs[0]) for pair in pairs),
            overhead=tuple(round(kernel.overhead / pairs[0]) for kernel in kernels),
            stays=tuple(number for number, kernel in enumerate(kernels) if kernel.stays),
            programs=machine.multiprocessors,
            leading=leading,
            halves=form(TILE_ROWS // 2),
            unpacked=Form(TILE_ROWS, TILE_ROWS, problem.q_heads, False) if leading.each < problem.q_heads else None,
            reads_peers=peers is not None,
            seconds=pairs[0],
        )

    def fastest(self, pairs: list[int]) -> int:
        """Of what takes each kernel so many of its pairs, with its launch, the least, in pairs of the first one."""
        return min(
            (of_kernel * parts) // _PARTS + overhead for of_kernel, parts, overhead in zip(pairs, self.parts, self.overhead, strict=True)
        )


def _seconds_of_pair(problem: Problem, kernel: KernelCosts) -> float:
    paged = kernel.paged if kernel.reads_pages(problem.page_size) else 1.0
    return 2 * problem.q_heads * (problem.head_dim + problem.v_head_dim) / kernel.flops * paged


def _messages(problem: Problem, machine: Machine, cp_size: int, kernel: KernelCosts, pair: float) -> Messages:
    peers = machine.link("peer_memory", cp_size)
    link = peers or machine.link("collectives", cp_size)
    assert link is not None  # every machine has collectives
    reads_where_they_lie = not problem.v_in_k and not problem.expands
    comes_late = peers is not None and kernel.waits_for_keys and reads_where_they_lie
    crowding = 0.0 if link.from_one is None else max(0.0, (cp_size - 1) / link.from_one - 1 / link.gather)
    return Messages(
        received=_at_least_1(problem.key_bytes / link.gather / pair),
        crowded=round(problem.key_bytes * crowding / pair),
        copied=_at_least_1(2 * problem.key_bytes / machine.copy / pair),
        message=_at_least_1((link.latency_of_late if comes_late else link.latency) / pair),
        comes_late=comes_late,
        hidden=round(100 * link.hides_late * comes_late),
        in_place=kernel.reads_in_place and reads_where_they_lie,
        hop=_at_least_1((kernel.overhead + _KERNELS_OF_MERGE * machine.launch) / pair),
        merged=_at_least_1(problem.q_heads * problem.v_head_dim * _BYTES_OF_MERGE / machine.copy / pair),
        shifted=_at_least_1(problem.key_bytes * (1 - link.hides_shift) / link.shift / pair),
        shift=_at_least_1(link.latency_of_shift / pair),
    )


def _at_least_1(pairs: float) -> int:
    return max(1, round(pairs))


def _products_of_key(problem: Problem) -> int:
    """As if each head took a product with all of a latent's row."""
    return 2 * (problem.latent_dim or 0) * problem.q_heads * (problem.head_dim + problem.v_head_dim)
