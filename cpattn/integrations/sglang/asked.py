"""What a layer of SGLang asks of its attention: read off the function that it passes, of the one release whose function is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpattn.errors import UnsupportedError
from cpattn.integrations.sglang import engine
from cpattn.integrations.sglang.interface import KNOWN_RELEASE
from cpattn.kv_cache import PagedKV

# The function of FlashAttentionBackend.forward_extend, and what it takes from around it.
_NAME = "_fa_cp_attn"
_TAKES = frozenset(
    {
        *("causal", "cu_seqlens_k", "key_cache", "kwargs", "layer", "page_table", "self"),
        *("use_cascade_attn", "use_local_attn", "value_cache", "window_size"),
    }
)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Asked(NamedTuple):
    """A layer's attention, as ``cp_attention`` takes it.

    Attributes:
        layer: SGLang's.
        cache: the pool's own memory, and the page table of the batch.
    """

    layer: Any
    cache: PagedKV
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def arguments(self) -> dict[str, Any]:
        """By keyword, beside the tensors."""
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap, "sinks": self.sinks}


def asked_of(attend: Callable[..., Tensor], q: Tensor) -> Asked | str:
    """What it asks; or, where cpattn's kernels do not serve that, why not: then SGLang's own kernel does.

    Args:
        attend: the function that SGLang passes to a strategy, which attends with its kernel.
        q: ``[rows, Hq, D]``.

    Raises:
        UnsupportedError: it asks for what SGLang's kernel cannot do for a part of a request's queries either.
    """
    code = getattr(attend, "__code__", None)
    if code is None or code.co_name != _NAME or frozenset(code.co_freevars) != _TAKES:
        name = getattr(attend, "__name__", attend)
        return f"{name} of SGLang {engine.release()} is not the attention of keys and values that cpattn knows of {KNOWN_RELEASE}"
    of = _Around(attend)
    _refuse_what_needs_whole_requests(of)
    reason = _why_not(of, q)
    if reason is not None:
        return reason
    layer = of["layer"]
    left, _ = of["window_size"]
    return Asked(
        layer=layer,
        cache=PagedKV(of["key_cache"], of["value_cache"], of["page_table"]),
        scale=layer.scaling,
        # SGLang counts the keys to the left of a query's own.
        window=left + 1 if left >= 0 else None,
        softcap=layer.logit_cap or None,
        sinks=of["kwargs"].get("sinks"),
    )


class _Around:
    """The variables that a function takes from around it. Some have no value yet where it does not use them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def __getitem__(self, name: str) -> Any:
        return self._cells[name].cell_contents


def _refuse_what_needs_whole_requests(of: _Around) -> None:
    """SGLang's function is told of a chunk how many keys its last query sees. What would have to know more would be silently wrong."""
    asked = [f"{name}=" for name in sorted(set(of["kwargs"]) - {"sinks", "k_descale", "v_descale"})]
    asked += ["attention that is not causal"] * (not of["causal"])
    asked += ["attention in blocks (local or cascade)"] * bool(of["use_local_attn"] or of["use_cascade_attn"])
    if asked:
        raise UnsupportedError(
            f"layer {of['layer'].layer_id} of this model asks SGLang's kernel for {', '.join(asked)}, but a rank has a part of each "
            "request's queries, for which that would mean something else: run this model without --enable-prefill-cp"
        )


def _why_not(of: _Around, q: Tensor) -> str | None:
    pool = _pool_of(of["self"].token_to_kv_pool, of["layer"])
    if type(pool).__name__ != "MHATokenToKVPool" or pool.is_quantized_kv_cache:
        return f"the pool is a {type(pool).__name__}{' in fp4' if getattr(pool, 'is_quantized_kv_cache', False) else ''}"
    if q.dtype not in _DTYPES or of["key_cache"].dtype != q.dtype:
        return f"queries are {q.dtype} and the pool {of['key_cache'].dtype}"
    return None


def _pool_of(pool: Any, layer: Any) -> Any:
    """The one that has a layer's keys: layers with a window may have one of their own, whose pages stand in the table that is passed."""
    if type(pool).__name__ != "SWAKVPool":
        return pool
    _, has_own = pool.layers_mapping[layer.layer_id]
    return pool.swa_kv_pool if has_own else pool.full_kv_pool
