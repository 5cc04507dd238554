"""The oracle: what cpattn means by causal attention, in float64, a request at a time, without any splitting.

Optimized code never imports it. Test your own engine against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpattn.errors import RowCountError

_QUERY_BLOCK = 256  # bounds the memory of the scores; changes nothing else


def oracle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Sequence[tuple[int, int]],
    *,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The query at absolute position p of a request attends to keys max(0, p - window + 1) .. p of that request.

    >>> q = torch.ones(2, 1, 1)
    >>> out, lse = oracle_attention(q, q, torch.tensor([1.0, 3.0]).view(2, 1, 1), [(0, 2)])
    >>> out.flatten().tolist()
    [1.0, 2.0]

    Args:
        q: ``[T, Hq, D]``; k ``[T, Hkv, D]``; v ``[T, Hkv, Dv]``: the new tokens of all requests, in order, any dtype.
        batch: (prefix_len, extend_len) of each request; T is the sum of extend_len.
        prefix_k, prefix_v: the prefix tokens of all requests, in order; may be None where there are none.
        scale, window, softcap, sinks: as in :func:`cpattn.cp_attention`.

    Returns:
        ``out [T, Hq, Dv]`` and ``lse [T, Hq]`` in float64.

    Raises:
        RowCountError: there are fewer rows than the batch has tokens.
    """
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[2] ** -0.5 if scale is None else scale
    prefix_k = k[:0] if prefix_k is None else prefix_k.double()
    prefix_v = v[:0] if prefix_v is None else prefix_v.double()
    batch = list(batch)  # it is read twice
    prefix_rows, new_rows = (sum(lengths[column] for lengths in batch) for column in (0, 1))
    _check_rows("new", new_rows, q=q, k=k, v=v)
    _check_rows("prefix", prefix_rows, prefix_k=prefix_k, prefix_v=prefix_v)
    out = q.new_zeros(len(q), q.shape[1], v.shape[2])
    lse = q.new_zeros(q.shape[:2])
    extend_start = prefix_start = 0
    for prefix_len, extend_len in batch:
        extend = slice(extend_start, extend_start + extend_len)
        prefix = slice(prefix_start, prefix_start + prefix_len)
        extend_start, prefix_start = extend.stop, prefix.stop
        group = q.shape[1] // k.shape[1]
        keys = torch.cat([prefix_k[prefix], k[extend]]).repeat_interleave(group, dim=1)
        values = torch.cat([prefix_v[prefix], v[extend]]).repeat_interleave(group, dim=1)
        for begin in range(0, extend_len, _QUERY_BLOCK):
            rows = torch.arange(begin, min(begin + _QUERY_BLOCK, extend_len), device=q.device)
            query_position = (prefix_len + rows)[:, None]
            key_position = torch.arange(prefix_len + extend_len, device=q.device)
            visible = key_position <= query_position
            if window is not None:
                visible &= key_position > query_position - window
            scores = torch.einsum("thd,shd->ths", q[extend][rows], keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~visible[:, None], -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None].expand(len(rows), -1, 1)], dim=-1)
            weights = torch.softmax(scores, dim=-1)[..., : prefix_len + extend_len]
            out[extend.start + rows] = torch.einsum("ths,shd->thd", weights, values)
            lse[extend.start + rows] = torch.logsumexp(scores, dim=-1)
    return out, lse


def _check_rows(kind: str, rows: int, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if len(x) < rows:
            raise RowCountError(
                f"{name} has {len(x)} rows, but the batch has {rows} {kind} tokens; pass those of all requests, one after another, and of "
                "all ranks"
            )
