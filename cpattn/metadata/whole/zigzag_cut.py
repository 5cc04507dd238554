"""Requests cut by zigzag among ranks that may have unequal shares of them.

Ranks stand around each other: the first has the outermost tokens, a run at the front and one at the back, the next the
outermost of what is left, and the last the middle. With runs of equal lengths each rank's query-key pairs are in
proportion to its tokens, as in Llama 3 (arXiv:2407.21783, section 3.3.2): :func:`in_halves`. A token at the back instead of
the front sees more keys, so the lengths of the two runs decide how many pairs a rank has, whatever its number of tokens:
:func:`cut_by_zigzag`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cpattn.device_tables import exclusive_cumsum
from cpattn.metadata.chunks import Chunks
from cpattn.metadata.whole.work import Pieces


class Share(NamedTuple):
    """What one rank is to have of a request.

    Attributes:
        rank: whose it is.
        tokens: at least 1, exactly.
        even: query-key pairs in proportion to the tokens.
        pairs: query-key pairs, as nearly as whole tokens allow.
    """

    rank: int
    tokens: int
    even: int
    pairs: int


# ``(start, length, rank)``: so many of a request's new tokens, on one rank. A plain tuple, as there are many.
Run = tuple[int, int, int]


def in_halves(pieces: Pieces) -> Chunks:
    """Cuts all requests into runs of equal lengths, as far as whole tokens go.

    >>> chunks = in_halves({7: [(0, 4), (2, 5)]})
    >>> chunks.start.tolist(), chunks.length.tolist(), chunks.rank.tolist()
    ([0, 2, 7], [2, 5, 2], [0, 2, 0])
    """
    counts = np.array([len(of_request) for of_request in pieces.values()])
    request, firsts = np.repeat(list(pieces), counts), exclusive_cumsum(counts)
    rank, tokens = np.array([piece for of_request in pieces.values() for piece in of_request], dtype=np.int64).T
    # The odd token is at the front and at the back by turns; the last rank has the middle in one run.
    at_front = (tokens + np.arange(len(tokens)) % 2) // 2
    at_front[firsts + counts - 1] = tokens[firsts + counts - 1]
    at_back = tokens - at_front
    front, back = exclusive_cumsum(at_front), exclusive_cumsum(at_back)
    first, length = firsts.repeat(counts), np.add.reduceat(tokens, firsts).repeat(counts)
    starts = np.concatenate([front - front[first], length - (back - back[first]) - at_back])
    table = Chunks(np.tile(request, 2), starts, np.concatenate([at_front, at_back]), np.tile(rank, 2))
    order = np.lexsort((table.start, table.request))
    return Chunks._make(column[order][table.length[order] > 0] for column in table)


def cut_by_zigzag(prefix_len: int, shares: list[Share]) -> tuple[list[Run], list[int]]:
    """Cuts a request whose new tokens are those of all shares.

    >>> cut_by_zigzag(0, [Share(0, 4, 18, 18), Share(1, 4, 18, 18)])
    ([(0, 2, 0), (2, 4, 1), (6, 2, 0)], [18, 18])

    Returns:
        The runs in the order of the sequence, at most two a rank; and the pairs of each share.
    """
    start, end = 0, sum(share.tokens for share in shares)
    pairs_left = end * prefix_len + end * (end + 1) // 2
    wanted_left = sum(share.pairs for share in shares)
    # The outermost has the widest choice: it is for who is to have the most or the fewest pairs for its tokens. What is
    # less than moving one token is no reason to leave the order of ranks.
    off = [abs(share.pairs - share.even) // end for share in shares]
    order: Sequence[int] = sorted(range(len(shares)), key=lambda i: (-off[i], i)) if any(off) else range(len(shares))
    front, back, got = [], [], [0] * len(shares)
    for i in order:
        rank, tokens, _, wanted = shares[i]
        others = end - start - tokens
        if not others:
            front.append((start, tokens, rank))
            got[i] = pairs_left
            break
        # What those before could not take is spread over all that are left.
        target = wanted + (pairs_left - wanted_left) * tokens // (end - start)
        at_front = tokens * (prefix_len + start) + tokens * (tokens + 1) // 2
        # Each token at the back rather than the front adds as many pairs as tokens are left for others.
        at_back = min(max((2 * (target - at_front) + others) // (2 * others), 0), tokens)
        got[i] = at_front + at_back * others
        if at_back < tokens:
            front.append((start, tokens - at_back, rank))
        if at_back:
            back.append((end - at_back, at_back, rank))
        start, end = start + tokens - at_back, end - at_back
        pairs_left -= got[i]
        wanted_left -= wanted
    return front + back[::-1], got
