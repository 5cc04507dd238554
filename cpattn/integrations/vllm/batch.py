"""From vLLM's metadata of a step to a batch and a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from cpattn.device_tables import IntArray
from cpattn.errors import BatchError, UnsupportedError
from cpattn.metadata.plan import Plan, plan
from cpattn.metadata.striped import Striped

# Fields of a step that ask for another attention than a causal one, each with what it is for.
OTHER_ATTENTION = {
    "encoder_seq_lens": "cross attention",
    "mm_req_doc_ranges": "attention in both directions within images",
    "rswa_prefix_lens": "a window beside a prefix that all tokens see",
}


def batch_of(common: Any) -> IntArray:
    """``(prefix_len, extend_len)`` of each request of a step, from what vLLM knows of it on the host.

    The new tokens are the differences of ``query_start_loc_cpu``, and the cached ones what ``seq_lens_cpu_upper_bound`` has beyond
    them. Requests that only pad a batch have nothing of either. Padding tokens are in no request, so that
    ``num_actual_tokens`` is not looked at, which may count them.

    Args:
        common: vLLM's ``CommonAttentionMetadata``.

    Returns:
        int64 ``[num_reqs, 2]``, which :func:`cpattn.plan` takes; line i is that of row i of the block table.

    Raises:
        UnsupportedError: the lengths are not on the host, or the step asks for another attention than a causal one.
        BatchError: the lengths contradict each other.
    """
    if common.causal is not True:
        raise UnsupportedError(f"causal={_shown(common.causal)}; cpattn has causal attention alone: choose another attention backend")
    for name, purpose in OTHER_ATTENTION.items():
        if getattr(common, name, None) is not None:
            raise UnsupportedError(f"{name} is given, for {purpose}, which cpattn does not have: choose another attention backend")
    starts = _on_host("query_start_loc_cpu", common.query_start_loc_cpu, common.num_reqs + 1)
    lengths = _on_host("seq_lens_cpu_upper_bound", common.seq_lens_cpu_upper_bound, common.num_reqs)
    extends = np.diff(starts)
    batch: IntArray = np.stack([lengths - extends, extends], axis=1)
    if batch.size and (batch.min() < 0 or starts[0]):
        wrong = int((batch < 0).any(axis=1).argmax())
        raise BatchError(
            f"query_start_loc_cpu begins at {starts[0]} and gives request {wrong} {extends[wrong]} new tokens, where "
            f"seq_lens_cpu_upper_bound says {lengths[wrong]} in all; it begins at 0, and a request's tokens are its cached and its new ones"
        )
    return batch


def plan_of(common: Any, dcp_size: int = 1, interleave: int = 1) -> Plan:
    """The plan of a step as vLLM shares it: by decode context parallelism, or, with ``dcp_size=1``, not at all.

    Each rank of the group has the queries of its heads for all new tokens, and holds each cached token whose turn it is. So the plan
    has ``queries="all"`` and the rule ``Striped(interleave)``.

    Args:
        common: vLLM's ``CommonAttentionMetadata``.
        dcp_size: ``decode_context_parallel_size``.
        interleave: ``cp_kv_cache_interleave_size``.

    Raises:
        CPError: as :func:`batch_of` and :func:`cpattn.plan`.
    """
    batch = batch_of(common)
    if dcp_size == 1:
        return plan(batch, 1)
    return plan(batch, dcp_size, owner=Striped(interleave), queries="all")


def _on_host(name: str, given: Any, size: int) -> IntArray:
    if not isinstance(given, Tensor) or given.device.type != "cpu":
        what = f"on {given.device}" if isinstance(given, Tensor) else _shown(given)
        raise UnsupportedError(f"{name} is {what}; a plan is made from lengths on the host, without waiting for a device")
    if given.ndim != 1 or len(given) < size:
        raise BatchError(f"{name} has shape {tuple(given.shape)}; {size} numbers are needed for so many requests")
    numbers: IntArray = given[:size].numpy().astype(np.int64)
    return numbers


def _shown(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else repr(value)
