"""Comparing a few queries of each launch with the reference: what ``check=True`` does for a caller's own kernel.

Shapes: n chosen queries, T rows, Hq and Hkv heads, D and Dv head dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.keys_together import keys_together
from cpattn.attention.reference import keys_of, reference_attention
from cpattn.attention.rounding import Sizes, rounding_bounds
from cpattn.device_tables import IntArray
from cpattn.keys import Keys
from cpattn.spans import Spans
from cpattn.stored import result_dtype

# Queries that are compared of a launch; half of them are the first or the last of a span, where masks go wrong.
_MOST = 8
_MOST_ENDS = 4


def verified(backend: Backend, problems: list[str]) -> Backend:
    """A copy of the backend that compares up to 8 queries of each launch with the reference, for which it waits for the
    device. What differs by more than rounding explains becomes a line in ``problems``; it raises nothing of its own.

    >>> from cpattn.attention.custom import custom_backend
    >>> def half_the_lse(q, k, v, rows, *, scale, out_dtype, **options):
    ...     out, lse = reference_attention(q, Keys(k, v), rows, AttentionOptions(scale), out_dtype)
    ...     return out, lse / 2
    >>> problems = []
    >>> backend = verified(custom_backend(half_the_lse), problems)
    >>> q, k, v = torch.randn(3, 4, 2, 8).unbind()
    >>> out, lse = backend.attend(q, Keys(k, v), Spans.build([4], [0], [4], [1]), AttentionOptions(1.0), q.dtype)
    >>> len(problems)
    1
    """

    def attend(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, lse = backend.attend(q, keys, spans, options, out_dtype)
        difference = _difference(q, keys, spans, options, out, lse)
        if difference:
            problems.append(f"backend={backend.name!r}: {difference}")
        return out, lse

    # What it merges by itself could not be told from what it was given.
    return replace(backend, attend=attend, attend_into=None, accumulate=None)


def lse_hint(lse: Tensor, fits: Callable[[Tensor], bool], exchanged: Tensor | None) -> str:
    """What to do about a wrong LSE that would fit in another form; empty if none of these fits.

    Args:
        fits: whether an LSE is the right one.
        exchanged: the LSE with rows and heads exchanged, where there are as many of both.
    """
    if fits(lse * math.log(2)):
        return "; it fits as a log2: make the backend with custom_backend(..., lse_base=2)"
    if fits(lse / math.log(2)):
        return "; it fits as a natural logarithm: make the backend without lse_base=2"
    if exchanged is not None and fits(exchanged):
        return "; it fits with rows and heads exchanged: make the backend with the other lse_heads_first"
    return ""


def _difference(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out: Tensor, lse: Tensor) -> str | None:
    """Where the result is not the reference's, in words; None if it is the same within rounding."""
    sees = spans.sees_keys(options.window)
    queries = chosen_queries(spans, sees.cpu().numpy())
    if not len(queries):
        return None
    index = torch.from_numpy(queries).to(q.device)
    keys, alone = keys_together(keys, _alone(spans, queries))
    # Of queries in fp8 the weights are rounded to it as well.
    rounded = q.dtype
    q = q.to(result_dtype(rounded))
    want, want_lse = reference_attention(q[index], keys, alone, options, torch.promote_types(q.dtype, torch.float32))
    sizes = _sizes(q[index], keys, alone, options, want_lse)
    out_bound, lse_bound = rounding_bounds(sizes, want_lse, rounded, q.shape[2], options.softcap, fast=True)
    lse_wrong = ~_is_close(lse[index], want_lse, lse_bound)
    out_wrong = ~_is_close(out[index], want, out_bound) & ~_nan_of_later_keys(out[index], want, keys, alone)
    wrong = lse_wrong | out_wrong.any(-1)
    if not wrong.any():
        return None
    n, head = (int(i) for i in wrong.nonzero()[0])
    query = int(queries[n])
    span = int(np.searchsorted(spans.host.q_start + spans.host.q_len, query, side="right"))
    error = (out[index][n, head].double() - want[n, head].double()).abs()
    worst = int(torch.where(out_wrong[n, head], error, -1).argmax()) if out_wrong[n, head].any() else int(error.argmax())
    exchanged = lse.T.where(sees, lse.T.new_full((), torch.nan))[index] if lse.shape[0] == lse.shape[1] else None
    # Queries that see nothing have no LSE to compare, in either form.
    usable = want_lse.isfinite() if exchanged is None else want_lse.isfinite() & sees
    fits = bool(usable.any()) and bool(lse_wrong.any())
    hint = lse_hint(lse[index], lambda x: fits and bool((_is_close(x, want_lse, lse_bound) | ~usable).all()), exchanged)
    return (
        f"query {query}, number {query - int(spans.host.q_start[span])} of span {span}, differs from the reference in head {head}: "
        f"LSE {lse[query, head]:.7g} in place of {want_lse[n, head]:.7g} (rounding explains {lse_bound[n, head]:.2g}), "
        f"out[{worst}] {out[query, head, worst]:.4g} in place of {want[n, head, worst]:.4g} "
        f"(rounding explains {out_bound[n, head, worst]:.2g}); "
        f"{int(wrong.sum())} of {wrong.numel()} compared results differ{hint}"
    )


