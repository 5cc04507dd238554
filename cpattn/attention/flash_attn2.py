"""Backend ``flash_attn2``: the flash_attn package (Dao, FlashAttention-2, arXiv:2307.08691); extra ``cpattn[fa2]``.

PyPI has no wheels of it, so its calls are checked against its signature alone. Backend ``torch_flash`` is the same kernel, and
has run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.flash_varlen import FA2_LEAST_MAX_SEQLEN_Q, even_out, flash_backend, missing, same_head_dim, varlen_call
from cpattn.keys import Keys
from cpattn.spans import Spans


def flash_attn2_attention(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :class:`cpattn.attention.backend.AttentionFunction`."""
    # The package's public flash_attn_varlen_func takes no seqused_k; this is the function just below it.
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    call = varlen_call(keys, spans, options)
    out, lse_HT, *_ = _flash_attn_varlen_forward(
        q,
        keys.k,
        keys.v,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        max(call.max_seqlen_q, FA2_LEAST_MAX_SEQLEN_Q),
        call.max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=call.softmax_scale,
        causal=call.causal,
        window_size_left=call.window_left,
        window_size_right=call.window_right,
        softcap=call.softcap,
        seqused_k=call.seqused_k,
    )
    return even_out(out, lse_HT, spans)


def _unavailable() -> str | None:
    return missing("flash_attn.flash_attn_interface", "pip install 'cpattn[fa2]'")


BACKEND = flash_backend(
    "flash_attn2",
    flash_attn2_attention,
    _unavailable,
    least_capability=(8, 0),
    softcap=True,
    refuses_head_dims=same_head_dim,
)
