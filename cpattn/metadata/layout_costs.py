"""What a layer's attention over a layout takes on the slowest rank, in query-key pairs, transfers included: a coarse form of
:func:`cpattn.estimate`, in integers.

Short chunks are slow, as they fill tiles badly; cut requests have keys to send; and a rank must not be given much more than others.
"""

from __future__ import annotations

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.laid_out import LaidOut
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import View
from cpattn.metadata.pair_costs import Messages, PairCosts
from cpattn.metadata.tile_pairs import Launch, TilePairs
from cpattn.problem import Problem

# Tiles of one head are looked at where others end later than they might by more than such a part.
_MARGIN = 50


class Attention:
    """A layer's attention on the slowest rank; of each kernel, in its own pairs.

    Attributes:
        least: what it takes at least, if programs are done at the same time.
    """

    def __init__(self, laid_out: LaidOut, problem: Problem, costs: PairCosts) -> None:
        self._laid_out, self._problem, self._costs = laid_out, problem, costs
        self._launch = Launch.of(laid_out.chunks, problem.window, costs)
        self._forms = [TilePairs(self._launch, costs.leading)]
        (leading,) = self._forms
        self._slowest = leading.least
        # Tiles of half as many rows are for launches that wait for their longest tile.
        if (leading.least > leading.loads).any():
            halves = TilePairs(self._launch, costs.halves)
            self._forms.append(halves)
            self._slowest = np.minimum(leading.least, halves.least)
        self.least = self._of_slowest(self._slowest)

    def until_last(self) -> list[int]:
        """The same until the last tile ends, of kernels whose programs take tiles in turn."""
        slowest, unpacked = self._slowest.copy(), self._costs.unpacked
        for kernel in self._costs.stays:
            most = int(slowest[kernel].max(initial=0))
            leading, *others = self._forms
            found = leading.until_last(kernel, most)
            if unpacked is not None and int(found.max(initial=0)) - most > most // _MARGIN:
                others.append(TilePairs(self._launch, unpacked))
            for form in others:
                found = np.minimum(found, form.until_last(kernel, most, found))
            # A tile of one head may be half full where one that heads share is not: it counts for its rounds alone.
            slowest[kernel] = np.maximum(found, slowest[kernel])
        return self._of_slowest(slowest)

    def _of_slowest(self, pairs: IntArray) -> list[int]:
        if self._problem.expands:
            # Whose queries see a latent expands it.
            view = self._laid_out.view if self._problem.window is None else View.of(self._laid_out.plan, self._problem.window)
            in_view = view.prefix + view.new
            pairs = pairs + self._costs.expanded * in_view[in_view > 0]
        of_kernels: list[int] = pairs.max(axis=1, initial=0).tolist()
        return of_kernels


class Transfers:
    """An all-gather's messages and copies; or, where prefixes would be copied, what a ring takes more. The same of every partition where
    all keys travel anyway."""

    def __init__(self, laid_out: LaidOut, problem: Problem, costs: PairCosts) -> None:
        self._laid_out, self._costs, self._plan = laid_out, costs, laid_out.plan
        self._is_counted = is_counted(self._plan, problem, costs)
        self._received = laid_out.received(problem.window, costs.reads_peers) if self._is_counted else 0

    def beside(self, attention: list[int]) -> list[int]:
        """Of each kernel, in its own pairs, what does not hide behind an attention of so many."""
        if not self._is_counted:
            return [0] * len(self._costs.parts)
        return list(map(self._of_kernel, self._costs.messages, attention))

    def _of_kernel(self, messages: Messages, attention: int) -> int:
        laid_out, received, rows = self._laid_out, self._received, self._laid_out.rows
        if not received and not self._plan.num_prefix_tokens:
            # All is attended to where it lies.
            return 0
        if messages.in_place or not laid_out.view.prefix.any():
            return self._gathered(messages, attention, 0)
        # Hop by hop prefixes are not copied: they, a rank's own keys, and those of each other rank.
        hops = self._plan.cp_size if received else 1
        by_hops = hops * (messages.hop + rows * messages.merged)
        if received:
            by_hops += received * messages.shifted + (self._plan.cp_size - 1) * messages.shift
        return min(self._gathered(messages, attention, int(laid_out.view.prefix.max())), by_hops)

    def _gathered(self, messages: Messages, attention: int, copied: int) -> int:
        laid_out, received, plan = self._laid_out, self._received, self._plan
        if not received:
            beside_cached = laid_out.put if messages.in_place else int(laid_out.view.new.max())
            return (copied + beside_cached * bool(laid_out.view.prefix.any())) * messages.copied
        # Where others' rows come late a rank's own are put in order alone, or those that it cannot read as they lie; else they are packed,
        # and all of them put in order.
        if messages.comes_late:
            copied += laid_out.put if messages.in_place else laid_out.rows
        else:
            copied += laid_out.rows + int(laid_out.view.new.max())
        # They crowd while they read the largest request, and have drifted apart then.
        crowd = received * int(plan.extend_lens.max(initial=0))
        travels = received * messages.received + crowd * messages.crowded // plan.num_tokens
        travels -= min(travels, attention) * messages.hidden // 100
        return travels + copied * messages.copied + messages.message


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