def chosen_queries(spans: Spans, sees: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> IntArray:
    """Up to 8 queries, the same every time: of those that see keys some at the ends of spans and others from all over, and
    one that sees none."""
    host = spans.host
    ends = np.stack([host.q_start, host.q_start + host.q_len - 1], axis=1)[host.q_len > 0].reshape(-1)
    blind = _spread(np.flatnonzero(~sees), 1)
    chosen = [blind, _spread(ends[sees[ends]], _MOST_ENDS), _spread(np.flatnonzero(sees), _MOST - _MOST_ENDS - len(blind))]
    return np.unique(np.concatenate(chosen)).astype(np.int64)


def _spread(x: IntArray, most: int) -> IntArray:
    chosen: IntArray = x[np.linspace(0, len(x) - 1, min(most, len(x))).round().astype(np.int64)]
    return chosen


def _alone(spans: Spans, queries: IntArray) -> Spans:
    """Each query as a span of its own."""
    host = spans.host
    span = np.repeat(np.arange(len(spans)), host.q_len)[queries]
    diagonal = host.diagonal[span] + queries - host.q_start[span]
    return Spans.build(np.ones_like(queries), host.k_start[span], host.k_len[span], diagonal, spans.k_len.device, host.request[span])


def _sizes(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, lse: Tensor) -> Sizes:
    """Of the keys that each single query sees."""
    each = []
    for n, (k_start, k_len, diagonal, request) in enumerate(zip(*(column.tolist() for column in spans.host[2:]), strict=True)):
        sees_to = min(max(diagonal, 0), k_len)
        sees_from = 0 if options.window is None else min(max(0, diagonal - options.window), sees_to)
        seen_k, seen_v = keys_of(keys, request, k_start + sees_from, k_start + sees_to, q.dtype)
        each.append(Sizes.of_query(q[n], seen_k, seen_v, lse[n], options.scale, options.softcap))
    return Sizes(*(torch.stack(column) for column in zip(*each, strict=True)))


def _nan_of_later_keys(out: Tensor, want: Tensor, keys: Keys, spans: Spans) -> Tensor:
    """``[n, Hq, Dv]``: what is NaN because a kernel multiplies values that a query does not see by 0, as they all do within
    a tile: there is NaN in the key range, beyond the query's own keys."""
    stray = out.isnan() & ~want.isnan()
    for n in stray.flatten(1).any(1).nonzero()[:, 0].tolist():
        _, _, k_start, k_len, _, request = (int(column[n]) for column in spans.host)
        if not any(x.isnan().any() for x in keys_of(keys, request, k_start, k_start + k_len, out.dtype)):
            stray[n] = False
    return stray


def _is_close(x: Tensor, want: Tensor, bound: Tensor) -> Tensor:
    """Elementwise: within the bound, the same infinity, or NaN in both."""
    x, want = x.double(), want.double()
    return ((x - want).abs() <= bound) | (x == want) | (x.isnan() & want.isnan())
