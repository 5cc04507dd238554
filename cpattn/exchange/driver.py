"""The driver: takes any strategy's steps through any backend, and merges what they give."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.merge import apply_sinks_, lse_with_nan, merge_, merge_all_
from cpattn.exchange.strategy import Partials, Step, Steps
from cpattn.spans import Spans


class Precision(NamedTuple):
    """In which dtypes a call is computed, which its kinds decide.

    Attributes:
        merged: that results are merged in: fp32, or fp64 for fp64 inputs.
        step: that the backend is asked for.
        native_sinks: whether the backend counts the sinks; else they are put on the finished result.
    """

    merged: torch.dtype
    step: torch.dtype
    native_sinks: bool

    @classmethod
    def of(cls, dtype: torch.dtype, merges: bool, backend: Backend, sinks: bool) -> Precision:
        """Sinks count once a query: natively where there is but one result, else on the merged one."""
        native_sinks = backend.native_sinks and not merges
        merged = torch.promote_types(dtype, torch.float32)
        return cls(merged, merged if (merges or (sinks and not native_sinks)) and backend.fp32_out else dtype, native_sinks)


class Driver:
    """One call's steps through one backend.

    Asking for the next step is what waits for its transfer, so each is computed in its shadow.

    Args:
        q: ``[rows, Hq, D]`` of this rank.
        merges: whether there is more than one result for a query; results then stay fp32 until all are merged.
    """

    def __init__(self, q: Tensor, v_head_dim: int, merges: bool, backend: Backend, options: AttentionOptions, precision: Precision) -> None:
        self._q = q
        self._v_head_dim = v_head_dim
        self._merges = merges
        self._backend = backend
        self._sinks_after = None if precision.native_sinks else options.sinks
        self._options = options if self._sinks_after is None else replace(options, sinks=None)
        self._precise, self._step_dtype = precision.merged, precision.step

    def run(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Returns ``out [rows, Hq, Dv]`` in q's dtype and ``lse [rows, Hq]`` in fp32; 0 and -inf on padding."""
        result: tuple[Tensor, Tensor] | None = None
        answer: tuple[Tensor, Tensor] | None = None
        try:
            while True:
                step = steps.send(answer)
                answer = None
                if isinstance(step, Partials):
                    result = result or self._nothing_seen()
                    merge_all_(*result, step.out, step.lse)
                elif step.q is not None:
                    answer = self._attend(step.q, step, None) or self._nothing_seen(step.q)
                elif step.heads is not None:
                    result = result or self._uninitialised()
                    self._attend_heads(result, step, step.heads)
                else:
                    result = self._attend(self._q, step, result)
        except StopIteration:
            pass
        out, lse = result or self._nothing_seen()
        if self._sinks_after is not None:
            apply_sinks_(out, lse, self._sinks_after)
        # A conversion to the same dtype takes more than a microsecond.
        dtype = self._q.dtype
        return out if out.dtype == dtype else out.to(dtype), lse if lse.dtype == torch.float32 else lse.to(torch.float32)

    def _attend(self, q: Tensor, step: Step, result: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """The result of q after a step, one launch after another; None if there is none so far."""
        for spans in step.spans:
            if step.keys.max_seqlen(spans) == 0:
                continue
            if result is None:
                out, lse = self._partial(q, step, spans)
                result = (out.to(self._precise) if self._merges else out), lse
            elif self._backend.accumulate is not None:
                self._backend.accumulate(q, step.keys, spans, self._options, *result)
            else:
                merge_(*result, *self._partial(q, step, spans))
        return result

    def _partial(self, q: Tensor, step: Step, spans: Spans) -> tuple[Tensor, Tensor]:
        out, lse = self._backend.attend(q, step.keys, spans, self._options, self._step_dtype)
        # A merge would pass over NaN with an LSE of -inf, as over a query without keys.
        return out, lse_with_nan(out, lse) if self._merges and not self._backend.propagates_nan else lse

    def _attend_heads(self, result: tuple[Tensor, Tensor], step: Step, heads: slice) -> None:
        """A step that is about some of the query heads, which are the ones its KV heads belong to."""
        options = self._options
        if options.sinks is not None:
            options = replace(options, sinks=options.sinks[heads])
        (spans,) = step.spans
        out, lse = result
        if step.keys.max_seqlen(spans):
            out[:, heads], lse[:, heads] = self._backend.attend(self._q[:, heads], step.keys, spans, options, self._step_dtype)
        else:
            out[:, heads], lse[:, heads] = 0, -torch.inf

    def _uninitialised(self) -> tuple[Tensor, Tensor]:
        rows, heads, _ = self._q.shape
        out = self._q.new_empty(rows, heads, self._v_head_dim, dtype=self._step_dtype)
        return out, self._q.new_empty(rows, heads, dtype=self._precise)

    def _nothing_seen(self, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, heads, _ = (self._q if q is None else q).shape
        out = self._q.new_zeros(rows, heads, self._v_head_dim, dtype=self._precise)
        return out, self._q.new_full((rows, heads), -torch.inf, dtype=self._precise)
