"""Backend ``flash_attn3``: the flash_attn_interface package for Hopper GPUs (Shah et al., FlashAttention-3, arXiv:2407.08608)."""

from __future__ import annotations

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.flash_varlen import flash_backend, missing, same_head_dim, varlen_call
from cpattn.attention.rows import RaggedRows


def flash_attn3_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, options: AttentionOptions, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :class:`cpattn.attention.backend.AttentionFunction`."""
    from flash_attn_interface import flash_attn_varlen_func

    call = varlen_call(rows, options)
    out, lse_HT = flash_attn_varlen_func(
        q,
        k,
        v,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.max_seqlen_q,
        call.max_seqlen_k,
        seqused_k=call.seqused_k,
        softmax_scale=call.softmax_scale,
        causal=call.causal,
        window_size=(call.window_left, call.window_right),
        softcap=call.softcap,
        return_attn_probs=True,
    )
    return out, lse_HT.transpose(0, 1)


def _unavailable() -> str | None:
    return missing("flash_attn_interface", "build it from the hopper folder of the flash-attention repository")


BACKEND = flash_backend(
    "flash_attn3",
    flash_attn3_attention,
    _unavailable,
    least_capability=(9, 0),
    softcap=True,
    refuses_head_dims=same_head_dim,
)
