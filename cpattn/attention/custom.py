"""An engine's own attention kernel as a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.rows import RaggedRows

AttentionCallable: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


def custom_backend(
    function: AttentionCallable,
    *,
    name: str | None = None,
    alignments: frozenset[Any] = frozenset({"bottom_right", "full", "any"}),
    page_sizes: Callable[[int], bool] | None = None,
) -> Backend:
    """A backend made of a function ``(q, k, v, rows, **options) -> (out, lse)``. ``backend=function`` alone does the same
    with what is the default here.

    The function is called as ``function(q, k, v, rows, scale=, window=, softcap=, sinks=, out_dtype=)``:

    - q ``[rows, Hq, D]``, k ``[S, Hkv, D]``, v ``[S, Hkv, Dv]``, or pages where ``rows.page_table`` is given; which query
      sees which keys is said by ``rows`` (:class:`cpattn.RaggedRows`).
    - ``window``, ``softcap`` and ``sinks`` are None where the call has none. A kernel that lacks one must raise for it.
    - It returns out ``[rows, Hq, Dv]`` of any floating dtype (``out_dtype`` is what is best for the result: fp32 where it
      will be merged) and lse ``[rows, Hq]``, natural log.
    - Queries without keys, such as padding, may be given anything: ``rows.sees_keys`` says which they are. A query that
      sees keys and has an LSE of +inf or -inf gets NaN: kernels give that where its scores are NaN.

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
            :data:`cpattn.attention.rows.Alignment`. Strategies that need another are refused.
        page_sizes: whether it reads pages of so many tokens; None if it reads none, and is given a packed copy.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, lse = function(
            q, k, v, rows, scale=options.scale, window=options.window, softcap=options.softcap, sinks=options.sinks, out_dtype=out_dtype
        )
        out, lse = _evened_out(out, lse, rows.sees_keys(options.window), options.sinks)
        return out.to(out_dtype), lse

    return Backend(
        name=name or str(getattr(function, "__name__", "custom")),
        run=run,
        device_types=None,
        dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
        alignments=alignments,
        window=True,
        softcap=True,
        native_sinks=True,
        v_head_dim=True,
        fp32_out=True,
        reads_pages=lambda call: page_sizes is not None and call.page_size is not None and page_sizes(call.page_size),
    )


def _evened_out(out: Tensor, lse: Tensor, sees_keys: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result as :class:`cpattn.attention.backend.AttentionFunction` has it where the kernel's LSE is no finite number.

    Which queries see nothing is known from the rows. The LSE does not say it: FlashAttention kernels give +inf or -inf
    also where scores are NaN, and what is NaN must not be merged as what saw nothing.
    These are new tensors in any case: the kernel may return memory of its own, and the result is merged into.
    """
    sees_T1 = sees_keys[:, None]
    known_TH = sees_T1 & (lse.abs() < torch.inf)  # which NaN is not; isfinite would take two launches more
    out_instead_T1 = torch.where(sees_T1, torch.nan, 0.0).to(out.dtype)
    lse_instead = torch.where(sees_T1, torch.nan, -torch.inf if sinks is None else sinks).to(lse.dtype)
    return torch.where(known_TH[..., None], out, out_instead_T1[..., None]).contiguous(), torch.where(known_TH, lse, lse_instead)
