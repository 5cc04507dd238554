"""What a caller passes, and the one key by which a call is remembered."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from cpattn.attention.backend import Backend
from cpattn.attention.custom import AttentionCallable
from cpattn.exchange.strategy import Strategy
from cpattn.expansion import ExpandFunction
from cpattn.kv_cache import PackedKV, PagedKV

BackendChoice: TypeAlias = str | Backend | AttentionCallable
StrategyChoice: TypeAlias = str | Strategy


class Arguments(NamedTuple):
    """The arguments of a call that say what to compute, as the caller gave them. ``k`` and ``v`` are both None where all keys
    lie in pages already."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    v_dim: int | None = None
    kv_cache: PackedKV | PagedKV | None = None
    strategy: StrategyChoice = "auto"
    backend: BackendChoice = "auto"
    overlap: int | None = None
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    out: Tensor | None = None
    expand: ExpandFunction | None = None

    def key(self) -> Hashable:
        """All that a decision depends on, layouts included. Raises TypeError or AttributeError where an argument is not what
        it should be.

        Written out, as it is made in every call: a function for the layout of a tensor would take longer than the rest.
        """
        q, k, v, v_dim, cache, strategy, backend, overlap, scale, window, softcap, sinks, out, expand = self
        return (
            # Also the class: a DTensor of the same layout, say, has no memory to read.
            (q.shape, q.stride(), q.dtype, q.device, q.__class__),
            None if k is None else (k.shape, k.stride(), k.dtype, k.device, k.__class__),
            None if v is None else (v.shape, v.stride(), v.dtype, v.device, v.__class__),
            None if sinks is None else (sinks.shape, sinks.stride(), sinks.dtype, sinks.device, sinks.__class__),
            None if out is None else (out.shape, out.stride(), out.dtype, out.device, out.__class__, out.is_inference()),
            None if cache is None else _cache_key(cache),
            # Each layer has a function of its own.
            None if expand is None else callable(expand),
            v_dim, strategy, backend, overlap, scale, window, softcap,
            # True == 1, but only one of them is a number of groups.
            v_dim.__class__, overlap.__class__, scale.__class__, window.__class__, softcap.__class__,
            # What was made in that mode may be written in that mode only.
            torch.is_inference_mode_enabled(),
        )  # fmt: skip

    def requires_grad(self) -> bool:
        """Whether any tensor does."""
        q, k, v, cache, sinks = self.q, self.k, self.v, self.kv_cache, self.sinks
        if q.requires_grad or (k is not None and k.requires_grad) or (v is not None and v.requires_grad):
            return True
        if (sinks is not None and sinks.requires_grad) or (self.out is not None and self.out.requires_grad):
            return True
        if isinstance(cache, PackedKV):
            return cache.k.requires_grad or (cache.v is not None and cache.v.requires_grad)
        # A scale is constant. That of a model may be one of its parameters all the same.
        return isinstance(cache, PagedKV) and (cache.k_pages.requires_grad or (cache.v_pages is not None and cache.v_pages.requires_grad))

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by the names that messages have for them."""
        found = {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}
        cache = self.kv_cache
        parts = ("k", "v") if isinstance(cache, PackedKV) else ("k_pages", "v_pages") if isinstance(cache, PagedKV) else ()
        return found | {f"kv_cache.{name}": getattr(cache, name) for name in parts if getattr(cache, name) is not None}


def _cache_key(cache: Any) -> Any:
    k_scale: Any = None
    v_scale: Any = None
    if isinstance(cache, PackedKV):
        k, v, table = cache.k, cache.v, None
    elif isinstance(cache, PagedKV):
        # What a pool says of its table's lines changes with each step, and is looked at beside the key.
        k, v, table = cache.k_pages, cache.v_pages, cache.page_table
        k_scale, v_scale = cache.k_scale, cache.v_scale
    else:
        return type(cache)  # the checks say what it should be
    return (
        cache.__class__,
        (k.shape, k.stride(), k.dtype, k.device, k.__class__, k.is_inference()),
        None if v is None else (v.shape, v.stride(), v.dtype, v.device, v.__class__, v.is_inference()),
        None if table is None else (table.shape, table.stride(), table.dtype, table.device, table.__class__),
        None if k_scale is None else (k_scale.shape, k_scale.stride(), k_scale.dtype, k_scale.device, k_scale.__class__),
        None if v_scale is None else (v_scale.shape, v_scale.stride(), v_scale.dtype, v_scale.device, v_scale.__class__),
    )  # fmt: skip
