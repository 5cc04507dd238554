"""Backend ``reference``: plain torch on any device, with every feature. Slow; what other backends are read beside."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.keys import Keys
from cpattn.moves.torch_quantize import meaning
from cpattn.spans import Spans

# Queries are taken in blocks of this many, to bound the score matrix.
BLOCK = 512


def reference_attention(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :class:`cpattn.attention.backend.AttentionFunction`. Computes in fp32, in fp64 for fp64 inputs."""
    out = q.new_zeros(len(q), q.shape[1], keys.v.shape[-1], dtype=out_dtype)
    lse = q.new_full((len(q), q.shape[1]), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for q_start, q_len, k_start, k_len, diagonal, request in zip(*(column.tolist() for column in spans.host), strict=True):
        for begin in range(0, q_len, BLOCK):
            end = min(begin + BLOCK, q_len)
            sees_to = min(k_len, diagonal + end - 1)
            sees_from = 0 if options.window is None else max(0, diagonal + begin - options.window)
            if sees_to <= sees_from and options.sinks is None:
                continue
            queries = slice(q_start + begin, q_start + end)
            seen_k, seen_v = keys_of(keys, request, k_start + sees_from, k_start + max(sees_from, sees_to), q.dtype)
            out[queries], lse[queries] = _attend(q[queries], seen_k, seen_v, diagonal + begin - sees_from, options)
    return out, lse


def keys_of(keys: Keys, request: int, begin: int, end: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values ``begin .. end - 1``, of a request's pages where there are pages, and what they mean in a dtype, by default
    that in which they are stored."""
    dtype = keys.k.dtype if dtype is None else dtype
    place: Any = slice(begin, end)
    if keys.page_table is not None:
        key = torch.arange(begin, end, device=keys.k.device)
        place = keys.page_table[request, key // keys.page_size].long(), key % keys.page_size
    k_scale, v_scale = (scale if scale is None or scale.ndim == 1 else scale[place] for scale in (keys.k_scale, keys.v_scale))
    return meaning(keys.k[place], k_scale, dtype), meaning(keys.v[place], v_scale, dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, diagonal: int, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """One block of queries against one range of keys; the first query sees the first ``diagonal`` of them."""
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    q_tHgd = rearrange(q.to(compute), "t (h g) d -> t h g d", g=group)
    scores = einsum(q_tHgd, k.to(compute), "t h g d, s h d -> t h g s") * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    sees_to = diagonal + torch.arange(len(q), device=q.device)[:, None]
    key = torch.arange(len(k), device=q.device)
    visible = key < sees_to
    if options.window is not None:
        visible &= key >= sees_to - options.window
    scores = rearrange(scores, "t h g s -> t (h g) s").masked_fill(~visible[:, None], -torch.inf)
    if options.sinks is not None:
        sink_column = options.sinks.to(compute)[:, None].expand(len(q), -1, 1)
        scores = torch.cat([scores, sink_column], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    # A query that sees nothing has LSE -inf; a finite stand-in makes its weights exp(-inf) = 0 rather than NaN.
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])[..., : len(k)]
    out = einsum(rearrange(weights, "t (h g) s -> t h g s", g=group), v.to(compute), "t h g s, s h d -> t h g d")
    return rearrange(out, "t h g d -> t (h g) d"), lse


BACKEND = Backend(
    name="reference",
    attend=reference_attention,
    device_types=None,
    dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    alignments=frozenset({"bottom_right", "full", "any"}),
    window=True,
    softcap=True,
    native_sinks=True,
    v_head_dim=True,
    fp32_out=True,
    reads_pages=lambda problem: True,
    reads_stored=lambda problem: True,
    loops_on_host=True,
)
