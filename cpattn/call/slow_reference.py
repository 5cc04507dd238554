"""A warning where ``auto`` is left with the reference backend on a GPU, which is some hundred times slower than any other."""

from __future__ import annotations

import warnings

from cpattn.attention.backend import Backend
from cpattn.attention.reference import BLOCK
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.problem import Problem

# Kinds of calls that this process was warned of: one warning each, as a model has many layers.
_warned: set[tuple[object, ...]] = set()
# Scores that are held at a time: the scores, what the LSE or the softmax is taken of, and the weights.
_COPIES = 3
# Of a GPU of today, roughly: fp32 without tensor cores, and memory, which each score passes through some twelve times.
_FLOPS, _BYTES_PER_SECOND, _PASSES = 4e13, 2.5e12, 12
_FP32 = 4


def warn_of_reference(backend: Backend, problem: Problem, meta: CPMetadata) -> None:
    """Warns once of each kind of call that ``auto`` gives to the reference backend on a GPU.

    Args:
        backend: what was chosen; nothing is said of any other.
    """
    q_heads, kv_heads = problem.q_heads, problem.kv_heads
    kind = (problem.dtype, problem.head_dim, problem.v_head_dim, problem.window is not None, problem.softcap is not None)
    if backend.name != "reference" or problem.device.type != "cuda" or kind in _warned:
        return
    _warned.add(kind)
    keys, queries = meta.max_seqlen_k, min(BLOCK, meta.max_seqlen_q)
    memory = _FP32 * keys * (_COPIES * queries * q_heads + kv_heads * (problem.head_dim + problem.v_head_dim))
    per_pair = 2 * (problem.head_dim + problem.v_head_dim) / _FLOPS + _FP32 * _PASSES / _BYTES_PER_SECOND
    seconds = meta.plan.rank_pairs[meta.cp_rank] * q_heads * per_pair
    dtype = str(problem.dtype).removeprefix("torch.")
    warnings.warn(
        f"backend='auto' is left with 'reference', which is plain torch, for heads of {problem.head_dim}/{problem.v_head_dim} in {dtype} "
        f"on {problem.device}. For this batch it takes about {memory / 2**30:.2g} GiB beside the tensors, and {seconds:.1g} s in each "
        "layer at least. cpattn.explain(q, k, v, meta) says why kernels were passed over; backend='reference' asks for it without this "
        "warning",
        RuntimeWarning,
        stacklevel=2,
    )
