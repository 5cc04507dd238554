"""Cut requests shared out so that each rank gets as many tokens, and as many query-key pairs, as it lacks.

The density of a request is its pairs for each of its tokens. Each rank takes tokens of the sparsest requests that are left
and of the densest ones, so many of each that both sums come out. As long as what a rank lacks is no denser than all that is
left, nor sparser, there are such numbers: from the sparsest tokens alone to the densest alone, pairs change token by token.
The next rank goes on where this one stopped, so that a rank begins at most two requests which it does not end.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpattn.metadata.whole.work import BITS, Pieces, Work


def share_out(work: Work, requests: Sequence[int], room: list[int], goals: list[int], tolerance: int | None) -> Pieces | None:
    """Of each request ``(rank, tokens)`` of its pieces.

    Args:
        work: what the requests are of.
        requests: those to cut; their tokens are those of ``room``.
        room: the tokens that each rank lacks.
        goals: the pairs that each rank lacks.
        tolerance: the most that a rank's pairs may be off; None if they may be off by anything.

    Returns:
        The pieces, or None if that cannot be held.
    """
    ends, missed = _Ends(work, requests), 0
    pieces: Pieces = {}
    all_room, all_goals = sum(room), sum(goals)
    # Those that lack what is farthest from the mean come while there is most to choose from.
    for rank in sorted(range(len(room)), key=lambda rank: (-abs(goals[rank] * all_room - room[rank] * all_goals), rank)):
        taken, got = ends.take(room[rank], goals[rank] + missed)
        # What one rank had too much or too little by less than a token is not lost for those after it.
        missed += goals[rank] - got
        if tolerance is not None and abs(missed) > tolerance:
            return None
        for request, tokens in taken:
            pieces.setdefault(request, []).append((rank, tokens))
    return pieces


class _Ends:
    """Requests by density, of which tokens are taken from both ends."""

    def __init__(self, work: Work, requests: Sequence[int]) -> None:
        self._requests = sorted(requests, key=lambda request: ((work.pair_list[request] << BITS) // work.token_list[request], request))
        self._tokens = [work.token_list[request] for request in self._requests]
        self._pairs = [work.pair_list[request] for request in self._requests]
        self._left = list(self._tokens)
        self._first, self._last = 0, len(self._requests) - 1

    def take(self, tokens: int, goal: int) -> tuple[list[tuple[int, int]], int]:
        """Exactly so many tokens, with pairs as near to a goal as can be: ``(request, tokens)`` of each, and their pairs."""
        left, sparse, got = self._left, *self._sparsest(tokens)
        dense, at = [], self._last
        while sparse and got < goal:
            moved, got = self._replace(sparse, at, got, goal)
            if moved:
                dense.append((at, moved))
            if moved < left[at]:
                break
            at -= 1
        taken, requests = [], self._requests
        for at, part in (*sparse, *dense):
            left[at] -= part
            taken.append((requests[at], part))
        while self._first < self._last and not left[self._first]:
            self._first += 1
        while self._first < self._last and not left[self._last]:
            self._last -= 1
        return taken, got

    def _sparsest(self, tokens: int) -> tuple[list[tuple[int, int]], int]:
        taken, got, at, left = [], 0, self._first, self._left
        while tokens:
            part = left[at] if left[at] < tokens else tokens
            if part:
                taken.append((at, part))
                got += self._pairs[at] * part // self._tokens[at]
                tokens -= part
            at += 1
        return taken, got

    def _replace(self, sparse: list[tuple[int, int]], at: int, got: int, goal: int) -> tuple[int, int]:
        """Takes tokens of one request in the place of the densest of ``sparse``, until the goal is reached or nothing is left.

        Returns:
            How many tokens it took, and the pairs of all.
        """
        tokens, pairs, left, moved = self._tokens[at], self._pairs[at], self._left[at], 0
        while sparse and moved < left:
            other, had = sparse.pop()
            if other == at:
                moved += had
                continue
            other_tokens, other_pairs = self._tokens[other], self._pairs[other]
            more = most = had if had < left - moved else left - moved
            # Of a token of each: the pairs of the one less those of the other, over a common denominator.
            gain = pairs * other_tokens - other_pairs * tokens
            if gain > 0:
                more = (goal - got) * tokens * other_tokens // gain
                more = more if more < most else most
            got += pairs * more // tokens - other_pairs * more // other_tokens
            moved += more
            if more < had:
                sparse.append((other, had - more))
            if more < most:
                break
        return moved, got
