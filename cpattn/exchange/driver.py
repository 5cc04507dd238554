"""The driver: takes any strategy's steps through any backend, and merges what they give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.merge import apply_sinks_, merge_
from cpattn.exchange.strategy import Step


def run_steps(
    q: Tensor, num_tokens: int, v_head_dim: int, steps: Iterable[Step], merges: bool, backend: Backend, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Attends step by step. Asking for the next step is what waits for its transfer, so each is computed in its shadow.

    Args:
        q: ``[rows, Hq, D]``, of which the first ``num_tokens`` rows are tokens.
        merges: whether there is more than one step; partial results then stay fp32 until the last.

    Returns:
        ``out [rows, Hq, Dv]`` in q's dtype, ``lse [rows, Hq]`` in fp32; 0 and -inf on padding.
    """
    sinks = options.sinks
    # Sinks count once a query: natively where there is but one step, else on the merged result.
    sinks_after = sinks is not None and (merges or not backend.native_sinks)
    if sinks_after:
        options = replace(options, sinks=None)
    precise = torch.promote_types(q.dtype, torch.float32)
    step_dtype = precise if (merges or sinks_after) and backend.fp32_out else q.dtype

    out: Tensor | None = None
    lse: Tensor | None = None
    for step in steps:
        if step.rows.max_seqlen_k == 0:
            continue
        if step.heads is not None:
            if out is None or lse is None:
                out, lse = q.new_empty(*q.shape[:2], v_head_dim, dtype=step_dtype), q.new_empty(q.shape[:2], dtype=precise)
            out[:, step.heads], lse[:, step.heads] = _run_heads(q, step, step.heads, backend, options, step_dtype)
        elif out is None or lse is None:
            out, lse = backend.run(q, step.k, step.v, step.rows, options, step_dtype)
            out = out.to(precise) if merges else out
        elif backend.accumulate is not None:
            backend.accumulate(q, step.k, step.v, step.rows, options, out, lse)
        else:
            merge_(out, lse, *backend.run(q, step.k, step.v, step.rows, options, step_dtype))

    if out is None or lse is None:
        out = q.new_zeros(*q.shape[:2], v_head_dim)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=precise)
    if sinks_after and sinks is not None:
        apply_sinks_(out, lse, sinks)
    out = out.to(q.dtype)
    lse = lse.to(torch.float32)
    if q.shape[0] > num_tokens:
        out[num_tokens:] = 0
        lse[num_tokens:] = -torch.inf
    return out, lse


def _run_heads(
    q: Tensor, step: Step, heads: slice, backend: Backend, options: AttentionOptions, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A step that is about some of the query heads, which are the ones its KV heads belong to."""
    if options.sinks is not None:
        options = replace(options, sinks=options.sinks[heads])
    return backend.run(q[:, heads], step.k, step.v, step.rows, options, out_dtype)
