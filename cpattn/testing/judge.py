"""What spans mean, in float64, and whether a kernel's result is that within rounding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.rounding import Sizes, rounding_bounds
from cpattn.attention.verify import lse_hint
from cpattn.keys import Keys
from cpattn.moves.torch_quantize import meaning
from cpattn.spans import Spans


class Trial(NamedTuple):
    """What a kernel is given, as :class:`cpattn.attention.backend.AttentionFunction` has it.

    Attributes:
        parts: the spans of further launches over the same queries, each over some of the keys; their merged results are
            the result of ``spans``. Empty where there is one launch.
    """

    q: Tensor
    keys: Keys
    spans: Spans
    options: AttentionOptions
    parts: list[Spans]


class Truth(NamedTuple):
    """The right result in float64 on the CPU, and the sizes of what each query sees."""

    out: Tensor
    lse: Tensor
    sizes: Sizes


def spans_attention(trial: Trial) -> Truth:
    """A query at a time, with the words of :class:`Spans` and :class:`Keys`."""
    given = trial.keys
    k_scale, v_scale = (None if scale is None else scale.cpu() for scale in (given.k_scale, given.v_scale))
    k, v = (meaning(x.detach().cpu(), scale, trial.q.dtype).double() for x, scale in ((given.k, k_scale), (given.v, v_scale)))
    q = trial.q.detach().cpu().double()
    options, table = trial.options, None if trial.keys.page_table is None else trial.keys.page_table.cpu().long()
    sinks = None if options.sinks is None else options.sinks.cpu().double()
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_full(q.shape[:2], -torch.inf) if sinks is None else sinks.expand(q.shape[:2]).clone()
    sizes = Sizes(*(torch.zeros_like(x) for x in (lse, lse, out, out, lse[:, :1])))
    for q_start, q_len, k_start, k_len, diagonal, request in zip(*(column.tolist() for column in trial.spans.host), strict=True):
        for j in range(q_len):
            sees_to = min(max(diagonal + j, 0), k_len)
            sees_from = 0 if options.window is None else max(0, diagonal + j - options.window)
            if sees_to <= sees_from:
                continue
            key = torch.arange(k_start + sees_from, k_start + sees_to)
            place = key if table is None else (table[request, key // k.shape[1]], key % k.shape[1])
            keys, values = (x[place].repeat_interleave(q.shape[1] // x.shape[-2], dim=1) for x in (k, v))
            scores = torch.einsum("hd,nhd->hn", q[q_start + j], keys) * options.scale
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            logits = scores if sinks is None else torch.cat([scores, sinks[:, None]], dim=1)
            lse[q_start + j] = torch.logsumexp(logits, dim=1)
            out[q_start + j] = torch.einsum("hn,nhd->hd", torch.softmax(logits, dim=1)[:, : len(key)], values)
            of_query = Sizes.of_query(q[q_start + j], k[place], v[place], lse[q_start + j], options.scale, options.softcap)
            for size, of_all in zip(of_query, sizes, strict=True):
                of_all[q_start + j] = size
    return Truth(out, lse, sizes)


def why_wrong(trial: Trial, truth: Truth, out: Tensor, lse: Tensor) -> str | None:
    """In what a result is not the truth, and by how much; None if rounding explains the difference.

    Each LSE and each element of the output is judged by itself. What only GPUs round is allowed on a GPU alone.
    """
    is_gpu, (dtype, head_dim) = trial.q.is_cuda, (trial.q.dtype, trial.q.shape[2])
    out, lse = out.cpu().double(), lse.cpu().double()
    sees = trial.spans.sees_keys(trial.options.window).cpu()
    reason = _blind_wrong(out[~sees], lse[~sees], truth.lse[~sees])
    if reason:
        return reason
    if not sees.any():
        return None
    reason = _nan_wrong(out[sees], lse[sees], truth.out[sees], truth.lse[sees])
    if reason:
        return reason
    out_bound, lse_bound = rounding_bounds(
        truth.sizes, truth.lse, dtype, head_dim, trial.options.softcap, fast=is_gpu, launches=max(len(trial.parts), 1)
    )
    return _lse_wrong(truth, lse, lse_bound, sees) or _out_wrong(truth, out, out_bound, sees)


def _blind_wrong(out: Tensor, lse: Tensor, want_lse: Tensor) -> str | None:
    """Queries that see nothing: exactly 0, and exactly -inf; or the sink, which may have been in base 2 in between."""
    wrong = (out != 0).any(-1)
    if wrong.any():
        return f"a query that sees no key has out {out[wrong][0].abs().max():.3g}, which must be 0"
    is_sink = want_lse.isfinite() & ((lse - want_lse).abs() <= 4 * torch.finfo(torch.float32).eps * want_lse.abs())
    wrong = (lse != want_lse) & ~is_sink
    if wrong.any():
        return f"a query that sees no key has LSE {lse[wrong][0]:.4g}, which must be {want_lse[wrong][0]:.4g}"
    return None


def _nan_wrong(out: Tensor, lse: Tensor, want: Tensor, want_lse: Tensor) -> str | None:
    """NaN where the truth is NaN, and nowhere else."""
    hidden = want_lse.isnan() & ~(lse.isnan() & out.isnan().all(-1))
    if hidden.any():
        return (
            f"{int(hidden.sum())} of {int(want_lse.isnan().sum())} results over keys with NaN are not NaN: one has LSE "
            f"{lse[hidden][0]:.4g}, out {out[hidden][0][0]:.4g}"
        )
    stray = (out.isnan() & ~want.isnan()).any(-1) | (~lse.isfinite() & want_lse.isfinite())
    if stray.any():
        return f"{int(stray.sum())} of {stray.numel()} results are not finite: one has LSE {lse[stray][0]:.4g}, out {out[stray][0][0]:.4g}"
    return None


def _lse_wrong(truth: Truth, lse: Tensor, bound: Tensor, sees: Tensor) -> str | None:
    usable = truth.lse.isfinite() & sees[:, None]

    def excess_of(x: Tensor, where: Tensor) -> Tensor:
        # What is not finite is no near miss: it counts as a large error.
        return torch.where(where, (x - truth.lse).abs().nan_to_num(torch.inf) - bound, 0)

    excess = excess_of(lse, usable)
    if float(excess.max()) <= 0:
        return None
    query, head = divmod(int(excess.argmax()), lse.shape[1])
    square = lse.shape[0] == lse.shape[1]
    # Where rows and heads were exchanged, rows that see nothing have been overwritten.
    judged = usable & sees if square else usable
    hint = lse_hint(lse, lambda x: float(excess_of(x, judged).max()) <= 0, lse.T if square else None)
    got, want = lse[query, head], truth.lse[query, head]
    return (
        f"LSE {got:.7g} where {want:.7g} is right (query {query}, head {head}): off by {(got - want).abs():.2g}, "
        f"rounding explains {bound[query, head]:.2g}{hint}"
    )


def _out_wrong(truth: Truth, out: Tensor, bound: Tensor, sees: Tensor) -> str | None:
    usable = (truth.lse.isfinite() & sees[:, None])[..., None] & ~truth.out.isnan()
    excess = torch.where(usable, (out - truth.out).abs() - bound, 0)
    if float(excess.max()) <= 0:
        return None
    query, head, column = (int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))
    got, want = out[query, head, column], truth.out[query, head, column]
    return (
        f"out[{column}] of query {query}, head {head}, is {got:.6g} where {want:.6g} is right: off by {(got - want).abs():.2g}, "
        f"rounding explains {bound[query, head, column]:.2g}"
    )
