"""What a backend is: a function from queries, keys and spans to (out, LSE), and what it can do as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from cpattn.attention.ragged_rows import RaggedRows
from cpattn.errors import OptionError
from cpattn.keys import Keys
from cpattn.options import AttentionOptions as AttentionOptions
from cpattn.problem import Problem
from cpattn.spans import Alignment, Spans


class AccumulateFunction(Protocol):
    """As :class:`AttentionFunction`, but merges its result into ``acc [T, Hq, Dv]`` and ``lse [T, Hq]``, both fp32, in
    place: what other keys gave. So a ring needs no pass of its own for merging."""

    def __call__(self, q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, acc: Tensor, lse: Tensor) -> None: ...


class AttendIntoFunction(Protocol):
    """As :class:`AttentionFunction`, but writes its result to ``out [T, Hq, Dv]`` and ``lse [T, Hq]``, fp32, which may be some of the
    heads of a larger result."""

    def __call__(self, q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out: Tensor, lse: Tensor) -> None: ...


class AttentionFunction(Protocol):
    """Attention over spans.

    Args:
        q: ``[T, Hq, D]``, of a floating dtype; the last axis is contiguous, the others may be strided.
        keys: K and V of the same dtype, or pages of a size that the backend reads; V may be a view of K's first columns.
        spans: the work; it covers all of q, padding as queries without keys.
        options: scale, window, softcap, sinks.
        out_dtype: the dtype to return ``out`` in: q's, or fp32 where the result will be merged with others.

    Returns:
        ``out [T, Hq, Dv]`` and ``lse [T, Hq]`` (natural log, sinks included; fp32, or fp64 for fp64 inputs). A query that
        sees no key gets out 0 and LSE -inf (with sinks: the sink), whatever it holds itself.
    """

    def __call__(self, q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Backend:
    """A varlen attention kernel and what it can do. ``backend=`` takes one as it takes a name.

    Attributes:
        name: what ``backend=`` takes.
        attend: the kernel's wrapper, ``(q, keys, spans, options, out_dtype) -> (out, lse)``: q is ``[T, Hq, D]``, keys are
            :class:`cpattn.Keys`, spans :class:`cpattn.Spans`, options :class:`cpattn.AttentionOptions`; out is ``[T, Hq, Dv]`` in
            ``out_dtype``, lse fp32 ``[T, Hq]``, natural log (fp64 for fp64 inputs). A query that sees no key gets 0 and -inf.
        device_types: of the tensors that it takes; None for any.
        dtypes: that it takes.
        alignments: of spans that it can express; see :data:`cpattn.spans.Alignment`.
        window, softcap: whether it has these. Sinks need no flag: where a backend lacks them, they are applied to
            its result (``native_sinks`` says whether it has its own).
        v_head_dim: whether Dv may differ from D.
        fp32_out: whether it can return its result in fp32, so that merging loses nothing.
        reads_pages: whether it can attend to pages of the call's size as they are; else it is given a packed copy.
        reads_stored: whether it attends to keys that are stored in another dtype than q's, fp8 with scales included; else it is given a
            packed copy in q's dtype.
        fp8_queries: whether it takes queries in fp8 over keys in fp8 whose heads have scales; its result is then in bf16.
        waits_for_keys: whether its launches over keys in order may run while :attr:`cpattn.keys.Keys.arrivals` still come.
        reads_in_place: whether it attends to keys where they lie, beside those in order, in one launch: :class:`cpattn.keys.PrefixKeys` and
            :class:`cpattn.keys.OwnRows`. Where V is a part of K, or keys are stored in another dtype than q's, they lie in one place.
        loops_on_host: whether its launches follow from the spans' lengths, which a CUDA graph would freeze.
        propagates_nan: whether the LSE of a query whose scores are NaN is NaN. FlashAttention kernels say for it what they
            say for a query without keys.
        accumulate: the kernel's way of merging into an earlier result, if it has one: ``(q, keys, spans, options, acc, lse)``
            changes acc and lse in place, both fp32.
        attend_into: the kernel's way of writing a result to memory that is there, if it has one: ``(q, keys, spans, options, out, lse)``.
            Where heads are attended to in groups, it spares a copy of each group's result.
        unavailable: a reason why it cannot be used on this machine at all, or None; asked for when needed.
        refuses: a further reason that this call cannot be served, or None.
        refuses_head_dims: a reason that these head dims cannot be served, or None: of ``(head_dim, v_head_dim, major)``, where
            major is that of a GPU's compute capability. It tells of GPUs that are not here; ``refuses`` says the same of one that is.
        describe: what the installed package is and lacks, in a line for ``cpattn env``, or None; asked for when needed.
        callers: whether what it returns is checked in every call, and compared with the reference by ``check=True``. Leave it
            alone: it is set for whatever is not one of :data:`cpattn.BACKENDS`.
        how: what :func:`cpattn.explain` says of how it serves a call, or None.

    Raises:
        OptionError: it was made with ``run=``, which was a function of ``(q, k, v, rows, ...)``.
    """

    name: str
    attend: AttentionFunction
    device_types: frozenset[str] | None
    dtypes: frozenset[torch.dtype]
    alignments: frozenset[Alignment]
    window: bool
    softcap: bool
    native_sinks: bool
    v_head_dim: bool
    fp32_out: bool
    reads_pages: Callable[[Problem], bool] = lambda problem: False
    reads_stored: Callable[[Problem], bool] = lambda problem: False
    fp8_queries: Callable[[Problem], bool] = lambda problem: False
    waits_for_keys: Callable[[Problem], bool] = lambda problem: False
    reads_in_place: Callable[[Problem], bool] = lambda problem: False
    loops_on_host: bool = False
    propagates_nan: bool = True
    accumulate: AccumulateFunction | None = None
    attend_into: AttendIntoFunction | None = None
    unavailable: Callable[[], str | None] = lambda: None
    refuses: Callable[[Problem], str | None] = lambda problem: None
    refuses_head_dims: Callable[[int, int, int], str | None] = lambda head_dim, v_head_dim, major: None
    describe: Callable[[], str | None] = lambda: None
    callers: bool = False
    how: Callable[[Problem], str | None] = lambda problem: None

    def __new__(cls, *arguments: Any, **named: Any) -> Backend:
        """A new one; only to say what has taken the place of ``run=``."""
        if "run" in named:
            raise OptionError(
                "Backend(run=...) was removed; pass attend=, a function (q, keys, spans, options, out_dtype) -> (out, lse), or make the "
                "backend of a function (q, k, v, rows, **options) with cpattn.custom_backend"
            )
        return super().__new__(cls)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, options: AttentionOptions, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """``attend`` with what a caller's kernel is given: k and v as they are, and rows that have their page table.

        >>> import cpattn
        >>> q, k, v = torch.randn(3, 4, 2, 8).unbind()
        >>> rows = cpattn.RaggedRows.build(q_len=[4], k_start=[0], k_len=[4], diagonal=[1])
        >>> out, lse = cpattn.BACKENDS["reference"].run(q, k, v, rows, AttentionOptions(scale=8**-0.5), q.dtype)
        >>> out.shape, lse.shape
        (torch.Size([4, 2, 8]), torch.Size([4, 2]))
        """
        return self.attend(q, Keys(k, v, rows.page_table), rows, options, out_dtype)

    def attends_to_pages(self, problem: Problem) -> bool:
        """Whether it is given the pages of a call as they are."""
        return self.reads_pages(problem) and (problem.stored_dtype == problem.dtype or self.reads_stored(problem))

    def takes_several_places(self, problem: Problem) -> bool:
        """Whether it is given keys of a call where they lie, beside those in order: never a V that is a part of K, nor stored keys."""
        is_plain = not (problem.v_in_k or problem.expands) and problem.stored_dtype == problem.dtype
        return is_plain and self.reads_in_place(problem)

    def why_not(self, problem: Problem, alignments: frozenset[Alignment]) -> str | None:
        """The reason why this backend cannot serve a call with spans of these alignments, or None if it can."""
        if self.device_types is not None and problem.device.type not in self.device_types:
            return f"it runs on {'/'.join(sorted(self.device_types))} tensors, not on {problem.device.type} ones"
        reason = self.unavailable()
        if reason:
            return reason
        if problem.dtype not in self.dtypes:
            known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
            return f"it takes {known}, not {str(problem.dtype).removeprefix('torch.')}"
        if problem.q_dtype is not None and not self.fp8_queries(problem):
            return f"it takes no queries in {str(problem.q_dtype).removeprefix('torch.')}"
        if problem.window and not self.window:
            return "it has no sliding window"
        if problem.softcap and not self.softcap:
            return "it has no softcap"
        if problem.head_dim != problem.v_head_dim and not self.v_head_dim:
            return f"it needs v's head_dim to be that of q and k ({problem.v_head_dim} is not {problem.head_dim})"
        if not alignments <= self.alignments:
            needed = ", ".join(sorted(alignments - self.alignments))
            return f"the strategy has spans of alignment {needed!r}, which it cannot express"
        if problem.fixed and self.loops_on_host and problem.device.type == "cuda":
            return "its launches follow from the batch, and a bucket is for graphs that replay other batches"
        if problem.fixed and problem.page_size is not None and not self.attends_to_pages(problem):
            stored = "" if problem.stored_dtype == problem.dtype else f" in {str(problem.stored_dtype).removeprefix('torch.')}"
            return f"it cannot read pages of {problem.page_size} tokens{stored}, and a bucket's graph cannot copy what changes in size"
        return self.refuses(problem)


# That of __new__ says nothing.
Backend.__signature__ = signature(Backend.__init__)  # type: ignore[attr-defined]
