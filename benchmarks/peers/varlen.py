"""The attention launch that all peers share: FlashAttention-4 on a GPU, and plain torch in its place on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Lengths(NamedTuple):
    """Which keys the queries of a launch see, in the terms of FlashAttention's varlen functions.

    Attributes:
        cu_seqlens_q: int32 ``[n + 1]``: where the queries of each sequence begin.
        cu_seqlens_k: int32 ``[n + 1]``: where its keys begin.
        max_seqlen_q, max_seqlen_k: the most of one sequence.
        seqused_k: int32 ``[n]``: how many keys there are from there on; None where they reach to the next sequence's.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_k: Tensor | None = None


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool = True) -> tuple[Tensor, Tensor]:
    """One launch: (out ``[T, Hq, D]``, LSE ``[Hq, T]``). Causal means aligned to the bottom right."""
    if not q.is_cuda:
        return _plain_attention(q, k, v, lengths, causal)
    from flash_attn.cute import flash_attn_varlen_func

    out, lse, *_ = flash_attn_varlen_func(q, k, v, **lengths._asdict(), causal=causal, return_lse=True)
    return out, lse


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    group = q.shape[1] // k.shape[1]
    q_starts, k_starts = lengths.cu_seqlens_q.tolist(), lengths.cu_seqlens_k.tolist()
    counts = lengths.cu_seqlens_k.diff().tolist() if lengths.seqused_k is None else lengths.seqused_k.tolist()
    for begin, end, k_begin, count in zip(q_starts, q_starts[1:], k_starts, counts, strict=False):
        keys, values = (x[k_begin : k_begin + count].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q[begin:end], keys) * q.shape[2] ** -0.5
        if causal:
            seen = torch.ones(end - begin, count, dtype=torch.bool).tril(count - (end - begin))
            scores = scores.masked_fill(~seen, -torch.inf)
        out[begin:end] = torch.einsum("hts,shd->thd", scores.softmax(dim=-1), values)
        lse[:, begin:end] = scores.logsumexp(dim=-1)
    return out, lse
