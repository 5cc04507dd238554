"""Which heads each rank has where ranks divide them: whole KV heads with all of their query heads, or a part of those of one.

So all query heads of a rank share KV heads alike, as kernels take them. Where KV heads are fewer than ranks, each has a group of ranks,
to all of which it is sent, and which divide its query heads.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple


class HeadShare(NamedTuple):
    """What one rank has of the heads.

    Attributes:
        q, kv: of the query heads and of the KV heads a run each.
    """

    q: slice
    kv: slice

    @property
    def sizes(self) -> tuple[int, int]:
        """How many query heads and KV heads."""
        return self.q_heads, self.kv_heads

    @property
    def q_heads(self) -> int:
        """How many query heads."""
        return int(self.q.stop - self.q.start)

    @property
    def kv_heads(self) -> int:
        """How many KV heads."""
        return int(self.kv.stop - self.kv.start)


@cache
def head_shares(q_heads: int, kv_heads: int, ranks: int) -> tuple[HeadShare, ...]:
    """Of each rank. There must be as many query heads as ranks.

    >>> [(share.q_heads, share.kv_heads) for share in head_shares(8, 4, 2)]
    [(4, 2), (4, 2)]
    >>> [(share.q.start, share.kv.start) for share in head_shares(8, 2, 4)]
    [(0, 0), (2, 0), (4, 1), (6, 1)]
    """
    group = q_heads // kv_heads
    if ranks <= kv_heads:
        bounds = [kv_heads * rank // ranks for rank in range(ranks + 1)]
        return tuple(HeadShare(slice(a * group, b * group), slice(a, b)) for a, b in pairwise(bounds))
    shares = []
    for head in range(kv_heads):
        sharing = ranks * (head + 1) // kv_heads - ranks * head // kv_heads
        bounds = [group * (head * sharing + part) // sharing for part in range(sharing + 1)]
        shares += [HeadShare(slice(a, b), slice(head, head + 1)) for a, b in pairwise(bounds)]
    return tuple(shares)


def largest_share(shares: tuple[HeadShare, ...]) -> tuple[int, int]:
    """The most query heads and the most KV heads of any rank: what messages have room for."""
    return max(share.q_heads for share in shares), max(share.kv_heads for share in shares)


def are_even(shares: tuple[HeadShare, ...]) -> bool:
    """Whether all ranks have as many of both, and each KV head is on as many ranks."""
    kv_heads = shares[-1].kv.stop
    return len({share.sizes for share in shares}) == 1 and (len(shares) % kv_heads == 0 or kv_heads % len(shares) == 0)
