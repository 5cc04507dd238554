"""Backend ``triton``: the library's own kernel, with every feature, and one launch for each step.

Triton is imported when the backend is first used. ``import triton`` means the package here: imports are absolute.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.flash_varlen import capability, missing
from cpattn.kernels.tile_shapes import has_specialized, padded_dims, summed_dims
from cpattn.keys import Keys
from cpattn.problem import Problem
from cpattn.spans import Spans

# A tile's accumulator of this head dim takes half of the register file.
_MAX_HEAD_DIM = 256
# D and Dv of multi-head latent attention, in tiles of half as many rows; larger ones do not fit shared memory.
_MAX_LATENT_DIMS = (576, 512)


@cache
def _kernels() -> Any:
    """What launches them. An import that finds all there takes 0.6 us, in each launch."""
    from cpattn.kernels import ragged_attention

    return ragged_attention


def triton_attention(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :class:`cpattn.attention.backend.AttentionFunction`."""
    result: tuple[Tensor, Tensor] = _kernels().ragged_attention(q, keys, spans, options, out_dtype)
    return result


def triton_accumulate(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, acc: Tensor, lse: Tensor) -> None:
    """See :class:`cpattn.attention.backend.AccumulateFunction`: the kernel merges where it would write its result."""
    _kernels().ragged_attention(q, keys, spans, options, into=(acc, lse))


def triton_attend_into(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out: Tensor, lse: Tensor) -> None:
    """See :class:`cpattn.attention.backend.AttendIntoFunction`."""
    _kernels().ragged_attention(q, keys, spans, options, result=(out, lse))


def _unavailable() -> str | None:
    return missing("triton", "pip install 'cpattn[triton]'")


def _refuses(problem: Problem) -> str | None:
    if capability(problem.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    widest = max(problem.head_dim, problem.v_head_dim)
    if widest <= _MAX_HEAD_DIM:
        return None
    if capability(problem.device) != (9, 0) or problem.dtype == torch.float32:
        return f"it has head dims up to {_MAX_HEAD_DIM}, not {widest}, but for half precision on compute capability 9.0"
    if problem.head_dim > _MAX_LATENT_DIMS[0] or problem.v_head_dim > _MAX_LATENT_DIMS[1]:
        most, most_of_v = _MAX_LATENT_DIMS
        return f"it has head dims up to {most}, and of v up to {most_of_v}, not {problem.head_dim} and {problem.v_head_dim}"
    return None


def _has_hopper_kernel(problem: Problem) -> bool:
    """For keys in order, and prefixes wherever they lie."""
    if (
        problem.v_in_k
        or problem.stored_dtype != problem.dtype
        or not has_specialized(problem.head_dim, problem.v_head_dim, problem.dtype, capability(problem.device), problem.page_size or 0)
    ):
        return False
    return _kernels().specialized_kernel(problem.device) is not None


def _how(problem: Problem) -> str:
    """Which kernel, and how it is launched: both follow from the release of Triton."""
    from cpattn.kernels.release import HOPPER_KERNEL, describe

    page_size, stored = problem.page_size or 0, problem.stored_dtype
    could = has_specialized(problem.head_dim, problem.v_head_dim, problem.dtype, capability(problem.device), page_size, stored)
    return describe(could) + _padding(problem, could and HOPPER_KERNEL.verdict().used is not False)


def _padding(problem: Problem, specialized: bool) -> str:
    """Head dims that are computed in larger ones."""
    dims = padded_dims(problem.head_dim, problem.v_head_dim)
    summed = summed_dims(problem.head_dim, problem.v_head_dim, specialized)
    pairs = ((problem.head_dim, summed), (problem.v_head_dim, dims.dv)) if not dims.d_tail else ()
    return "".join(f", head dim {dim} is computed as {padded}" for dim, padded in dict(pairs).items() if padded > max(dim, 16))


BACKEND = Backend(
    name="triton",
    attend=triton_attention,
    device_types=frozenset({"cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    alignments=frozenset({"bottom_right", "full", "any"}),
    window=True,
    softcap=True,
    native_sinks=True,
    v_head_dim=True,
    fp32_out=True,
    reads_pages=lambda problem: True,
    reads_stored=lambda problem: True,
    waits_for_keys=_has_hopper_kernel,
    reads_in_place=_has_hopper_kernel,
    accumulate=triton_accumulate,
    attend_into=triton_attend_into,
    unavailable=_unavailable,
    refuses=_refuses,
    how=_how,
)
