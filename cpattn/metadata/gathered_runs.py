"""The rows of all ranks, rank after rank, as runs of tokens: what tables of all of them are expanded from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.device_tables import Int32Array, IntArray, expand_runs_on_host
from cpattn.metadata.layout import Layout


class GatheredRuns(NamedTuple):
    """A run for each chunk, and for the padding after each rank's, which may be empty; int64 ``[c + cp_size]``.

    >>> import cpattn
    >>> runs = GatheredRuns.of(cpattn.plan([(4, 3)], cp_size=2), rows=2)
    >>> for rows in (runs.request(), runs.position(), runs.part(np.array([1, 0, 0]), first=False)):
    ...     print(rows.tolist())
    [0, 0, 0, -1]
    [4, 6, 5, -1]
    [-1, 6, 5, -1]

    Attributes:
        entry: of the chunk table; -1 for padding.
        of_request: the request of each; -1 for padding.
        begin: the absolute position of its first token; for padding what ends at -1.
        length: how many rows it has.
    """

    entry: IntArray
    of_request: IntArray
    begin: IntArray
    length: IntArray

    @classmethod
    def of(cls, plan: Layout, rows: int) -> GatheredRuns:
        """Of ranks that have so many rows each."""
        request, start, length, rank = plan.chunk_table
        order, ranks = plan.by_rank.order, np.arange(plan.cp_size)
        places, padding = np.arange(len(order)) + rank[order], plan.by_rank.bounds[1:] + ranks
        runs = np.full((4, len(order) + plan.cp_size), -1)
        runs[:, places] = order, request[order], (plan.prefix_lens[request] + start)[order], length[order]
        runs[3, padding] = rows - plan.by_rank.tokens
        runs[2, padding] = -runs[3, padding]
        return cls(*runs)

    def request(self) -> Int32Array:
        """Of each row; -1 on padding."""
        return expand_runs_on_host(self.of_request, self.length, int(self.length.sum()), step=0)

    def position(self) -> Int32Array:
        """The absolute position of each row; -1 on padding."""
        return self._not_below(self.begin, self.length)

    def part(self, head: IntArray, *, first: bool) -> Int32Array:
        """The same of the first tokens of each chunk alone, or of all others; -1 elsewhere.

        Args:
            head: how many the first are ``[c]``, of each entry of the chunk table.
        """
        # Padding has entry -1.
        heads = np.append(head, 0)[self.entry]
        tails = self.length - heads
        begins = (self.begin, -tails) if first else (-heads, self.begin + heads)
        return self._not_below(np.stack(begins, axis=1).ravel(), np.stack([heads, tails], axis=1).ravel())

    @staticmethod
    def _not_below(first: IntArray, length: IntArray) -> Int32Array:
        """Runs of which those that are to be -1 begin so far below it that they end there."""
        expanded = expand_runs_on_host(first, length, int(length.sum()))
        return np.maximum(expanded, -1, out=expanded)
