"""Ulysses (arXiv:2309.14509) as USP has it (arXiv:2405.07719): all-to-all from tokens to heads, one launch over the whole batch,
and all-to-all back. Written anew."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from peers.varlen import Lengths, attention
from peers.work import Call, Unserved, Work, need_multiple, need_no_prefix, starts


def ulysses(work: Work) -> Call:
    """Each rank holds the same number of tokens, one run of the batch."""
    need_no_prefix(work, "USP")
    need_multiple(work, [work.tokens], work.size, "all-to-all over tokens")
    if work.k.shape[1] % work.size:
        raise Unserved(f"{work.k.shape[1]} key/value heads are not split over {work.size} ranks")
    rows = work.tokens // work.size
    tokens = torch.arange(rows * work.rank, rows * (work.rank + 1), device=work.device)
    q, k, v = (x[tokens] for x in (work.q, work.k, work.v))
    cu_seqlens = work.int32(starts(work.extends))
    lengths = Lengths(cu_seqlens, cu_seqlens, max(work.extends), max(work.extends))

    def to_heads(x: Tensor) -> Tensor:
        """``[rows, H, D]`` of all heads to ``[tokens, H / size, D]`` of this rank's."""
        sent = x.view(rows, work.size, -1, x.shape[2]).transpose(0, 1).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        return received.flatten(0, 1)

    def to_tokens(x: Tensor) -> Tensor:
        """Back."""
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x)
        return received.view(work.size, rows, *x.shape[1:]).transpose(0, 1).flatten(1, 2)

    def run() -> Tensor:
        return to_tokens(attention(to_heads(q), to_heads(k), to_heads(v), lengths)[0])

    return Call(run, tokens)
