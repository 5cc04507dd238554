"""One rank's chunks as small arrays on the host: what step tables are worked out from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cpattn.metadata.batch import IntArray

if TYPE_CHECKING:
    from cpattn.metadata.plan import Plan


class ChunkTables(NamedTuple):
    """The chunks with a token on one rank, in local order, as int64 arrays ``[c]``.

    Attributes:
        request: of the batch.
        column: which of its request's chunks it is.
        start: its first token within the request's extend.
        q_len: its tokens.
        k_len: the keys that its last query sees.
    """

    request: IntArray
    column: IntArray
    start: IntArray
    q_len: IntArray
    k_len: IntArray


def chunk_tables(plan: Plan, rank: int) -> ChunkTables:
    """The chunks of one rank."""
    columns = plan.rank_columns[rank]
    lengths = plan.lengths[:, columns]
    request, nth = lengths.nonzero()
    column = columns[nth]
    start = plan.starts[request, column]
    q_len = lengths[request, nth]
    return ChunkTables(request, column, start, q_len, plan.prefix_lens[request] + start + q_len)
