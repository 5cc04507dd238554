"""What a layer's attention over a layout takes on the slowest rank, in query-key pairs, transfers included: a coarse form of
:func:`cpattn.estimate`, in integers.

Short chunks are slow, as they fill tiles badly; cut requests have keys to send; and a rank must not be given much more than others.
"""

from __future__ import annotations

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.laid_out import LaidOut, RankChunks
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import View
from cpattn.metadata.pair_costs import FULL, Messages, PairCosts
from cpattn.problem import Problem


def attention_pairs(laid_out: LaidOut, problem: Problem, costs: PairCosts) -> list[int]:
    """Of each kernel, in its own pairs."""
    length, before, _ = laid_out.chunks
    if not len(length):
        return [0] * len(costs.parts)
    # Keys within the windows of a chunk's queries.
    seen = before if problem.window is None else np.minimum(before, problem.window)
    reading = (seen + length) * costs.read
    loads, longest = _loads(laid_out.chunks, reading, costs, problem.window, 1)
    slowest = np.maximum(loads, longest).min(axis=1)
    # Tiles of half as many rows are for launches that wait for their longest tile, whichever heads share one.
    waits = np.all(np.any(longest > loads, axis=2), axis=1)
    if waits.any():
        of_halves = np.maximum(*_loads(laid_out.chunks, reading, costs, problem.window, 2)).min(axis=1)
        slowest = np.where(waits[:, None], np.minimum(slowest, of_halves), slowest)
    if problem.expands:
        # Whose queries see a latent expands it.
        view = laid_out.view if problem.window is None else View.of(laid_out.plan, problem.window)
        slowest = slowest + costs.expanded[:, 0] * (view.prefix + view.new)
    of_kernels: list[int] = slowest.max(axis=1).tolist()
    return of_kernels


def _loads(chunks: RankChunks, reading: IntArray, costs: PairCosts, window: int | None, halves: int) -> tuple[IntArray, IntArray]:
    """``[kernels, packs, cp_size]`` what the tiles of each rank take together, and the longest of them, if they have 1/halves of the rows
    of full ones."""
    length, before, bounds = chunks
    tile = costs.tiles[halves - 1]
    full = (length - 1) // tile
    # The first tiles see all keys before them, and each a tile more; from some on a window bounds what they see.
    growing = full if window is None else np.clip((window + tile - before) // tile, 0, full)
    keys = growing * (before + (growing + 1) * tile // 2) + full * costs.beside
    seen = before + length
    if window is not None:
        keys += (full - growing) * (window + tile)
        seen = np.minimum(seen, window + tile)
    seen = seen + costs.beside
    of_half_full = seen * costs.half_full // FULL
    if halves > 1:
        longest = of_half_full
        pairs = halves * tile * (keys + seen) * costs.half_full // FULL
    else:
        is_half_full = 2 * (length - full * tile) <= tile
        last = np.where(is_half_full, of_half_full, seen)
        longest = np.where(is_half_full & (full == 0), last, seen)
        pairs = tile * (keys + last)
    ends = np.zeros((*pairs.shape[:-1], len(length) + 1), dtype=np.int64)
    np.maximum(pairs, reading).cumsum(axis=-1, out=ends[..., 1:])
    at_bounds = ends.take(bounds, axis=-1)
    loads = at_bounds[..., 1:] - at_bounds[..., :-1]
    begins, holds = bounds[:-1], bounds[1:] > bounds[:-1]
    if holds.all():
        return loads, np.maximum.reduceat(longest, begins, axis=-1) * costs.tile_key
    most = np.zeros_like(loads)
    most[..., holds] = np.maximum.reduceat(longest, begins[holds], axis=-1) * costs.tile_key
    return loads, most


def transfer_pairs(laid_out: LaidOut, problem: Problem, costs: PairCosts, attention: list[int]) -> list[int]:
    """Of each kernel, in its own pairs, with an attention of so many: what of an all-gather's messages and copies that does not hide; or,
    where prefixes would be copied, what a ring takes more. The same of every partition where all keys travel anyway."""
    plan = laid_out.plan
    if not is_counted(plan, problem, costs):
        return [0] * len(costs.parts)
    received, rows = laid_out.received(problem.window, costs.reads_peers), laid_out.rows
    # They crowd while they read the largest request, and have drifted apart then.
    crowd = received * int(plan.extend_lens.max(initial=0))

    def of_kernel(messages: Messages, beside: int) -> int:
        if not received and not plan.num_prefix_tokens:
            # All is attended to where it lies.
            return 0
        if messages.in_place or not laid_out.view.prefix.any():
            return gathered(messages, beside, 0)
        # Hop by hop prefixes are not copied: they, a rank's own keys, and those of each other rank.
        hops = plan.cp_size if received else 1
        by_hops = hops * (messages.hop + rows * messages.merged)
        if received:
            by_hops += received * messages.shifted + (plan.cp_size - 1) * messages.shift
        return min(gathered(messages, beside, int(laid_out.view.prefix.max())), by_hops)

    def gathered(messages: Messages, beside: int, copied: int) -> int:
        if not received:
            beside_cached = laid_out.put if messages.in_place else int(laid_out.view.new.max())
            return (copied + beside_cached * bool(laid_out.view.prefix.any())) * messages.copied
        # Where others' rows come late a rank's own are put in order alone, or those that it cannot read as they lie; else they are packed,
        # and all of them put in order.
        if messages.comes_late:
            copied += laid_out.put if messages.in_place else rows
        else:
            copied += rows + int(laid_out.view.new.max())
        travels = received * messages.received + crowd * messages.crowded // plan.num_tokens
        travels -= min(travels, beside) * messages.hidden // 100
        return travels + copied * messages.copied + messages.message

    return list(map(of_kernel, costs.messages, attention))


def is_counted(plan: Layout, problem: Problem, costs: PairCosts) -> bool:
    """Whether what travels hangs on the partition. Over collectives a bucket's messages have its size, whatever the batch."""
    has_sizes_of_bucket = problem.fixed and not costs.reads_peers
    return not (plan.cp_size == 1 or plan.sharded or has_sizes_of_bucket or problem.cache == "paged")


def least_pairs(plan: Layout, problem: Problem, costs: PairCosts, cuts: bool) -> list[int]:
    """Of each kernel, in its own pairs, what any layout of the plan's batch takes at least, with tiles that are full: work that is shared
    evenly and, of a request of two tokens or more, a message; or, without ``cuts``, the largest request on a rank of its own."""
    tokens, cp_size = plan.num_tokens, plan.cp_size
    if problem.window is not None or not tokens:
        return [0] * len(costs.parts)
    extends = plan.extend_lens
    pairs = extends * plan.prefix_lens + extends * (extends + 1) // 2
    # A key less, for what is rounded down.
    beside = (costs.beside - 1).ravel().tolist()
    total = int(pairs.sum())
    least = [(total + tokens * more) // cp_size for more in beside]
    if not cuts:
        largest = int(pairs.argmax())
        of_largest, length = int(pairs[largest]), int(extends[largest])
        return [max(even, of_largest + length * more) for even, more in zip(least, beside, strict=True)]
    if is_counted(plan, problem, costs) and int(extends.max()) > 1:
        least = [even + messages.message for even, messages in zip(least, costs.messages, strict=True)]
    return least
