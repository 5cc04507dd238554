"""FlashAttention-3 through its package's own Python functions, for builds whose operator is not as cpattn knows it."""

from __future__ import annotations

import inspect
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor


def call_functions(
    interface: ModuleType,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    page_table: Tensor | None,
    kv_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    num_splits: int,
    pack_gqa: bool | None,
) -> tuple[Tensor, Tensor]:
    """What the operator ``fwd`` takes, handed to the function that is for it: pages have one of their own.

    Returns out ``[T, Hq, Dv]`` and the LSE ``[Hq, T]``.
    """
    common: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": is_causal,
        "window_size": (window_size_left, window_size_right),
        "softcap": softcap,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
    }
    if page_table is not None:
        out, lse_HT, *_ = interface.flash_attn_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=seqused_k,
            cache_batch_idx=kv_batch_idx,
            cache_leftpad=leftpad_k,
            page_table=page_table,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            return_softmax_lse=True,
            **common,
        )
        return out, lse_HT
    varlen = interface.flash_attn_varlen_func
    # Older ones return the LSE without being asked.
    asked = {"return_attn_probs": True} if _takes(varlen, "return_attn_probs") else {}
    out, lse_HT, *_ = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=seqused_k, **common, **asked)
    return out, lse_HT


@cache
def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters
