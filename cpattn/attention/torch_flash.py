"""Backend ``torch_flash``: the FlashAttention 2 that torch itself carries; nothing to install."""

from __future__ import annotations

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.flash_varlen import FA2_LEAST_MAX_SEQLEN_Q, NO_WINDOW, even_out, flash_backend, same_head_dim, varlen_call
from cpattn.keys import Keys
from cpattn.spans import Spans


def torch_flash_attention(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :class:`cpattn.attention.backend.AttentionFunction`."""
    call = varlen_call(keys, spans, options)
    out, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        q,
        keys.k,
        keys.v,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        max(call.max_seqlen_q, FA2_LEAST_MAX_SEQLEN_Q),
        call.max_seqlen_k,
        0.0,  # dropout
        call.causal,
        False,  # return_debug_mask
        scale=call.softmax_scale,
        window_size_left=None if call.window_left == NO_WINDOW else call.window_left,
        window_size_right=None if call.window_right == NO_WINDOW else call.window_right,
        seqused_k=call.seqused_k,
    )
    return even_out(out, lse_HT, spans)


def _unavailable() -> str | None:
    return None if torch.cuda.is_available() else "there is no CUDA device"


BACKEND = flash_backend(
    "torch_flash",
    torch_flash_attention,
    _unavailable,
    least_capability=(8, 0),
    softcap=False,
    refuses_head_dims=same_head_dim,
)
