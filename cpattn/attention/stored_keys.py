"""A backend that reads no stored keys, over stored keys: it is given a packed copy in q's dtype."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.keys import Keys
from cpattn.moves.moves import moves_for
from cpattn.moves.stored_rows import StoredRows
from cpattn.spans import Spans


def over_stored_keys(backend: Backend) -> Backend:
    """The backend with a pass before each launch that multiplies keys by their scales, in q's dtype.

    >>> import cpattn
    >>> backend = over_stored_keys(cpattn.BACKENDS["cpu"])
    >>> q = torch.randn(3, 2, 8)
    >>> k = (q * 2).to(torch.float8_e4m3fn)
    >>> keys, half = Keys(k, k, None, torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5])), k.float() / 2
    >>> spans, options = Spans.build([3], [0], [3], [1]), AttentionOptions(1.0)
    >>> out, _ = backend.attend(q, keys, spans, options, q.dtype)
    >>> torch.equal(out, cpattn.BACKENDS["cpu"].attend(q, Keys(half, half), spans, options, q.dtype)[0])
    True
    """
    accumulate = backend.accumulate

    def attend(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return backend.attend(q, _copied(keys, q.dtype), spans, options, out_dtype)

    def accumulate_copied(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, acc: Tensor, lse: Tensor) -> None:
        assert accumulate is not None  # or this is not called
        accumulate(q, _copied(keys, q.dtype), spans, options, acc, lse)

    return replace(backend, attend=attend, attend_into=None, accumulate=None if accumulate is None else accumulate_copied)


def _copied(keys: Keys, dtype: torch.dtype) -> Keys:
    """Keys without pages in a dtype. The memory is the allocator's, which has it again after the launch."""
    if keys.k.dtype == dtype:
        return keys
    k, v = keys.k, keys.v
    in_k = v.data_ptr() == k.data_ptr() and v.stride() == k.stride()
    k_copy = torch.empty(k.shape, dtype=dtype, device=k.device)
    v_copy = k_copy[..., : v.shape[-1]] if in_k else torch.empty(v.shape, dtype=dtype, device=v.device)
    moves_for(k.device).dequantize(k_copy, None if in_k else v_copy, StoredRows(k, None if in_k else v, keys.k_scale, keys.v_scale))
    return Keys(k_copy, v_copy)
