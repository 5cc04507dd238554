"""vLLM's prefill context parallelism as a partition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.errors import PlanError
from cpattn.metadata.chunks import Chunks
from cpattn.metadata.partition import Partition


def prefill_chunks(is_prefilling: Sequence[bool] | Any) -> Partition:
    """The partition by which vLLM's ``PCPManager`` gives a step's new tokens to ranks, to pass as ``partition=``.

    A prefill of n tokens is cut into ``2 * cp_size`` chunks of ``ceil(n / (2 * cp_size))``, of which rank r gets chunks r and
    ``2 * cp_size - 1 - r``; the last ones of a short prefill are short or empty. Decodes go to ranks in turn, as without decode
    context parallelism (``pcp_shard_decode_requests``). With it vLLM gives decodes, and prefills too short for all chunks, to every
    rank: no partition says that.

    >>> import cpattn
    >>> from cpattn.integrations.vllm import prefill_chunks
    >>> plan = cpattn.plan([(40, 1), (0, 7)], cp_size=2, partition=prefill_chunks([False, True]))
    >>> plan.chunk_table.length.tolist(), plan.chunk_table.rank.tolist()
    ([1, 2, 2, 2, 1], [0, 0, 1, 1, 0])

    Args:
        is_prefilling: of each request of the batch, as in ``CommonAttentionMetadata.is_prefilling``.

    Raises:
        PlanError: in ``plan``, where the batch has another number of requests.
    """
    prefilling = np.asarray(is_prefilling, dtype=bool)

    def pcp_chunks(batch: IntArray, cp_size: int) -> Chunks:
        if len(batch) != len(prefilling):
            raise PlanError(f"is_prefilling has {len(prefilling)} entries for a batch of {len(batch)} requests; pass one for each")
        extends, count = batch[:, 1], 2 * cp_size
        number = np.arange(count)
        size = -(-extends // count)
        of_prefills = np.clip(extends[:, None] - number * size[:, None], 0, size[:, None])
        of_decodes = np.where(number == 0, extends[:, None], 0)
        length = np.where(prefilling[:, None], of_prefills, of_decodes)
        turn = np.where((~prefilling) & (extends > 0), 1, 0)
        in_turn = (turn.cumsum() - turn) % cp_size
        rank = np.where(prefilling[:, None], np.minimum(number, count - 1 - number), in_turn[:, None])
        start = length.cumsum(axis=1) - length
        request, chunk = length.nonzero()
        return Chunks(request, start[request, chunk], length[request, chunk], rank[request, chunk])

    return pcp_chunks
