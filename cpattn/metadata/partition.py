"""Which rank owns which tokens: functions from a batch to chunks.

A partition is called with the batch ``[n, 2]`` (prefix and new tokens of each request) and the number of ranks, and returns a
:class:`Chunks`. Zigzag and contiguous cut every request alike: into as many chunks, of which each has the same owner in every
request. How long the chunks are, given that a length seldom divides by their number, is the remainder rule's affair.
Whole cuts as few requests as it can, and needs no such rule; it is never less even than zigzag. Uncut cuts none, and is not even.
Causal load balance by pairing a front with a back chunk is that of Llama 3 (arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from cpattn.device_tables import IntArray, exclusive_cumsum
from cpattn.metadata.chunks import Chunks, joined, pairs_by_rank, steps_off
from cpattn.metadata.uncut import uncut
from cpattn.metadata.whole.divide import divide_whole
from cpattn.metadata.whole.sharded_caches import to_least_held

Partition: TypeAlias = Callable[[IntArray, int], Chunks]


def zigzag_owners(cp_size: int) -> IntArray:
    """The owner of each of 2 * cp_size chunks. Rank r owns chunks r and 2 * cp_size - 1 - r: an early cheap one and a late
    expensive one."""
    ranks = np.arange(cp_size, dtype=np.int64)
    return np.concatenate([ranks, ranks[::-1]])


def contiguous_owners(cp_size: int) -> IntArray:
    """The owner of each of cp_size chunks; rank r owns chunk r. Even in tokens, not in causal work: later ranks compute more."""
    return np.arange(cp_size, dtype=np.int64)


def zigzag(batch: IntArray, cp_size: int, remainder: str, shard_lens: IntArray | None) -> Chunks:
    """See :func:`zigzag_owners`."""
    return _cut_alike(batch, zigzag_owners(cp_size), cp_size, remainder, shard_lens)


def contiguous(batch: IntArray, cp_size: int, remainder: str, shard_lens: IntArray | None) -> Chunks:
    """See :func:`contiguous_owners`."""
    return _cut_alike(batch, contiguous_owners(cp_size), cp_size, remainder, shard_lens)


def whole(batch: IntArray, cp_size: int, _: str, shard_lens: IntArray | None) -> Chunks:
    """See :mod:`cpattn.metadata.whole`, and of sharded caches :mod:`cpattn.metadata.whole.sharded_caches`.

    Where zigzag is more even in pairs, by steps of 2%, it is that.
    """
    chunks = divide_whole(batch, cp_size)
    off = steps_off(pairs_by_rank(chunks, batch, cp_size))
    if off:
        by_zigzag = joined(zigzag(batch, cp_size, REMAINDERS[0], None))
        if steps_off(pairs_by_rank(by_zigzag, batch, cp_size)) < off:
            chunks = by_zigzag
    return chunks if shard_lens is None else to_least_held(batch, chunks, shard_lens)


# Called with the batch, cp_size, the remainder rule, and what each rank holds of each prefix where caches are sharded.
PARTITIONS: dict[str, Callable[[IntArray, int, str, IntArray | None], Chunks]] = {
    "zigzag": zigzag,
    "contiguous": contiguous,
    "whole": whole,
    "uncut": uncut,
}
# The most chunks of one request that a rank may own. Of uncut it is 1, but a bucket's tables are those of what it may follow.
MOST_CHUNKS = {"zigzag": 2, "contiguous": 1, "whole": 2, "uncut": 2}
# Of those that cut all requests alike.
OWNERS: dict[str, Callable[[int], IntArray]] = {"zigzag": zigzag_owners, "contiguous": contiguous_owners}
REMAINDERS = ("balanced", "first")


def remainders_of(partition: str) -> tuple[str, ...]:
    """The remainder rules that go with a partition: only one that cuts all requests alike leaves tokens over."""
    return REMAINDERS if partition in OWNERS else REMAINDERS[:1]


def _cut_alike(batch: IntArray, owners: IntArray, cp_size: int, remainder: str, shard_lens: IntArray | None) -> Chunks:
    dealer = 0 if shard_lens is None else first_dealt(batch[:, 1], shard_lens)
    lengths = chunk_lengths(batch[:, 1], owners, cp_size, remainder, dealer)
    held = lengths > 0
    per_request = held.sum(axis=1)
    length, rank = lengths.ravel(), np.tile(owners, len(batch))
    kept = held.ravel().nonzero()[0]
    if len(kept) < len(length):
        length, rank = length.take(kept), rank.take(kept)
    # Counted over the whole batch, less what the requests before have.
    start = exclusive_cumsum(length) - exclusive_cumsum(batch[:, 1]).repeat(per_request)
    return Chunks(np.arange(len(batch)).repeat(per_request), start, length, rank)


def first_dealt(extend_lens: IntArray, shard_lens: IntArray) -> int:
    """The rank to deal the first left-over token to where caches are sharded (``shard_lens [num_requests, cp_size]``). From
    there tokens go to the ranks that hold the fewest of their requests, so that decoding spreads each request."""
    cp_size = shard_lens.shape[1]
    deals = extend_lens % cp_size > 0
    turns = (extend_lens.cumsum() - extend_lens)[deals] % cp_size
    held = shard_lens[deals]
    costs = [int(held[np.arange(len(held)), (dealer + turns) % cp_size].sum()) for dealer in range(cp_size)]
    return int(np.argmin(costs))


def chunk_lengths(extend_lens: IntArray, owners: IntArray, cp_size: int, remainder: str, dealer: int = 0) -> IntArray:
    """Cuts every request into ``len(owners)`` chunks whose lengths differ by at most one token.

    Args:
        extend_lens: ``[num_requests]`` new tokens of each request.
        owners: ``[num_chunks]`` the owner of each chunk; in every run of cp_size chunks each rank stands once.
        remainder: ``"first"`` gives the tokens left over to the first chunks of each request. ``"balanced"`` deals
            them to ranks in turn and goes on with the next request where the last one stopped, as one deals cards.
            So any two ranks differ by at most one token over the whole batch.
        dealer: the rank that is dealt the first of them.

    Returns:
        ``[num_requests, num_chunks]`` int64.
    """
    num_chunks = len(owners)
    base, left_over = np.divmod(extend_lens, num_chunks)
    if remainder == "first":
        gets_one = np.arange(num_chunks) < left_over[:, None]
    else:
        everyone, some = np.divmod(left_over, cp_size)
        # base * num_chunks + everyone * cp_size deals whole rounds, so the deal's position is the token count mod cp_size.
        first_rank = (dealer + extend_lens.cumsum() - extend_lens) % cp_size
        turn = np.arange(cp_size) - first_rank[:, None]
        turn += cp_size * (turn < 0)
        rank_extra = everyone[:, None] + (turn < some[:, None])
        # A rank with one token left over for its several chunks puts it in the earliest.
        nth_of_rank = np.arange(num_chunks) // cp_size
        gets_one = nth_of_rank < rank_extra[:, owners]
    return base[:, None] + gets_one
