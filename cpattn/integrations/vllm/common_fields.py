"""The way back: of a batch's metadata, what vLLM's own metadata of the step say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cpattn.errors import PlanError
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.serving import slot_mapping


def common_fields(
    meta: CPMetadata, block_table: Tensor, block_size: int, *, num_tokens: int | None = None, num_reqs: int | None = None
) -> dict[str, Any]:
    """Of this rank's metadata the fields of vLLM's ``CommonAttentionMetadata``, by name: ``CommonAttentionMetadata(**fields)``.

    So an engine's step that was planned by cpattn can be handed to vLLM's own backends. :func:`batch_of` is the way there.

    >>> import cpattn, torch
    >>> from cpattn.integrations.vllm import common_fields
    >>> meta = cpattn.build_metadata([(5, 1), (0, 2)], 2, 0, owner=cpattn.Striped(1), queries="all")
    >>> fields = common_fields(meta, torch.tensor([[7, 3], [4, 0]], dtype=torch.int32), block_size=2, num_tokens=4)
    >>> fields["query_start_loc"].tolist(), fields["seq_lens"].tolist(), fields["dcp_local_seq_lens"].tolist()
    ([0, 1, 3], [6, 2], [3, 1])
    >>> fields["slot_mapping"].tolist()  # position 5 is the other rank's, as is 1; the last one is padding
    [-1, 8, -1, -1]

    Args:
        meta: of one rank: of a plan with ``queries="all"`` and an ``owner`` under decode context parallelism, else of one rank.
        block_table: int32 ``[>= num_requests, max_blocks]`` on the metadata's device.
        block_size: tokens of a block on one rank.
        num_tokens, num_reqs: what vLLM pads the step to, for its graphs; None where it does not. Padding tokens have slot -1, and
            padding requests a length of 0 and block 0.

    Returns:
        ``query_start_loc`` int32 ``[num_reqs + 1]`` and ``seq_lens`` int32 ``[num_reqs]``, with ``query_start_loc_cpu`` and
        ``seq_lens_cpu_upper_bound`` on the host; ``num_reqs``, ``num_actual_tokens``, ``max_query_len`` and ``max_seq_len``;
        ``block_table_tensor``; ``slot_mapping`` and ``positions``, int64 ``[num_tokens]``; and, under decode context parallelism,
        ``dcp_local_seq_lens`` int32 ``[num_reqs]``.

    Raises:
        PlanError: the plan splits the new tokens over ranks, of which vLLM's metadata have no word; or the step is larger than what
            it is to be padded to.
        PageTableError: as :func:`cpattn.slot_mapping`.
    """
    plan = meta.plan
    if plan.cp_size > 1 and not (plan.all_queries and plan.owner is not None):
        raise PlanError(
            "the plan splits new tokens over ranks, and vLLM's metadata are those of one rank's whole step; pass "
            "queries='all' and owner=cpattn.Striped(interleave) to cpattn.plan, as vLLM's decode context parallelism has it"
        )
    tokens, requests = plan.num_tokens, len(plan.batch)
    all_tokens, all_requests = num_tokens or tokens, num_reqs or requests
    if all_tokens < tokens or all_requests < requests:
        raise PlanError(f"num_tokens={num_tokens}, num_reqs={num_reqs}; the step has {tokens} new tokens of {requests} requests")

    def of_requests(values: Any) -> Tensor:
        """On the host, int32, padded."""
        return pad(torch.as_tensor(values.astype("int32")), (0, all_requests - requests))

    extends, lengths = of_requests(plan.extend_lens), of_requests(plan.total_lens)
    starts = pad(extends.cumsum(0, dtype=torch.int32), (1, 0))
    fields: dict[str, Any] = {
        "query_start_loc": starts.to(meta.device),
        "query_start_loc_cpu": starts,
        "seq_lens": lengths.to(meta.device),
        "seq_lens_cpu_upper_bound": lengths,
        "num_reqs": all_requests,
        "num_actual_tokens": all_tokens,
        "max_query_len": int(extends.max()) if all_requests else 0,
        "max_seq_len": int(lengths.max()) if all_requests else 0,
        "block_table_tensor": pad(block_table[:requests], (0, 0, 0, all_requests - requests)),
        "slot_mapping": pad(slot_mapping(meta, block_table, block_size), (0, all_tokens - tokens), value=-1),
        "positions": pad(meta.position_ids, (0, all_tokens - tokens)),
    }
    if plan.cp_size > 1:
        fields["dcp_local_seq_lens"] = of_requests(plan.held_lens[:, meta.cp_rank]).to(meta.device)
    return fields
