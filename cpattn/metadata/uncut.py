"""Partition ``uncut``: every request whole on one rank, however uneven that leaves ranks.

The largest first, each where there is least yet, in tokens and pairs in sum (the rule of Graham, Bounds on Multiprocessing Timing
Anomalies, 1969). With a sharded cache, of equal ranks the one that holds the least of the request.
"""

from __future__ import annotations

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.chunks import Chunks, pairs_of

# Parts of all tokens, and of all pairs, are counted in units of 2**-30.
_UNITS = 1 << 30


def uncut(batch: IntArray, cp_size: int, _: str, shard_lens: IntArray | None) -> Chunks:
    """The chunks of a batch ``[n, 2]`` over cp_size ranks; see the module."""
    held = batch[:, 1].nonzero()[0]
    length = batch[held, 1]
    whole = Chunks(held, np.zeros_like(held), length, np.zeros_like(held))
    parts = np.zeros_like(held)
    for counts in (length, pairs_of(whole, batch[:, 0])):
        # Python's integers do not overflow.
        total = sum(counts.tolist())
        parts += np.array([count * _UNITS // total for count in counts.tolist()], dtype=np.int64)
    load, rank = np.zeros(cp_size, dtype=np.int64), np.zeros_like(held)
    for entry in (-parts).argsort(kind="stable").tolist():
        least = (load == load.min()).nonzero()[0]
        taker = least[0] if shard_lens is None else least[shard_lens[held[entry], least].argmin()]
        rank[entry] = taker
        load[taker] += parts[entry]
    return whole._replace(rank=rank)
