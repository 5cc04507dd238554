"""What a strategy attends with: any backend, and the merging of what it gives.

Results stay fp32 until all are merged; sinks count once a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.merge import apply_sinks_, lse_with_nan, merge_for
from cpattn.attention.one_step import in_one_step, into_in_one_step
from cpattn.errors import CPError
from cpattn.keys import Keys
from cpattn.moves.wide_copy import copy_wide_
from cpattn.noted import launch, of_thread
from cpattn.spans import Spans


class Attention(NamedTuple):
    """How the attention of a kind of call is computed.

    Attributes:
        backend: that computes it.
        options: scale, window, softcap; sinks come with each layer.
        v_head_dim: of the result.
        merges: whether there is more than one result for a query.
        dtype: of q and of what is returned.
        merged: the dtype that results are merged in: fp32, or fp64 for fp64 inputs.
        step: the dtype that the backend is asked for.
        native_sinks: whether the backend counts the sinks; else they are put on the finished result.
        in_one_step: whether a call that is noted has what the backend launches as one step, as it says nothing of it itself.
    """

    backend: Backend
    options: AttentionOptions
    v_head_dim: int
    merges: bool
    dtype: torch.dtype
    merged: torch.dtype
    step: torch.dtype
    native_sinks: bool
    in_one_step: bool = False

    @classmethod
    def of(cls, backend: Backend, options: AttentionOptions, v_head_dim: int, merges: bool, dtype: torch.dtype, sinks: bool) -> Attention:
        native_sinks = backend.native_sinks and not merges
        merged = torch.promote_types(dtype, torch.float32)
        step = merged if (merges or (sinks and not native_sinks)) and backend.fp32_out else dtype
        return cls(backend, options, v_head_dim, merges, dtype, merged, step, native_sinks)


class Attend:
    """One call's attention: ``attend(keys, spans)`` lets this rank's queries see some keys, and merges with what they have
    seen before.

    Args:
        how: to compute it.
        q: ``[rows, Hq, D]`` of this rank.
        sinks: ``[Hq]`` in ``how.merged``, or None.
        scales: fp32 ``[Hkv]`` of K and of V, by which heads of stored keys are multiplied; None where there are none, or the keys have
            them.
    """

    __slots__ = ("_accumulate", "_attend_into", "_how", "_launch", "_lse", "_options", "_out", "_q", "_scales", "_sinks", "_sinks_after")

    def __init__(self, how: Attention, q: Tensor, sinks: Tensor | None, scales: tuple[Tensor, Tensor] | None = None) -> None:
        self._how = how
        self._q = q
        self._launch, self._accumulate, self._attend_into = how.backend.attend, how.backend.accumulate, how.backend.attend_into
        if how.in_one_step and of_thread.steps is not None:
            self._launch = in_one_step(self._launch)
            self._attend_into = None if self._attend_into is None else into_in_one_step(self._attend_into)
        self._scales = scales
        self._options, self._sinks, self._sinks_after = how.options, sinks, sinks
        if sinks is not None and how.native_sinks:
            self._options, self._sinks_after = replace(how.options, sinks=sinks), None
        # What this rank's queries have seen so far; None before the first result.
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def __call__(self, keys: Keys, spans: Spans) -> None:
        """This rank's queries over some keys, in one launch."""
        if spans.max_seqlen_k == 0:
            return
        if self._out is not None and not self._how.merges:
            raise CPError("a strategy has attended twice with the same queries, but its schedule says that there is one result")
        self._out, self._lse = self._seen(self._q, keys, spans, self._options, self._out, self._lse)

    def heads(self, keys: Keys, spans: Spans, heads: slice) -> None:
        """The same for some of the query heads, all that there is for them: the keys are of their KV heads alone."""
        if self._out is None or self._lse is None:
            rows, q_heads, _ = self._q.shape
            self._out = self._q.new_empty(rows, q_heads, self._how.v_head_dim, dtype=self._how.step)
            self._lse = self._q.new_empty(rows, q_heads, dtype=self._how.merged)
        if spans.max_seqlen_k:
            scales = self._scales_of(heads)
            if scales is not None:
                keys = keys._replace(k_scale=scales[0], v_scale=scales[1])
            of_heads = self._q[:, heads], keys, spans, self._options_of(heads)
            if self._attend_into is not None:
                self._attend_into(*of_heads, self._out[:, heads], self._lse[:, heads])
            else:
                part, self._lse[:, heads] = self._launch(*of_heads, self._how.step)
                launch(copy_wide_, self._out[:, heads], part)
        else:
            self._out[:, heads].fill_(0)
            self._lse[:, heads].fill_(-torch.inf)

    def others(self, q: Tensor, keys: Keys, launches: Sequence[Spans], heads: slice | None = None) -> tuple[Tensor, Tensor]:
        """The partial result of other ranks' queries, to be sent back: out ``[n, heads, Dv]`` as precise as the backend gives
        it, and lse ``[n, heads]``.

        Args:
            q: ``[n, heads, D]``.
            launches: spans over all of q, one launch after another; the results are merged.
            heads: which of the query heads q has, if not all.
        """
        out: Tensor | None = None
        lse: Tensor | None = None
        options = self._options if heads is None else self._options_of(heads)
        for spans in launches:
            if spans.max_seqlen_k:
                out, lse = self._seen(q, keys, spans, options, out, lse)
        if out is None or lse is None:
            return self._nothing_seen(q)
        if not self._how.merges and not self._how.backend.propagates_nan:
            # Whoever gets it merges it with nothing, and would take NaN with an LSE of -inf for a query without keys.
            lse = launch(lse_with_nan, out, lse)
        return out, lse

    def merge(self, out: Tensor, lse: Tensor) -> None:
        """What this rank's queries have seen elsewhere: out ``[parts, rows, Hq, Dv]``, lse ``[parts, rows, Hq]``."""
        if self._out is None or self._lse is None:
            self._out, self._lse = self._nothing_seen(self._q)
        merge_for(self._out.device, self._out.dtype)(self._out, self._lse, out, lse)

    def of_heads(self, q: Tensor, heads: slice) -> Attend:
        """The attention of other ranks' queries as well, with some of the query heads: q is ``[n, heads, D]``."""
        return Attend(self._how, q, None if self._sinks is None else self._sinks[heads], self._scales_of(heads))

    def finish(self, out: Tensor, lse: Tensor) -> None:
        """The result of this rank's queries, complete and with sinks, which was computed elsewhere: out ``[rows, Hq, Dv]`` in q's dtype,
        and lse ``[rows, Hq]``."""
        self._out, self._lse, self._sinks_after = out, lse, None

    def result(self, into: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``out [rows, Hq, Dv]`` in q's dtype, ``into`` if that is given, and ``lse [rows, Hq]`` in fp32; 0 and -inf for queries
        that saw nothing."""
        out, lse = self._out, self._lse
        if out is None or lse is None:
            out, lse = self._nothing_seen(self._q)
        if self._sinks_after is not None:
            launch(apply_sinks_, out, lse, self._sinks_after)
        out = _in_dtype(out, self._how.dtype) if into is None else into.copy_(out)
        return out, _in_dtype(lse, torch.float32)

    def _seen(
        self, q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out: Tensor | None, lse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What queries have seen after one launch more: its result, merged into what there was before."""
        how = self._how
        if self._scales is not None:
            keys = keys._replace(k_scale=self._scales[0], v_scale=self._scales[1])
        if out is not None and lse is not None and self._accumulate is not None:
            self._accumulate(q, keys, spans, options, out, lse)
            return out, lse
        part, part_lse = self._launch(q, keys, spans, options, how.step)
        if how.merges and not how.backend.propagates_nan:
            # A merge would pass over NaN with an LSE of -inf, as over a query without keys.
            part_lse = launch(lse_with_nan, part, part_lse)
        if out is None or lse is None:
            return _in_dtype(part, how.merged) if how.merges else part, part_lse
        merge_for(out.device, out.dtype)(out, lse, part, part_lse)
        return out, lse

    def _options_of(self, heads: slice) -> AttentionOptions:
        sinks = self._options.sinks
        return self._options if sinks is None else replace(self._options, sinks=sinks[heads])

    def _scales_of(self, heads: slice) -> tuple[Tensor, Tensor] | None:
        """Those of the KV heads of some query heads."""
        if self._scales is None:
            return None
        k_scale, v_scale = self._scales
        group = self._q.shape[1] // len(k_scale)
        kv_heads = slice(heads.start // group, heads.stop // group)
        return k_scale[kv_heads], v_scale[kv_heads]

    def _nothing_seen(self, q: Tensor) -> tuple[Tensor, Tensor]:
        out = q.new_empty(q.shape[0], q.shape[1], self._how.v_head_dim, dtype=self._how.merged)
        return out.fill_(0), q.new_empty(q.shape[:2], dtype=self._how.merged).fill_(-torch.inf)


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    # A conversion to the same dtype takes more than a microsecond.
    return x if x.dtype == dtype else torch.empty_like(x, dtype=dtype).copy_(x)
