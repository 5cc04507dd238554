"""An engine's own attention kernel as a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.ragged_rows import RaggedRows
from cpattn.attention.returned import check_returned
from cpattn.errors import OptionError
from cpattn.keys import Keys
from cpattn.spans import Alignment, Spans

AttentionCallable: TypeAlias = Callable[..., tuple[Tensor, Tensor]]

_ALIGNMENTS: frozenset[Alignment] = frozenset({"bottom_right", "full", "any"})


def custom_backend(
    function: AttentionCallable,
    *,
    name: str | None = None,
    alignments: Iterable[Alignment] = _ALIGNMENTS,
    page_sizes: Callable[[int], bool] | None = None,
    reads_stored: bool = False,
    lse_base: float = math.e,
    lse_heads_first: bool = False,
) -> Backend:
    """A backend made of a function ``(q, k, v, rows, **options) -> (out, lse)``. ``backend=function`` alone does the same
    with what is the default here.

    The function is called as ``function(q, k, v, rows, scale=, window=, softcap=, sinks=, out_dtype=)``:

    - q ``[rows, Hq, D]``, k ``[S, Hkv, D]``, v ``[S, Hkv, Dv]``, or pages where ``rows.page_table`` is given; which query
      sees which keys is said by ``rows`` (:class:`cpattn.RaggedRows`).
    - ``window``, ``softcap`` and ``sinks`` are None where the call has none. A kernel that lacks one must raise for it.
    - k and v are in q's dtype: of pages in another one it gets a copy, unless ``reads_stored`` says that it reads those. Then it is called
      with ``k_scale=`` and ``v_scale=`` as well: fp32 ``[Hkv]``, or one a token and head, ``[S, Hkv]`` or in pages ``[num_pages,
      page_size, Hkv]``, or None where k and v are no fp8.
    - It returns a pair (out, lse). out is ``[rows, Hq, Dv]`` of any floating dtype; ``out_dtype`` is what is best for the
      result: fp32 where it will be merged. lse is ``[rows, Hq]``, natural log, fp32 (fp64 for fp64 inputs); ``lse_base``
      and ``lse_heads_first`` say where a kernel differs.
    - Queries without keys, such as padding, may be given anything: ``rows.sees_keys`` says which they are. A query that
      sees keys and has an LSE of +inf or -inf gets NaN: kernels give that where its scores are NaN.

    What it returns is checked in every call, without waiting for the device. ``check_backend``, of the testing package,
    tries all that strategies will ask of it.

    >>> import cpattn, torch
    >>> def kernel(q, k, v, rows, *, scale, **options):
    ...     reference = cpattn.BACKENDS["reference"]
    ...     return reference.run(q, k, v, rows, AttentionOptions(scale), options["out_dtype"])
    >>> meta = cpattn.build_metadata([(0, 4)], cp_size=1, cp_rank=0)
    >>> x = torch.randn(4, 2, 8)
    >>> cpattn.cp_attention(x, x, x, meta, backend=custom_backend(kernel)).shape
    torch.Size([4, 2, 8])

    Args:
        function: the kernel.
        name: for messages; the function's own if None.
        alignments: of the rows that it can express, of ``"bottom_right"``, ``"full"``, ``"any"``; see
            :data:`cpattn.spans.Alignment`. Strategies that need another are refused.
        page_sizes: whether it reads pages of so many tokens; None if it reads none, and is given a packed copy.
        reads_stored: whether it reads keys that are stored in another dtype than q's, fp8 with its scales included.
        lse_base: of the kernel's logarithm: ``math.e``, or 2 for kernels that return log2 of the sum.
        lse_heads_first: whether the kernel returns the LSE as ``[Hq, rows]``.

    Raises:
        OptionError: one of the arguments is none of these.
    """
    name = _checked_name(function, name)
    can_express = _checked_alignments(alignments)
    if page_sizes is not None and not callable(page_sizes):
        raise OptionError(f"page_sizes={page_sizes!r}; pass a function from a page size to whether the kernel reads it, or None")
    if not isinstance(reads_stored, bool):
        raise OptionError(
            f"reads_stored={reads_stored!r}; pass True for a kernel that takes k_scale= and v_scale=, False for a copy in q's dtype"
        )
    if not isinstance(lse_base, (int, float)) or lse_base not in (math.e, 2):
        raise OptionError(f"lse_base={lse_base!r}; pass math.e, or 2 for a kernel whose LSE is a log2")
    if not isinstance(lse_heads_first, bool):
        raise OptionError(f"lse_heads_first={lse_heads_first!r}; pass True for an LSE [Hq, rows], False for [rows, Hq]")
    lse_unit = math.log(lse_base)

    def attend(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v, rows = keys.k, keys.v, RaggedRows.of(spans, keys)
        scales = {"k_scale": keys.k_scale, "v_scale": keys.v_scale} if reads_stored else {}
        returned = function(
            q, k, v, rows, scale=options.scale, window=options.window, softcap=options.softcap, sinks=options.sinks, out_dtype=out_dtype,
            **scales,
        )  # fmt: skip
        out, lse = check_returned(name, returned, q, v, lse_heads_first)
        out, lse = _evened_out(out, lse if lse_unit == 1 else lse * lse_unit, spans.sees_keys(options.window), options.sinks)
        return out.to(out_dtype), lse

    return Backend(
        name=name,
        attend=attend,
        device_types=None,
        dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
        alignments=can_express,
        window=True,
        softcap=True,
        native_sinks=True,
        v_head_dim=True,
        fp32_out=True,
        reads_pages=lambda problem: page_sizes is not None and problem.page_size is not None and page_sizes(problem.page_size),
        reads_stored=lambda problem: reads_stored,
        callers=True,
    )


def as_callers(backend: Backend) -> Backend:
    """A caller's own Backend, so that what it returns is checked as that of a function is."""

    def attend(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, lse = check_returned(backend.name, backend.attend(q, keys, spans, options, out_dtype), q, keys.v)
        # It may be memory of its own, and the result is merged into.
        return out.clone(), lse.clone()

    return replace(backend, attend=attend, attend_into=None, callers=True)


def _evened_out(out: Tensor, lse: Tensor, sees_keys: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result as :class:`cpattn.attention.backend.AttentionFunction` has it where the kernel's LSE is no finite number.

    Which queries see nothing is known from the spans. The LSE does not say it: FlashAttention kernels give +inf or -inf
    also where scores are NaN, and what is NaN must not be merged as what saw nothing.
    These are new tensors in any case: the kernel may return memory of its own, and the result is merged into.
    """
    sees_T1 = sees_keys[:, None]
    known_TH = sees_T1 & (lse.abs() < torch.inf)  # which NaN is not; isfinite would take two launches more
    out_instead_T1 = torch.where(sees_T1, torch.nan, 0.0).to(out.dtype)
    lse_instead = torch.where(sees_T1, torch.nan, -torch.inf if sinks is None else sinks).to(lse.dtype)
    return torch.where(known_TH[..., None], out, out_instead_T1[..., None]).contiguous(), torch.where(known_TH, lse, lse_instead)


def _checked_name(function: Any, name: Any) -> str:
    if not callable(function):
        raise OptionError(f"custom_backend got a {type(function).__name__}; pass a function (q, k, v, rows, **options) -> (out, lse)")
    if name is not None and not isinstance(name, str):
        raise OptionError(f"name={name!r}; pass a string for messages, or None for the function's own name")
    return name or str(getattr(function, "__name__", "custom"))


def _checked_alignments(alignments: Any) -> frozenset[Alignment]:
    try:
        named = frozenset([alignments] if isinstance(alignments, str) else alignments)
    except TypeError:
        named = frozenset()
    if isinstance(alignments, str) or not named or not named <= _ALIGNMENTS:
        known = ", ".join(map(repr, sorted(_ALIGNMENTS)))
        raise OptionError(f"alignments={alignments!r}; pass a set of those that the kernel can express, of {known}")
    return named
