"""Which rank owns which tokens: every request's extend is cut into chunks, and each chunk has an owner.

A partition is the owner of each chunk, ``chunk_rank [num_chunks]``, the same for every request. How long the chunks
are, given that a length seldom divides by their number, is the remainder rule's affair.
Causal load balance by pairing a front with a back chunk is that of Llama 3 (arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cpattn.metadata.batch import IntArray


def zigzag(cp_size: int) -> IntArray:
    """2 * cp_size chunks; rank r owns chunks r and 2 * cp_size - 1 - r: an early cheap one and a late dear one."""
    ranks = np.arange(cp_size)
    return np.concatenate([ranks, ranks[::-1]])


def contiguous(cp_size: int) -> IntArray:
    """cp_size chunks; rank r owns chunk r. Even in tokens, not in causal work: later ranks compute more."""
    return np.arange(cp_size)


PARTITIONS: dict[str, Callable[[int], IntArray]] = {"zigzag": zigzag, "contiguous": contiguous}
REMAINDERS = ("balanced", "first")


def first_dealt(extend_lens: IntArray, shard_lens: IntArray) -> int:
    """The rank to deal the first left-over token to where caches are sharded (``shard_lens [num_requests, cp_size]``): that
    from which the tokens go to ranks that hold the fewest of their requests, so that decoding spreads each request."""
    cp_size = shard_lens.shape[1]
    deals = extend_lens % cp_size > 0
    turns = (extend_lens.cumsum() - extend_lens)[deals] % cp_size
    held = shard_lens[deals]
    costs = [int(held[np.arange(len(held)), (dealer + turns) % cp_size].sum()) for dealer in range(cp_size)]
    return int(np.argmin(costs))


def chunk_lengths(extend_lens: IntArray, chunk_rank: IntArray, cp_size: int, remainder: str, dealer: int = 0) -> IntArray:
    """Cuts every request into ``len(chunk_rank)`` chunks whose lengths differ by at most one token.

    Args:
        extend_lens: ``[num_requests]`` new tokens of each request.
        chunk_rank: ``[num_chunks]`` the owner of each chunk; in every run of cp_size chunks each rank stands once.
        remainder: ``"first"`` gives the tokens left over to the first chunks of each request. ``"balanced"`` deals
            them to ranks in turn and goes on with the next request where the last one stopped, as one deals cards;
            so any two ranks differ by at most one token over the whole batch.
        dealer: the rank that is dealt the first of them.

    Returns:
        ``[num_requests, num_chunks]`` int64.
    """
    num_chunks = len(chunk_rank)
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
        gets_one = nth_of_rank < rank_extra[:, chunk_rank]
    return base[:, None] + gets_one
