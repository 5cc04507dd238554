"""One rank's chunks as small arrays on the host: what step tables are worked out from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout


class ChunkTables(NamedTuple):
    """The chunks with a token on one rank, in local order, as int64 arrays ``[c]``.

    Attributes:
        entry: of ``plan.chunk_table``, ascending: what lies before a chunk in its request has a smaller one.
        request: of the batch.
        start: its first token within the request's extend.
        q_len: its tokens.
        k_len: the keys that its last query sees.
    """

    entry: IntArray
    request: IntArray
    start: IntArray
    q_len: IntArray
    k_len: IntArray


def chunk_tables(plan: Layout, rank: int) -> ChunkTables:
    """The chunks of one rank; whole requests where each rank has queries of all tokens."""
    if plan.all_queries:
        request = plan.extend_lens.nonzero()[0]
        lengths = plan.extend_lens[request]
        return ChunkTables(np.arange(len(request)), request, np.zeros_like(lengths), lengths, plan.total_lens[request])
    entry = plan.by_rank.entries(rank)
    request, start, q_len, _ = (column.take(entry) for column in plan.chunk_table)
    return ChunkTables(entry, request, start, q_len, plan.prefix_lens[request] + start + q_len)
