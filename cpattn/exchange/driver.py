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
        if out is not None and lse is not None and backend.accumulate is not None:
            backend.accumulate(q, step.k, step.v, step.rows, options, out, lse)
            continue
        step_out, step_lse = backend.run(q, step.k, step.v, step.rows, options, step_dtype)
        if out is None or lse is None:
            out, lse = (step_out.to(precise) if merges else step_out), step_lse
        else:
            merge_(out, lse, step_out, step_lse)

    if out is None or lse is None:
        out = q.new_zeros(len(q), q.shape[1], v_head_dim)
        lse = q.new_full((len(q), q.shape[1]), -torch.inf, dtype=torch.float32)
    if sinks_after and sinks is not None:
        apply_sinks_(out, lse, sinks)
    out = out.to(q.dtype)
    lse = lse.to(torch.float32)
    if len(q) > num_tokens:
        out[num_tokens:] = 0
        lse[num_tokens:] = -torch.inf
    return out, lse
