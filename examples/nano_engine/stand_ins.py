"""What nano-vllm imports and asks of a GPU, where it is not there; imports it with that.

It takes two functions from ``flash_attn``, for which there are no wheels. On a GPU they come from FlashAttention-3
(``flash_attn_interface``) where flash-attn is not installed, and on a CPU from torch. On a CPU its calls to CUDA do nothing,
its kernel that writes pages is an assignment, and nothing is compiled.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

ON_CPU = not torch.cuda.is_available()


class Instead:
    """A module of which some names are others: ``Instead(torch, cuda=...)``."""

    def __init__(self, module: ModuleType, **others: Any) -> None:
        self.__dict__.update(others, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def import_with_flash_attn() -> Any:
    """Imports nano-vllm, and returns its module of attention, with a ``flash_attn`` that has the two functions.

    No one else sees it: backends of cpattn look for the true one, of which FlashAttention-4 is a part without the two.

    Raises:
        ImportError: without nano-vllm, and on a GPU with neither flash-attn nor FlashAttention-3.
    """
    if find_spec("nanovllm") is None:
        raise ImportError("nano-vllm is not installed: pip install --no-deps nano-vllm-fork==20260210 xxhash")
    name = "flash_attn"
    found: Any = import_module(name) if find_spec(name) is not None else None
    if hasattr(found, "flash_attn_with_kvcache"):
        return import_module("nanovllm.layers.attention")
    module: Any = ModuleType(name)
    if ON_CPU:
        module.flash_attn_varlen_func, module.flash_attn_with_kvcache = _torch_varlen, _torch_with_kvcache
    elif find_spec("flash_attn_interface") is not None:
        module.flash_attn_varlen_func, module.flash_attn_with_kvcache = _fa3_varlen, _fa3_with_kvcache
    else:
        raise ImportError("on a GPU nano-vllm needs flash-attn, or FlashAttention-3 in its place: pip install tokenspeed-fa3")
    sys.modules[name] = module
    try:
        return import_module("nanovllm.layers.attention")
    finally:
        del sys.modules[name]
        if found is not None:
            sys.modules[name] = found


def attention_in_words() -> str:
    """Which attention nano-vllm's own is here."""
    return {_torch_varlen: "torch's", _fa3_varlen: "FlashAttention-3"}.get(attention.flash_attn_varlen_func, "flash-attn's")


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q ``[rows, Hq, D]``, the last of the tokens of k and v ``[length, Hkv, D]``."""
    rows, length = len(q), len(k)
    seen = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    return out.transpose(0, 1)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, **of: Any) -> Tensor:
    outs = []
    starts = list(pairwise(of["cu_seqlens_k"].tolist()))
    for i, (begin, end) in enumerate(pairwise(of["cu_seqlens_q"].tolist())):
        first, last = starts[i]
        table = of["block_table"]
        keys, values = (x[first:last] if table is None else x[table[i]].flatten(0, 1)[: last - first] for x in (k, v))
        outs.append(_attend(q[begin:end], keys, values, of["softmax_scale"]))
    return torch.cat(outs)


def _torch_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, **of: Any) -> Tensor:
    outs = []
    for row, length, pages in zip(q, of["cache_seqlens"].tolist(), of["block_table"], strict=True):
        keys, values = (x[pages].flatten(0, 1)[:length] for x in (k_cache, v_cache))
        outs.append(_attend(row, keys, values, of["softmax_scale"]))
    return torch.stack(outs)


def _first(out: Any) -> Tensor:
    """Without the LSE, which some releases return beside it."""
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _fa3_varlen(q: Tensor, k: Tensor, v: Tensor, **of: Any) -> Tensor:
    fa3 = import_module("flash_attn_interface")
    common = {name: of[name] for name in ("cu_seqlens_q", "max_seqlen_q", "softmax_scale", "causal")}
    if of["block_table"] is None:
        return _first(fa3.flash_attn_varlen_func(q, k, v, cu_seqlens_k=of["cu_seqlens_k"], max_seqlen_k=of["max_seqlen_k"], **common))
    lengths = of["cu_seqlens_k"].diff()
    return _first(fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=of["block_table"], **common))


def _fa3_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, **of: Any) -> Tensor:
    fa3 = import_module("flash_attn_interface")
    common = {name: of[name] for name in ("cache_seqlens", "softmax_scale", "causal")}
    return _first(fa3.flash_attn_with_kvcache(q, k_cache, v_cache, page_table=of["block_table"], **common))


def run_on_cpu() -> None:
    """Makes nano-vllm run without a GPU: it moves its inputs to one, and asks it for memory."""
    names = ("nanovllm.engine.model_runner", "nanovllm.layers.layernorm")
    modules: list[Any] = [import_module(name) for name in names]
    model_runner, layernorm = modules
    memory = 2**26
    torch.set_num_threads(1)  # a rank: they share the cores

    def nothing(*_: Any) -> None: ...

    def unpinned(make: Any) -> Any:
        return lambda *args, pin_memory=False, **options: make(*args, **options)

    cuda = SimpleNamespace(
        set_device=nothing,
        empty_cache=nothing,
        reset_peak_memory_stats=nothing,
        synchronize=nothing,
        mem_get_info=lambda: (memory, memory),
        memory_stats=lambda: {"allocated_bytes.all.current": 0},
    )
    model_runner.torch = Instead(
        torch,
        cuda=cuda,
        set_default_device=lambda _: torch.set_default_device("cpu"),
        tensor=unpinned(torch.tensor),
        zeros=unpinned(torch.zeros),
    )
    distributed = torch.distributed
    model_runner.dist = Instead(
        distributed, init_process_group=lambda _, *args, **options: distributed.init_process_group("gloo", *args, **options)
    )
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    attention.store_kvcache = _store
    # Its norm computes in float32, in place: what is float32 already would be written over, the residual stream with it.
    layernorm.RMSNorm.forward = _norm


def _store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache.view(-1, *new.shape[1:])[slots.long()] = new


def _norm(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    total = x if residual is None else x + residual
    out = nn.functional.rms_norm(total, self.weight.shape, self.weight, self.eps)
    return out if residual is None else (out, total)


if ON_CPU:
    # Compiling takes longer than what it would save. Decorators look when their module is imported.
    torch._dynamo.config.disable = True
attention = import_with_flash_attn()
