"""What the FlashAttention kernels have in common: how a call is built from spans and keys, and how their results are evened out.

All of them take, for each span, a start in K and V (``cu_seqlens_k``) and a length from there (``seqused_k``).
The two are independent, so ranges may overlap, and one launch serves all chunks of all requests. "Causal" means
aligned to the bottom right: the last query sees the range's last key.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionFunction, AttentionOptions, Backend
from cpattn.installed import is_installed
from cpattn.keys import Keys
from cpattn.problem import Problem
from cpattn.spans import Spans

NO_WINDOW = -1
# Told that no span has more than one query, FlashAttention 2 takes q for one query a span and refuses padding after them.
FA2_LEAST_MAX_SEQLEN_Q = 2
_TILE = 128  # query rows of a tile, for most head dims
# What packing the query heads of a group into one tile costs where tiles are full anyway: 2 to 9% with FlashAttention 4 on an
# H200, for chunks of 128 to 8,192 tokens and groups of 4 (benchmarks/results/tune_attention.md).
_PACKING_COST = 1.05


class VarlenCall(NamedTuple):
    """The arguments of one launch, under the names that they have in the FlashAttention packages."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float


def varlen_call(keys: Keys, spans: Spans, options: AttentionOptions) -> VarlenCall:
    """The launch that computes these spans. Raises ValueError for spans that no such kernel can express."""
    causal = spans.alignment == "bottom_right"
    if spans.alignment == "any" or (options.window is not None and not causal):
        raise ValueError(f"spans of alignment {spans.alignment!r} with window={options.window} are not for a FlashAttention kernel")
    return VarlenCall(
        cu_seqlens_q=spans.cu_seqlens_q,
        cu_seqlens_k=spans.k_start_padded,
        seqused_k=spans.k_len,
        max_seqlen_q=spans.max_seqlen_q,
        max_seqlen_k=keys.max_seqlen(spans),
        softmax_scale=options.scale,
        causal=causal,
        # A query sees the keys from window - 1 before its own.
        window_left=NO_WINDOW if options.window is None else options.window - 1,
        window_right=NO_WINDOW if options.window is None else 0,
        softcap=options.softcap or 0.0,
    )


def even_out(out: Tensor, lse_HT: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """(out, lse ``[T, H]``) of FlashAttention 2, which gives LSE as ``[H, T]``, and says +inf where there is no key."""
    if spans.has_empty_range:
        lse_HT = torch.where(lse_HT == torch.inf, -torch.inf, lse_HT)
    return out, lse_HT.transpose(0, 1)


def flash_backend(
    name: str,
    attend: AttentionFunction,
    unavailable: Callable[[], str | None],
    *,
    least_capability: tuple[int, int],
    softcap: bool,
    native_sinks: bool = False,
    refuses_head_dims: Callable[[int, int, int], str | None],
    refuses_call: Callable[[Problem], str | None] = lambda problem: None,
    reads_pages: Callable[[Problem], bool] = lambda problem: False,
    describe: Callable[[], str | None] = lambda: None,
) -> Backend:
    """A backend over a FlashAttention kernel: half precision in and out, aligned to the bottom right or not masked."""

    def refuses(problem: Problem) -> str | None:
        have = capability(problem.device)
        if have < least_capability:
            needs = f"{least_capability[0]}.{least_capability[1]}"
            return f"it needs a GPU of compute capability {needs} or newer, this one has {have[0]}.{have[1]}"
        return refuses_head_dims(problem.head_dim, problem.v_head_dim, have[0]) or refuses_call(problem)

    return Backend(
        name=name,
        attend=attend,
        device_types=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        alignments=frozenset({"bottom_right", "full"}),
        window=True,
        softcap=softcap,
        native_sinks=native_sinks,
        v_head_dim=True,  # as far as refuses_head_dims lets it
        fp32_out=False,
        reads_pages=reads_pages,
        propagates_nan=False,
        unavailable=unavailable,
        refuses=refuses,
        refuses_head_dims=refuses_head_dims,
        describe=describe,
    )


def packs_heads(spans: Spans, group: int) -> bool:
    """Whether packing the query heads of a group into one tile is faster: short chunks leave more of an unpacked tile empty
    than packing costs."""
    if group == 1:
        return False
    # Worked out once a batch: it takes numpy longer than a launch.
    return spans.derive(("packs", group), lambda: spans.tiled_pairs(_TILE, 1) > _PACKING_COST * spans.tiled_pairs(_TILE, group))


def same_head_dim(head_dim: int, v_head_dim: int, major: int, most: int = 256) -> str | None:
    """The rule of FlashAttention 2: one head_dim, a multiple of 8, of at most 256."""
    if head_dim != v_head_dim:
        return f"it needs v's head_dim to be that of q and k ({v_head_dim} is not {head_dim})"
    if head_dim % 8 or head_dim > most:
        return f"it takes head dims that are multiples of 8 up to {most}, not {head_dim}"
    return None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device; (0, 0) where torch cannot use one."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


@cache
def missing(module: str, fix: str) -> str | None:
    """Why a module cannot be imported, with what to do about it; None if it is there."""
    return None if is_installed(module) else f"{module} is not installed; {fix}"
