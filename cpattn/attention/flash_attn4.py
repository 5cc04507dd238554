"""Backend ``flash_attn4``: flash_attn.cute, FlashAttention in the CuTe DSL (PyPI flash-attn-4); extra ``cpattn[fa4]``."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.flash_varlen import NO_WINDOW, capability, flash_backend, missing, packs_heads, varlen_call
from cpattn.keys import Keys
from cpattn.problem import Problem
from cpattn.spans import Spans

# The package compiles kernels in the calling thread at their first use, which is not safe in two threads at once.
_ONE_AT_A_TIME = Lock()
_KEY_TILES = (64, 80, 96, 112, 128, 144)  # keys of a tile, by head dims and mask


def flash_attn4_attention(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :class:`cpattn.attention.backend.AttentionFunction`."""
    return launch(q, keys, spans, options, packs_heads(spans, q.shape[1] // keys.k.shape[-2]))


def launch(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, pack_gqa: bool) -> tuple[Tensor, Tensor]:
    """One launch of the kernel, with the query heads of a group packed into one tile or not."""
    from flash_attn.cute import flash_attn_varlen_func

    call = varlen_call(keys, spans, options)
    with _ONE_AT_A_TIME:
        out, lse_HT, *_ = flash_attn_varlen_func(
            q,
            keys.k,
            keys.v,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k if keys.page_table is None else None,
            page_table=None if keys.page_table is None else keys.lines(spans).to(torch.int32),
            max_seqlen_q=call.max_seqlen_q,
            max_seqlen_k=call.max_seqlen_k,
            seqused_k=call.seqused_k,
            softmax_scale=call.softmax_scale,
            causal=call.causal,
            window_size=tuple(None if side == NO_WINDOW else side for side in (call.window_left, call.window_right)),
            softcap=call.softcap,
            learnable_sink=options.sinks,
            pack_gqa=pack_gqa,
            return_lse=True,
        )
    return out, lse_HT.transpose(0, 1)


def _reads_pages(problem: Problem) -> bool:
    """Pages as long as its key tiles it loads whole. What lies after a sequence in its last page must then be finite,
    which no one promises. Others it loads row by row. SM80 and SM120 have no pages."""
    return capability(problem.device)[0] in (9, 10, 11) and problem.page_size not in _KEY_TILES


def _unavailable() -> str | None:
    return missing("flash_attn.cute", "pip install 'cpattn[fa4]'")


def _refuses_head_dims(head_dim: int, v_head_dim: int, major: int) -> str | None:
    if head_dim % 8 or v_head_dim % 8:
        return f"it takes head dims that are multiples of 8, not {head_dim} and {v_head_dim}"
    most = 256 if major == 9 else 128
    exceptions = {(192, 128), (256, 256)} if major in (10, 11) else set()
    if max(head_dim, v_head_dim) > most and (head_dim, v_head_dim) not in exceptions:
        return f"on this GPU it takes head dims up to {most}, not {head_dim} and {v_head_dim}"
    return None


BACKEND = flash_backend(
    "flash_attn4",
    flash_attn4_attention,
    _unavailable,
    least_capability=(8, 0),
    softcap=True,
    native_sinks=True,
    refuses_head_dims=_refuses_head_dims,
    reads_pages=_reads_pages,
)
