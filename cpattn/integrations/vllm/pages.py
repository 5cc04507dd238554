"""vLLM's cache of a layer as pages."""

from __future__ import annotations

import torch
from torch import Tensor

from cpattn.errors import TensorMismatchError
from cpattn.kv_cache import PagedKV

# vLLM keeps fp8 as bytes, and says in a name which it is.
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def pages_of(
    kv_cache: Tensor,
    head_dim: int,
    block_table: Tensor,
    *,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> PagedKV:
    """A view of vLLM's cache of one layer and of its block table. Nothing is copied.

    >>> import torch
    >>> from cpattn.integrations.vllm import pages_of
    >>> kv_cache = torch.zeros(10, 2, 16, 2 * 64)  # 10 blocks of 16 tokens, 2 KV heads of 64 for K, and of 64 for V
    >>> pages_of(kv_cache, 64, torch.tensor([[5, 2, 7]], dtype=torch.int32))
    PagedKV(10 pages of 16 tokens, 2 heads, k 64, v 64, torch.float32, cpu, table (1, 3) torch.int32)

    Args:
        kv_cache: ``[num_blocks, Hkv, block_size, D + Dv]`` as vLLM hands it to its backends: K and V of a token and head beside
            each other, whatever the strides of the other axes.
        head_dim: D.
        block_table: int32 ``[>= num_requests, max_blocks]``.
        kv_cache_dtype: vLLM's word for it. ``"fp8"``, ``"fp8_e4m3"`` and ``"fp8_e5m2"`` are bytes of fp8 numbers.
        k_scale, v_scale: of a cache in fp8, the layer's ``_k_scale`` and ``_v_scale``: fp32, one number, or one a KV head. Else they are
            not looked at, as layers have them in any case.

    Raises:
        TensorMismatchError: the cache has another form.
    """
    if kv_cache.ndim != 4 or kv_cache.shape[-1] <= head_dim:
        raise TensorMismatchError(
            f"kv_cache has shape {tuple(kv_cache.shape)}; vLLM 0.33 has [num_blocks, Hkv, block_size, D + Dv] with D = {head_dim}"
        )
    stored = FP8.get(kv_cache_dtype)
    if stored is None:
        k_scale = v_scale = None
    else:
        kv_cache = kv_cache.view(stored)
    by_token = kv_cache.transpose(1, 2)
    return PagedKV(by_token[..., :head_dim], by_token[..., head_dim:], block_table, k_scale=k_scale, v_scale=v_scale)
