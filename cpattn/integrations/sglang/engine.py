"""What the strategy takes from a running SGLang, and what it writes there."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import Tensor


def release() -> str:
    """Of the SGLang that this process has imported."""
    return str(getattr(sys.modules.get("sglang"), "__version__", "without a version"))


def warn(message: str, *values: Any) -> None:
    """Puts a line among SGLang's own.

    SGLang sets up logging only after it has loaded its plugins. Until then the logger ``cpattn`` shows nothing, but one of SGLang's
    name writes warnings to stderr.
    """
    logging.getLogger("sglang.cpattn").warning(message, *values)


def prefill_backend() -> str | None:
    """The name of the attention backend of prefills; None in a process that has no configuration yet."""
    from sglang.srt.runtime_context import attention_backends

    try:
        prefill, _ = attention_backends()
    except (RuntimeError, ValueError):
        return None
    name: str | None = prefill
    return name


def cp_group() -> Any:
    """The process group of the ranks that share a context."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().attn_cp_group.device_group


def device() -> torch.device:
    """Where this process's tensors are."""
    from sglang.srt.runtime_context import get_device

    return torch.device(get_device().device)


def flash_attention() -> Any:
    """How SGLang names the way in which its backends fa3 and fa4 call a strategy."""
    from sglang.srt.layers.cp.base import CPAttentionBackendKind

    return CPAttentionBackendKind.FLASH_ATTENTION


def pool() -> Any:
    """The pool that holds the keys and values of the running forward."""
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    return get_token_to_kv_pool()


def set_kv(forward_batch: Any, layer: Any, k: Tensor, v: Tensor, swa_loc: Tensor | None) -> None:
    """Has the pool write all new tokens' keys and values, in their order."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    if swa_loc is not None:
        swa_loc = swa_loc[: len(k)]
    places = KVWriteLoc.for_layer(forward_batch, layer, swa_loc=swa_loc)
    pool().set_kv_buffer(layer, places, k, v, layer.k_scale, layer.v_scale)


def set_latent(forward_batch: Any, layer: Any, k_nope: Tensor, k_rope: Tensor) -> None:
    """The same of MLA, whose latent has two parts."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool().set_mla_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k_nope, k_rope)
