"""What rows of attention work mean, in float64, and whether a kernel's result is that within rounding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.rows import RaggedRows
from cpattn.attention.verify import TANH_ERROR, TF32_EPS, lse_hint
from cpattn.testing.tolerance import rmse_bound, single_device_bound


class Problem(NamedTuple):
    """What a kernel is given, as :class:`cpattn.attention.backend.AttentionFunction` has it.

    Attributes:
        parts: the rows of further launches over the same queries, each over some of the keys; their merged results are
            the result of ``rows``. Empty where there is one launch.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: RaggedRows
    options: AttentionOptions
    parts: list[RaggedRows]


class Truth(NamedTuple):
    """The right result in float64 on the CPU, and the size of the largest score in it."""

    out: Tensor
    lse: Tensor
    score_size: float


def rows_attention(problem: Problem) -> Truth:
    """A query at a time, with the words of :class:`RaggedRows`."""
    q, k, v = (x.detach().cpu().double() for x in problem[:3])
    rows, options = problem.rows, problem.options
    table = None if rows.page_table is None else rows.page_table.cpu().long()
    sinks = None if options.sinks is None else options.sinks.cpu().double()
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_full(q.shape[:2], -torch.inf) if sinks is None else sinks.expand(q.shape[:2]).clone()
    score_size = 0.0
    for q_start, q_len, k_start, k_len, diagonal, request in zip(*(column.tolist() for column in rows.host), strict=True):
        for j in range(q_len):
            sees_to = min(max(diagonal + j, 0), k_len)
            sees_from = 0 if options.window is None else max(0, diagonal + j - options.window)
            if sees_to <= sees_from:
                continue
            key = torch.arange(k_start + sees_from, k_start + sees_to)
            place = key if table is None else (table[request, key // k.shape[1]], key % k.shape[1])
            keys, values = (x[place].repeat_interleave(q.shape[1] // x.shape[-2], dim=1) for x in (k, v))
            scores = torch.einsum("hd,nhd->hn", q[q_start + j], keys) * options.scale
            score_size = max(score_size, float(scores.nan_to_num().abs().max()))
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            logits = scores if sinks is None else torch.cat([scores, sinks[:, None]], dim=1)
            lse[q_start + j] = torch.logsumexp(logits, dim=1)
            out[q_start + j] = torch.einsum("hn,nhd->hd", torch.softmax(logits, dim=1)[:, : len(key)], values)
    return Truth(out, lse, score_size)


def why_wrong(problem: Problem, truth: Truth, out: Tensor, lse: Tensor) -> str | None:
    """In what a result is not the truth, and by how much; None if rounding explains the difference.

    Each query and head is judged by itself: its LSE, and the root mean square error of its output.
    """
    out, lse = out.cpu().double(), lse.cpu().double()
    sees = problem.rows.sees_keys(problem.options.window).cpu()
    reason = _blind_wrong(out[~sees], lse[~sees], truth.lse[~sees])
    if reason:
        return reason
    if not sees.any():
        return None
    reason = _nan_wrong(out[sees], lse[sees], truth.out[sees], truth.lse[sees])
    if reason:
        return reason
    return _lse_wrong(problem, truth, lse, sees) or _out_wrong(problem, truth, out, sees)


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


def _lse_wrong(problem: Problem, truth: Truth, lse: Tensor, sees: Tensor) -> str | None:
    bound = _lse_bound(problem, truth)
    usable = truth.lse.isfinite() & sees[:, None]

    def error_of(x: Tensor, where: Tensor) -> Tensor:
        # What is not finite is no near miss: it counts as a large error.
        return torch.where(where, (x - truth.lse).abs().nan_to_num(torch.inf), 0)

    error = error_of(lse, usable)
    if float(error.max()) <= bound:
        return None
    query, head = divmod(int(error.argmax()), lse.shape[1])
    square = lse.shape[0] == lse.shape[1]
    # Where rows and heads were exchanged, rows that see nothing have been overwritten.
    judged = usable & sees if square else usable
    hint = lse_hint(lse, lambda x: float(error_of(x, judged).max()) <= bound, lse.T if square else None)
    return (
        f"LSE {lse[query, head]:.7g} where {truth.lse[query, head]:.7g} is right (query {query}, head {head}): off by "
        f"{float(error.max()):.2g}, rounding explains {bound:.2g}{hint}"
    )


def _out_wrong(problem: Problem, truth: Truth, out: Tensor, sees: Tensor) -> str | None:
    bound = _out_bound(problem, truth)
    info = torch.finfo(problem.q.dtype)
    # Weights below the smallest normal number have an absolute error, as has such a result.
    grain = problem.rows.max_seqlen_k * info.smallest_normal * info.eps
    usable = (truth.lse.isfinite() & sees[:, None])[..., None]
    want = torch.where(usable, truth.out, 0)
    error = (torch.where(usable, out, 0) - want).square().mean(-1).sqrt()
    size = want.square().mean(-1).sqrt()
    excess = error - grain - bound * size
    if float(excess.max()) <= 0:
        return None
    query, head = divmod(int(excess.argmax()), out.shape[1])
    relative = float(error[query, head] / size[query, head]) if size[query, head] else torch.inf
    return f"out of query {query}, head {head}, is off by {relative:.2g} of its size, rounding explains {bound:.2g}"


def _sizes(truth: Truth) -> float:
    """The largest score or LSE, of which fp32 knows so many units."""
    finite = truth.lse[truth.lse.isfinite()]
    return max(truth.score_size, float(finite.abs().max()) if finite.numel() else 0.0)


def _score_error(problem: Problem, truth: Truth) -> float:
    """Of the scores on a GPU: fp32 may be multiplied as TF32, q and k each rounded, and a softcap has its tanh."""
    if not problem.q.is_cuda:
        return 0.0
    tf32 = 2 * TF32_EPS if problem.q.dtype == torch.float32 else 0.0
    tanh = 0.0 if problem.options.softcap is None else TANH_ERROR
    return (tf32 + tanh) * max(truth.score_size, 1.0)


def _lse_bound(problem: Problem, truth: Truth) -> float:
    """The rounding of one device, and that of a sum of D products, which each score is."""
    precise = torch.promote_types(problem.q.dtype, torch.float32)
    one = single_device_bound(precise, truth.lse, _sizes(truth)) + problem.q.shape[2] * torch.finfo(precise).eps / 2
    return _merged(one, precise, problem, truth) + _score_error(problem, truth)


def _out_bound(problem: Problem, truth: Truth) -> float:
    """As of the LSE; and in half precision the rounding of the weights and of the result."""
    dtype = problem.q.dtype
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    one = single_device_bound(dtype, truth.lse, _sizes(truth)) + problem.q.shape[2] * unit
    weights = 2 * TF32_EPS if dtype == torch.float32 and problem.q.is_cuda else 0.0
    return _merged(one, dtype, problem, truth) + 2 * _score_error(problem, truth) + weights


def _merged(one: float, dtype: torch.dtype, problem: Problem, truth: Truth) -> float:
    """Partial results that come in half precision carry its error each, and the merged one that of being rounded again."""
    if not problem.parts:
        return one
    own = one * 2**0.5 if dtype.itemsize < 4 else one
    return rmse_bound(own, dtype, len(problem.parts), truth.lse, _sizes(truth))
