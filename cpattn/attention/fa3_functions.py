"""FlashAttention-3 through its package's own Python functions, for builds whose operator is not as cpattn knows it."""

from __future__ import annotations

import inspect
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor


class OperatorArguments(NamedTuple):
    """What the operator ``fwd`` of FlashAttention-3 takes, as far as it is used here, under its own names."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    seqused_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    page_table: Tensor | None
    kv_batch_idx: Tensor | None
    leftpad_k: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    softmax_scale: float
    is_causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    num_splits: int
    pack_gqa: bool | None


def call_functions(interface: ModuleType, **arguments: Any) -> tuple[Tensor, Tensor]:
    """What the operator takes (:class:`OperatorArguments`), handed to the function that is for it: pages have one of their own.

    Returns out ``[T, Hq, Dv]`` and the LSE ``[Hq, T]``.
    """
    given = OperatorArguments(**arguments)
    common: dict[str, Any] = {
        "k_descale": given.k_descale,
        "v_descale": given.v_descale,
        "softmax_scale": given.softmax_scale,
        "causal": given.is_causal,
        "window_size": (given.window_size_left, given.window_size_right),
        "softcap": given.softcap,
        "num_splits": given.num_splits,
        "pack_gqa": given.pack_gqa,
    }
    if given.page_table is not None:
        out, lse_HT, *_ = interface.flash_attn_with_kvcache(
            *given[:3],
            cache_seqlens=given.seqused_k,
            cache_batch_idx=given.kv_batch_idx,
            cache_leftpad=given.leftpad_k,
            page_table=given.page_table,
            cu_seqlens_q=given.cu_seqlens_q,
            max_seqlen_q=given.max_seqlen_q,
            return_softmax_lse=True,
            **common,
        )
        return out, lse_HT
    varlen = interface.flash_attn_varlen_func
    # Older ones return the LSE without being asked.
    asked = {"return_attn_probs": True} if _takes(varlen, "return_attn_probs") else {}
    lengths = given.cu_seqlens_q, given.cu_seqlens_k, given.max_seqlen_q, given.max_seqlen_k
    out, lse_HT, *_ = varlen(*given[:3], *lengths, seqused_k=given.seqused_k, **common, **asked)
    return out, lse_HT


@cache
def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters
