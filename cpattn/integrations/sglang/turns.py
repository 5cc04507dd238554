"""SGLang's own kernel over cpattn's chunks, for layers that ask for what cpattn's kernels do not have.

Its function takes one range of queries for each request, over a page table with one line for each. Of zigzag a rank has up to two
chunks of a request: so there are up to two turns, as SGLang makes them itself; and one where requests are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.errors import PlanError
from cpattn.metadata.cp_metadata import CPMetadata


class Turn(NamedTuple):
    """A chunk of each request, or none of it.

    Attributes:
        rows: int64, of the queries in local order; None for all of them.
        cu_seqlens_q: int32 ``[requests + 1]``.
        k_len: int32 ``[requests]``: the keys that a chunk's last query sees; 1 where a request has none, as kernels want a key.
        max_seqlen_q: the longest chunk.
    """

    rows: Tensor | None
    cu_seqlens_q: Tensor
    k_len: Tensor
    max_seqlen_q: int


def attend_in_turns(q: Tensor, turns: Sequence[Turn], num_tokens: int, attend: Callable[..., Tensor]) -> Tensor:
    """This rank's queries ``[rows, Hq, D]``, of which ``num_tokens`` are tokens; 0 on padding.

    Args:
        attend: SGLang's function of queries, cu_seqlens_q, key lengths and the longest chunk.
    """
    if not turns:
        raise PlanError("a rank has no token of this batch, but SGLang's kernel needs one; can_apply refuses such batches")
    out: Tensor | None = None
    for turn in turns:
        tokens = q[:num_tokens] if turn.rows is None else _selected(q, turn.rows)
        result = attend(tokens, turn.cu_seqlens_q, turn.k_len, turn.max_seqlen_q)
        if out is None:
            out = result.new_zeros(q.shape[0], *result.shape[1:])
        if turn.rows is None:
            out[:num_tokens] = result
        else:
            out.index_copy_(0, turn.rows, result)
    assert out is not None
    return out


def _selected(x: Tensor, rows: Tensor) -> Tensor:
    """As bytes where they are fp8, of which torch selects none."""
    if x.dtype.itemsize > 1:
        return x.index_select(0, rows)
    return x.view(torch.uint8).index_select(0, rows).view(x.dtype)


def turns_of(meta: CPMetadata) -> list[Turn]:
    """The first chunks of all requests here, the second ones, and so on."""
    _, request, _, q_len, k_len = meta.chunk_host
    begin = q_len.cumsum() - q_len
    # A request's chunks lie one after another.
    number = np.arange(len(request)) - np.searchsorted(request, request)
    many = int(number.max(initial=-1)) + 1
    turns = []
    for turn in range(many):
        here = number == turn
        lengths, keys = np.zeros(len(meta.plan.batch), dtype=np.int64), np.ones(len(meta.plan.batch), dtype=np.int64)
        lengths[request[here]], keys[request[here]] = q_len[here], k_len[here]
        parts = [np.arange(start, start + length) for start, length in zip(begin[here], q_len[here], strict=True)]
        rows = None if many == 1 else torch.from_numpy(np.concatenate(parts)).to(meta.device)
        cu_seqlens = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).to(meta.device)
        turns.append(Turn(rows, cu_seqlens, torch.from_numpy(keys.astype(np.int32)).to(meta.device), int(lengths.max())))
    return turns
