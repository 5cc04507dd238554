"""Strategy ``ulysses``: all ranks exchange rows for heads, and each attends to whole requests with its heads, in one launch.

Jacobs et al., DeepSpeed Ulysses, arXiv:2309.14509. One all-to-all brings q, k and v, and one brings results back. KV heads may be fewer
than ranks, and a cache may have all heads, or those of its rank alone.
"""

from __future__ import annotations

from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.divided_heads import DividedHeads, divide_heads

# Where all ranks are one group, an all-gather has nothing to bring: it writes to pages, puts keys in order, and attends.
ULYSSES = divide_heads(DividedHeads, "ulysses", None, ALL_GATHER, "queries, keys and values by heads, and outputs back")
