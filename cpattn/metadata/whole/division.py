"""A division of requests over ranks while it is made: who has which request, or how many tokens of one that is cut."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import accumulate

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.whole.work import Pieces, Work

# Ranks without room that are passed over for one request: over many ranks, full ones would be looked at again and again.
_MOST_LOOKED_AT = 64


class Division:
    """See the module.

    Attributes:
        rank_of ``[n]``: the rank that has the whole request; -1 of others.
        cut: of each request that is cut, the tokens of each rank.
        room: the tokens that each rank lacks.
        token_load, pair_load: what each rank has, as parts of all.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.room = work, list(work.room)
        self.rank_of = np.full(len(work.tokens), -1, dtype=np.int64)
        self.cut: dict[int, list[int]] = {}
        self.token_load, self.pair_load = [0] * len(work.room), [0] * len(work.room)

    def pieces(self) -> Pieces:
        """Of each request that is cut."""
        return {request: [(rank, had) for rank, had in enumerate(tokens) if had] for request, tokens in self.cut.items()}

    def is_even(self) -> bool:
        """Whether the pairs of all ranks are within 2% of their share, those of cut requests in proportion to tokens."""
        return 50 * max(abs(load - self.work.share) for load in self.pair_load) <= self.work.share

    def move(self, request: int, source: int, target: int) -> None:
        """A whole request to another rank; -1 for none."""
        work = self.work
        self.rank_of[request] = target
        for rank, sign in ((source, -1), (target, 1)):
            if rank >= 0:
                self.room[rank] -= sign * work.token_list[request]
                self.token_load[rank] += sign * work.token_parts[request]
                self.pair_load[rank] += sign * work.pair_parts[request]

    def assign(self, requests: IntArray, ranks: IntArray) -> None:
        """Whole requests to the ranks given."""
        if not len(requests):
            return
        self.rank_of[requests] = ranks
        work = self.work
        for had, gets, sign in ((self.room, work.tokens, -1), (self.token_load, work.token_part, 1), (self.pair_load, work.pair_part, 1)):
            # Sums in float64 are exact: they are below 2**31.
            more = np.bincount(ranks, gets[requests], minlength=len(had)).astype(np.int64).tolist()
            had[:] = [old + sign * new for old, new in zip(had, more, strict=True)]

    def deal(self, requests: IntArray) -> None:
        """Whole requests to ranks in turn, forth and back, in the order given: the same number to each."""
        if not len(requests):
            return
        num_ranks = len(self.room)
        turn = np.arange(len(requests)) % (2 * num_ranks)
        self.assign(requests, np.minimum(turn, 2 * num_ranks - 1 - turn))

    def deal_into_rooms(self, decodes: IntArray) -> None:
        """Requests of one token, as many as ranks have room for: each to the one with the fewest pairs."""
        parts, ranks = self.work.pair_part[decodes].tolist(), []
        # As in :meth:`place`.
        bits = len(self.room).bit_length()
        mask, room, pair_load = (1 << bits) - 1, self.room, self.pair_load
        heap = [pair_load[rank] << bits | rank for rank, free in enumerate(room) if free]
        heapify(heap)
        for of_pairs in parts:
            rank = heap[0] & mask
            ranks.append(rank)
            room[rank] -= 1
            pair_load[rank] += of_pairs
            if room[rank]:
                heapreplace(heap, heap[0] + (of_pairs << bits))
            else:
                heappop(heap)
        self.rank_of[decodes] = ranks

    def place(self, requests: IntArray, filler: int | None = None) -> list[int]:
        """Each whole, in the order given, on the rank with the smallest sum of its parts of tokens and of pairs.

        Ranks that have some of ``filler`` may get too many tokens, as many as those.

        Returns:
            Requests for which there is no room on any of the ranks that were looked at, 64 at most.
        """
        work, space = self.work, self._space(filler)
        # A load and its rank in one number, which is quicker to compare than two.
        bits = len(space).bit_length()
        mask = (1 << bits) - 1
        heap = [(tokens + pairs) << bits | rank for rank, (tokens, pairs) in enumerate(zip(self.token_load, self.pair_load, strict=True))]
        heapify(heap)
        lengths = work.tokens[requests].tolist()
        parts = ((work.token_part + work.pair_part)[requests] << bits).tolist()
        # Of each request the shortest that is still to come, itself among them: ranks without that room are done with.
        shortest = list(accumulate(reversed(lengths), min))[::-1]
        ranks = []
        for length, part, least in zip(lengths, parts, shortest, strict=True):
            aside: list[int] = []
            while heap:
                rank = heap[0] & mask
                left = space[rank] - length
                if left >= 0:
                    heapreplace(heap, heap[0] + part)
                    space[rank] = left
                    break
                if len(aside) == _MOST_LOOKED_AT:
                    rank = -1
                    break
                passed = heappop(heap)
                if space[rank] >= least:
                    aside.append(passed)
            else:
                rank = -1
            ranks.append(rank)
            for passed in aside:
                heappush(heap, passed)
        placed = np.array(ranks, dtype=np.int64)
        if -1 not in ranks:
            self.assign(requests, placed)
            return []
        self.assign(requests[placed >= 0], placed[placed >= 0])
        misfits: list[int] = requests[placed < 0].tolist()
        return misfits

    def pour(self, request: int) -> None:
        """Cuts a request into pieces in proportion to the room that ranks have."""
        self._cut(request, list(self.room))

    def spread(self, request: int) -> None:
        """Cuts a request into a piece for each rank, all alike."""
        self._cut(request, [1] * len(self.room))

    def level(self, request: int) -> None:
        """Cuts a request among as few ranks as have the room, those with the least: each is filled up to the same level."""
        loads = list(map(max, self.token_load, self.pair_load))
        order = sorted(range(len(loads)), key=loads.__getitem__)
        # What is less than a part is still something.
        size, filled, number, water = max(1, int(self.work.size[request])), 0, 0, 0
        for number, rank in enumerate(order, 1):
            filled += loads[rank]
            water = -(-(filled + size) // number)
            if water <= self.work.full:
                break
        weights = [0] * len(loads)
        for rank in order[:number]:
            weights[rank] = max(water - loads[rank], 0)
        self._cut(request, weights)

    def fill_up(self, request: int, filler: int | None) -> None:
        """Cuts a request among the ranks with the most room, as few as have enough of it."""
        space = self._space(filler)
        weights, missing = [0] * len(space), self.work.token_list[request]
        for rank in sorted(range(len(space)), key=lambda rank: (-space[rank], rank)):
            if missing <= 0:
                break
            weights[rank] = space[rank]
            missing -= space[rank]
        self._cut(request, weights)

    def make_room(self, filler: int | None) -> list[int]:
        """Takes from ranks what is too many tokens for them: pieces are given to others, whole requests are returned."""
        returned = []
        space = self._space(filler)
        for rank in range(len(space)):
            for request in [other for other in self.cut if other != filler] if space[rank] < 0 else ():
                for taker in sorted(range(len(space)), key=lambda taker: (-space[taker], taker)):
                    moved = min(-space[rank], space[taker], self.cut[request][rank])
                    if moved > 0:
                        for which, more in ((rank, -moved), (taker, moved)):
                            self._extend_piece(request, which, more)
                            space[which] -= more
            while space[rank] < 0:
                held = (self.rank_of == rank).nonzero()[0]
                lengths = self.work.tokens[held]
                enough = held[lengths >= -space[rank]]
                request = int(enough[self.work.tokens[enough].argmin()] if len(enough) else held[lengths.argmax()])
                self.move(request, rank, -1)
                space[rank] += self.work.token_list[request]
                returned.append(request)
        return returned

    def settle(self, filler: int) -> None:
        """Gives each rank as many more, or fewer, tokens of a cut request as it lacks."""
        for rank, room in enumerate(self.room):
            self._extend_piece(filler, rank, room)

    def _extend_piece(self, request: int, rank: int, tokens: int) -> None:
        work, length = self.work, self.work.token_list[request]
        self.cut[request][rank] += tokens
        self.room[rank] -= tokens
        self.token_load[rank] += work.token_parts[request] * tokens // length
        self.pair_load[rank] += work.pair_parts[request] * tokens // length

    def _cut(self, request: int, weights: Sequence[int]) -> None:
        """Cuts a request by weights; no rank has more than its weight where those sum up to at least its tokens."""
        length, total = self.work.token_list[request], sum(weights)
        self.cut[request] = [0] * len(weights)
        so_far, given = 0, 0
        for rank, weight in enumerate(weights):
            so_far += weight
            piece = length * so_far // total - given
            given += piece
            if piece:
                self._extend_piece(request, rank, piece)

    def _space(self, filler: int | None) -> list[int]:
        """The tokens that each rank can still take: its room, and what it has of the filler."""
        if filler is None:
            return list(self.room)
        return [room + held for room, held in zip(self.room, self.cut[filler], strict=True)]
