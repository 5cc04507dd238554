"""Backend ``flash_attn3``: FlashAttention-3 for Hopper GPUs (Shah et al., arXiv:2407.08608), whichever build is installed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.fa3_build import find_build, why_no_build
from cpattn.attention.flash_varlen import flash_backend, packs_heads, varlen_call
from cpattn.keys import Keys
from cpattn.problem import Problem
from cpattn.spans import HostSpans, Spans

_TILE = 128  # query rows of a tile, those of a group's heads together; 192 for head dims up to 96
# Where a page holds a whole number of key tiles, of which these are the sizes or divide them, the kernel may load tiles whole,
# rows after a sequence's last token included. Those must then be finite, which no one promises. To say where keys begin, which makes it
# load row by row, costs nothing: 724 us instead of 723 to decode 64 x 8k over pages of 128 (one H100).
_KEY_TILES = (64, 80, 96, 112, 144, 176)
# A part of a split row has at least so many keys.
_LEAST_KEYS = 512
_MOST_SPLITS = 128
# What all parts of the results may take up while they wait to be added.
_MOST_PARTIAL_BYTES = 256 * 2**20


def flash_attn3_attention(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :class:`cpattn.attention.backend.AttentionFunction`."""
    return _attention(q, keys, spans, options)


def _attention(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    build = find_build()
    kv_heads, v_head_dim = keys.k.shape[-2], keys.v.shape[-1]
    group = q.shape[1] // kv_heads
    splits = num_splits(spans, q.shape[1], kv_heads, v_head_dim, options.window, multiprocessors(q.device)) if build.has("SPLIT") else 1
    pack_gqa: bool | None = None
    # Split spans and pages are always packed.
    if splits == 1 and keys.page_table is None and group > 1:
        pack_gqa = build.has("PACKGQA") and packs_heads(spans, group)
    return launch(q, keys, spans, options, splits, pack_gqa, out)


def flash_attn3_attend_into(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out: Tensor, lse: Tensor) -> None:
    """See :class:`cpattn.attention.backend.AttendIntoFunction`. The LSE is copied, and the output unless the build takes memory."""
    if find_build().takes_out:
        lse.copy_(_attention(q, keys, spans, options, out)[1])
        return
    made, made_lse = _attention(q, keys, spans, options)
    out.copy_(made)
    lse.copy_(made_lse)


def launch(
    q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, splits: int, pack_gqa: bool | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One launch of the kernel.

    Args:
        splits: into how many parts the keys of a span are split at most; the kernel takes fewer for shorter ones.
        pack_gqa: whether the query heads of a group share a tile; None leaves it to the kernel.
        out: memory for the output, where the build takes it.
    """
    call = varlen_call(keys, spans, options)
    table = keys.page_table
    into = {} if out is None else {"out": out}
    out, lse_HT = find_build().forward(
        q=q,
        k=keys.k,
        v=keys.v,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k if table is None else None,
        seqused_k=call.seqused_k,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_k=call.max_seqlen_k,
        page_table=None if table is None else _int32(table),
        kv_batch_idx=None if table is None else spans.request,
        leftpad_k=_starts(spans, keys.page_size) if table is not None else None,
        k_descale=_of_each_span(keys.k_scale, spans),
        v_descale=_of_each_span(keys.v_scale, spans),
        softmax_scale=call.softmax_scale,
        is_causal=call.causal,
        window_size_left=call.window_left,
        window_size_right=call.window_right,
        softcap=call.softcap,
        num_splits=splits,
        pack_gqa=pack_gqa,
        **into,
    )
    return out, lse_HT.transpose(0, 1)


def num_splits(spans: Spans, heads: int, kv_heads: int, v_head_dim: int, window: int | None, processors: int) -> int:
    """Into how many parts the longest span is to be split: as often as it is its fair share of all work.

    Few long spans, as in decoding, would leave most of the GPU idle. 256 of 8k are no reason to split: there are tiles for
    all. One of 128k beside 31 of 1k is one. Parts are fp32 and are added by the kernel; memory limits their number.
    """
    sizes = heads, kv_heads, v_head_dim, window, processors
    return spans.derive(("splits", *sizes), lambda: _num_splits(spans.host, *sizes))


def _num_splits(host: HostSpans, heads: int, kv_heads: int, v_head_dim: int, window: int | None, processors: int) -> int:
    k_len = host.k_len if window is None else np.minimum(host.k_len, window + host.q_len)
    tiles = -(-host.q_len * (heads // kv_heads) // _TILE)
    work = int((tiles * k_len).sum()) * kv_heads
    longest = int(k_len[host.q_len > 0].max(initial=0))
    result_bytes = max(1, 4 * int(host.q_len.sum()) * heads * (v_head_dim + 1))
    most = min(longest // _LEAST_KEYS, _MOST_PARTIAL_BYTES // result_bytes, _MOST_SPLITS)
    # The kernel itself gives each span its own number of parts, up to this one. Rounded up: 64 of 0.2k to 32k, of which the longest
    # is 1.3 times its share, took 604 us with a number of the kernel's choice and 655 us whole (one H100).
    return max(1, min(-(-longest * processors // max(work, 1)), most))


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; 1 elsewhere."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _int32(table: Tensor) -> Tensor:
    table = table.to(torch.int32)
    return table if table.stride(-1) == 1 else table.clone(memory_format=torch.contiguous_format)


def _starts(spans: Spans, page_size: int) -> Tensor | None:
    """Where key ranges begin in their pages: at 0, which to say makes the kernel load row by row."""
    return spans.k_start_padded[:-1] if any(page_size % tile == 0 for tile in _KEY_TILES) else None


def _of_each_span(scale: Tensor | None, spans: Spans) -> Tensor | None:
    """The scales of heads, ``[n, Hkv]``."""
    return None if scale is None else scale.expand(len(spans), -1)


def _reads_pages(problem: Problem) -> bool:
    return find_build().reads_pages(problem)


def _refuses_head_dims(head_dim: int, v_head_dim: int, major: int) -> str | None:
    """The rule of the kernels; a build may have fewer of them."""
    if major != 9:
        return f"it is for compute capability 9, this GPU has {major}"
    if head_dim % 8 or v_head_dim % 8:
        return f"it takes head dims that are multiples of 8, not {head_dim} and {v_head_dim}"
    if head_dim > 256:
        return f"it takes head dims up to 256, not {head_dim}"
    if head_dim == v_head_dim or (head_dim <= 64 and v_head_dim <= 512) or (128 < head_dim <= 192 and 96 < v_head_dim <= 128):
        return None
    return f"of head dims that differ it takes up to 64 and 512, or 136 to 192 and 104 to 128, not {head_dim} and {v_head_dim}"


def _refuses(problem: Problem) -> str | None:
    head_dim, v_head_dim = problem.head_dim, problem.v_head_dim
    if problem.q_dtype is not None and (head_dim % 16 or head_dim != v_head_dim):
        return f"with queries in fp8 it takes one head_dim for q, k and v, a multiple of 16, not {head_dim} and {v_head_dim}"
    try:
        return find_build().refuses(problem)
    except ImportError as failure:
        return str(failure)


def _describe() -> str | None:
    return None if why_no_build() else str(find_build())


# Sinks are applied to the result. Some builds take them, but were only seen to be right with bf16 ones, and leave them out of the LSE
# of queries without keys.
BACKEND = replace(
    flash_backend(
        "flash_attn3",
        flash_attn3_attention,
        why_no_build,
        least_capability=(9, 0),
        softcap=True,
        refuses_head_dims=_refuses_head_dims,
        refuses_call=_refuses,
        reads_pages=_reads_pages,
        describe=_describe,
    ),
    attend_into=flash_attn3_attend_into,
    # Its products are of q's dtype.
    reads_stored=lambda problem: problem.q_dtype is not None,
    fp8_queries=lambda problem: True,
)
