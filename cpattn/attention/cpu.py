"""Backend ``cpu``: torch's flash attention kernel for CPUs, one call for each unmasked rectangle and causal square.

The kernel aligns its causal mask to the top left, so that a span is cut in two: the keys that all its
queries see (a rectangle without a mask) and those around the diagonal (a square). Their results are merged by LSE.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.merge import merge_
from cpattn.attention.reference import reference_attention
from cpattn.keys import Keys
from cpattn.spans import Spans


def cpu_attention(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :class:`cpattn.attention.backend.AttentionFunction`.

    Computes in fp32 whatever the inputs: the kernel is as fast in fp32 as in bf16, and its bf16 results could not be
    merged without losing precision. Where D and Dv differ, the smaller is padded with zeros.
    """
    v_head_dim = keys.v.shape[2]
    head_dim = max(q.shape[2], v_head_dim)
    q, k, v = (pad(x.float(), (0, head_dim - x.shape[2])) if x.shape[2] < head_dim else x.float() for x in (q, keys.k, keys.v))
    out = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:2], -torch.inf)
    for q_start, q_len, k_start, k_len, diagonal in zip(*(column.tolist() for column in spans.host[:5]), strict=True):
        # Queries before the diagonal enters the range see nothing.
        skip = min(q_len, max(0, 1 - diagonal))
        first, end, seen = q_start + skip, q_start + q_len, diagonal + skip
        # Keys that all remaining queries see, then those that they see one after another. One query alone sees all without a mask.
        several = end - first > 1
        full = min(k_len, seen - several)
        square = min(k_len - full, end - first) if several else 0
        _add(out, lse, q, k, v, slice(first, end), slice(k_start, k_start + full), options.scale, is_first=True)
        diagonal_keys = slice(k_start + full, k_start + full + square)
        is_first = full == 0
        _add(out, lse, q, k, v, slice(first, first + square), diagonal_keys, options.scale, is_first, causal=True)
        # Where the range ends before the last query's diagonal, the queries below the square see all of its keys.
        _add(out, lse, q, k, v, slice(first + square, end), diagonal_keys, options.scale, is_first)
    return out[..., :v_head_dim].to(out_dtype).contiguous(), lse


def _add(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: slice,
    keys: slice,
    scale: float,
    is_first: bool,
    causal: bool = False,
) -> None:
    """Attends and merges into ``out`` and ``lse``, or writes what is the first there. Nothing to do where either side is empty (the
    kernel would crash)."""
    if queries.start >= queries.stop or keys.start >= keys.stop:
        return
    part, part_lse = _attend(q[queries], k[keys], v[keys], scale, causal)
    if is_first:
        out[queries], lse[queries] = part, part_lse
    else:
        merge_(out[queries], lse[queries], part, part_lse)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Result and LSE of queries that see all keys, or with ``causal`` one key, two keys and so on."""
    q_1htd, k_1hsd, v_1hsd = (x[None].transpose(1, 2) for x in (q, k, v))
    out_1htd, lse_1ht = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_1htd, k_1hsd, v_1hsd, 0.0, causal, scale=scale)
    out, lse = out_1htd[0].transpose(0, 1), lse_1ht[0].transpose(0, 1)
    # The kernel takes a query whose scores are all NaN or -inf for one without keys: it gives 0 for both, and for the LSE. That of the
    # first key, which all queries see, tells such a query from one with an LSE of 0. Infinite inputs, and large ones, give NaN as well.
    unseen = lse == 0
    if unseen.any():
        first_score = (q * k[0].repeat_interleave(q.shape[1] // k.shape[1], dim=0)).sum(dim=-1)
        is_nan = unseen & first_score.isnan()
        out, lse = out.masked_fill(is_nan[..., None], torch.nan), lse.masked_fill(is_nan, torch.nan)
        unsure = unseen & (first_score == -torch.inf)
        if unsure.any():
            # The others may be -inf, NaN, or numbers whose LSE is 0. It is slow to find out, and rare.
            spans = Spans.build(*np.array([[len(q), 0, len(k), 1 if causal else len(k)]]).T)
            plain, plain_lse = reference_attention(q, Keys(k, v), spans, AttentionOptions(scale=scale), torch.float32)
            out, lse = torch.where(unsure[..., None], plain, out), torch.where(unsure, plain_lse, lse)
    return out, lse


BACKEND = Backend(
    name="cpu",
    attend=cpu_attention,
    device_types=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    alignments=frozenset({"bottom_right", "full", "any"}),
    window=False,
    softcap=False,
    native_sinks=False,
    v_head_dim=True,
    fp32_out=True,
    loops_on_host=True,
)
