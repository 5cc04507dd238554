"""A plain search for divisions of whole requests, to hold ``partition="whole"`` to: slow, and with none of its ideas.

Every request is whole on a rank or cut. What is cut fills the room that the others leave, in proportion, each request by a
zigzag with as many tokens at its front as at its back. Up to 8 requests all divisions are looked at; of more, those that a
random walk with a fixed seed comes by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from inputs.strategies import Batch

MOST_EXHAUSTIVE = 8
STEPS = 600


def pairs_of(prefix_len: int, extend_len: int) -> int:
    return extend_len * prefix_len + extend_len * (extend_len + 1) // 2


def larger_than_a_share(batch: Batch, cp_size: int) -> list[bool]:
    """Of tokens, or of pairs by more than what ranks may differ."""
    tokens, pairs = sum(extend for _, extend in batch), sum(pairs_of(*request) for request in batch)
    return [
        extend > 1 and (extend > -(-tokens // cp_size) or 50 * cp_size * pairs_of(prefix, extend) > 51 * pairs) for prefix, extend in batch
    ]


def serving_batch(seed: int, most_requests: int = 96) -> Batch:
    """Lengths as in public traces: log-normal prompts, some of 32k and more, prefix hits, and decodes among them."""
    rng = np.random.default_rng(seed)
    prompts = int(rng.integers(4, most_requests))
    decodes = int(rng.integers(0, 2 * most_requests)) if rng.random() < 0.6 else 0
    extend = np.minimum(rng.lognormal(np.log(1000), 1.0, prompts), 131072).astype(int) + 1
    long = rng.random(prompts) < rng.choice([0, 0.02, 0.05])
    extend[long] = rng.integers(32768, 131073, long.sum())
    prefix = np.where(rng.random(prompts) < 0.5, rng.lognormal(np.log(4000), 1.0, prompts).astype(int), 0)
    batch = list(zip(prefix.tolist(), extend.tolist(), strict=True)) + [
        (int(length), 1) for length in rng.lognormal(np.log(3000), 1.2, decodes)
    ]
    return [batch[i] for i in rng.permutation(len(batch))]


def fewest_cuts(batch: Batch, cp_size: int) -> int | None:
    """The fewest requests, those larger than a share not counted, that must be cut so that pairs are within 2% of the mean and tokens
    even; None if no division is found in which they are at most cp_size - 1."""
    batch = [request for request in batch if request[1]]
    share, more = divmod(sum(extend for _, extend in batch), cp_size)
    room = [share + (rank < more) for rank in range(cp_size)]
    large = larger_than_a_share(batch, cp_size)
    divisions = _all_divisions(batch, room) if len(batch) <= MOST_EXHAUSTIVE else _random_walk(batch, room)
    found: int | None = None
    for ranks in divisions:
        cuts = sum(rank < 0 and not is_large for rank, is_large in zip(ranks, large, strict=True))
        if cuts < (cp_size if found is None else found) and _is_even(batch, ranks, room):
            found = cuts
    return found


def _all_divisions(batch: Batch, room: list[int]) -> Iterator[list[int]]:
    """The rank of each request, -1 for cut. Ranks with the same room and nothing on them are alike, and one of them is enough."""
    ranks: list[int] = []

    def further(room: list[int], used: frozenset[int]) -> Iterator[list[int]]:
        if len(ranks) == len(batch):
            yield list(ranks)
            return
        extend = batch[len(ranks)][1]
        fresh: set[int] = set()
        for rank in range(-1, len(room)):
            if rank >= 0 and (room[rank] < extend or (rank not in used and room[rank] in fresh)):
                continue
            left = list(room)
            if rank >= 0:
                left[rank] -= extend
                if rank not in used:
                    fresh.add(room[rank])
            ranks.append(rank)
            yield from further(left, used | {rank})
            ranks.pop()

    yield from further(room, frozenset())


def _random_walk(batch: Batch, room: list[int]) -> Iterator[list[int]]:
    """From the longest request on each goes where there is most room; then one after another goes elsewhere, or two trade places,
    where that makes pairs no less even."""
    rng = np.random.default_rng(0)
    cp_size, left, ranks = len(room), list(room), [-1] * len(batch)
    for request in sorted(range(len(batch)), key=lambda request: -batch[request][1]):
        rank = max(range(cp_size), key=left.__getitem__)
        if left[rank] >= batch[request][1]:
            ranks[request] = rank
            left[rank] -= batch[request][1]
    cost = _unevenness(batch, ranks, room)
    yield list(ranks)
    for _ in range(STEPS):
        one, other = rng.integers(len(batch), size=2).tolist()
        before = ranks[one], ranks[other]
        if rng.random() < 0.5:
            ranks[one] = int(rng.integers(-1, cp_size))
        else:
            ranks[one], ranks[other] = ranks[other], ranks[one]
        changed = _unevenness(batch, ranks, room)
        if changed > cost:
            ranks[one], ranks[other] = before
        else:
            cost = changed
            yield list(ranks)


def _unevenness(batch: Batch, ranks: Sequence[int], room: list[int]) -> float:
    """The most that a rank's pairs are off the mean, where those that are cut are spread in proportion; infinite without the room."""
    left, loads, spread_tokens, spread_pairs = list(room), [0.0] * len(room), 0, 0
    for request, rank in zip(batch, ranks, strict=True):
        if rank < 0:
            spread_tokens, spread_pairs = spread_tokens + request[1], spread_pairs + pairs_of(*request)
        else:
            left[rank] -= request[1]
            loads[rank] += pairs_of(*request)
    if min(left) < 0 or (not spread_tokens and any(left)):
        return float("inf")
    loads = [load + spread_pairs * tokens / max(spread_tokens, 1) for load, tokens in zip(loads, left, strict=True)]
    mean = sum(loads) / len(loads)
    return max(abs(load - mean) for load in loads)


def _is_even(batch: Batch, ranks: Sequence[int], room: list[int]) -> bool:
    """Whether pairs are within 2% of the mean, counted in whole tokens."""
    left, loads = list(room), [0] * len(room)
    for request, rank in zip(batch, ranks, strict=True):
        if rank >= 0:
            left[rank] -= request[1]
            loads[rank] += pairs_of(*request)
    cut = [request for request, rank in zip(batch, ranks, strict=True) if rank < 0]
    if min(left) < 0 or sum(extend for _, extend in cut) != sum(left):
        return False
    for prefix, extend in cut:
        total, so_far, given, start, end = sum(left), 0, 0, 0, extend
        for rank, weight in enumerate(list(left)):
            so_far += weight
            tokens = extend * so_far // total - given
            given += tokens
            left[rank] -= tokens
            front = tokens // 2 if given < extend else tokens
            for first, length in ((start, front), (end - (tokens - front), tokens - front)):
                loads[rank] += length * (prefix + first) + length * (length + 1) // 2
            start, end = start + front, end - (tokens - front)
    pairs = sum(map(pairs_of, *zip(*batch, strict=True)))
    assert sum(loads) == pairs
    return all(50 * abs(load * len(loads) - pairs) <= pairs for load in loads)
