"""ring-flash-attn (PyPI, github.com/zhuzilin/ring-flash-attention) as it was installed or unpacked on the path, with its kernel calls
going to the launch that all peers share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peers.varlen import Lengths, attention
from peers.work import Call, Unserved, Work, need_multiple, need_no_prefix, starts

# Whose functions it imports: FlashAttention 2 has no wheels.
_KERNELS = "flash_attn.flash_attn_interface"


def zigzag_varlen(work: Work) -> Call:
    """Its ring for batches: each rank holds the front and the back block of each request, request after request."""
    num_blocks = 2 * work.size
    need_no_prefix(work, "ring-flash-attn's zigzag")
    need_multiple(work, work.extends, num_blocks, "ring-flash-attn's zigzag")
    module = _module("zigzag_ring_flash_attn_varlen")
    token_starts, blocks = starts(work.extends), [extend // num_blocks for extend in work.extends]
    begins = [
        (start + part * block, block)
        for start, block in zip(token_starts, blocks, strict=False)
        for part in (work.rank, num_blocks - 1 - work.rank)
    ]
    tokens = torch.cat([torch.arange(begin, begin + block, device=work.device) for begin, block in begins])
    q, k, v = (x[tokens] for x in (work.q, work.k, work.v))
    cu_seqlens = work.int32(starts(2 * block for block in blocks))
    half_indices = [module.get_half_index(cu_seqlens, front=front) for front in (True, False)]
    arguments = (dist.group.WORLD, q, k, v, cu_seqlens, 2 * max(blocks), *half_indices, q.shape[2] ** -0.5)
    return Call(lambda: _first(module.zigzag_ring_flash_attn_varlen_forward(*arguments)), tokens)


def llama3_varlen(work: Work) -> Call:
    """Its all-gather, some heads at a time, as Llama 3 was trained: each rank holds one run of the batch's tokens."""
    need_no_prefix(work, "ring-flash-attn's llama3")
    need_multiple(work, [work.tokens], work.size, "ring-flash-attn's llama3")
    module = _module("llama3_flash_attn_varlen")
    rows = work.tokens // work.size
    tokens = torch.arange(rows * work.rank, rows * (work.rank + 1), device=work.device)
    q, k, v = (x[tokens] for x in (work.q, work.k, work.v))
    cu_seqlens = work.int32(starts(work.extends))
    *lengths, key_range = module.llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, True, work.rank, work.size)
    # Half of the heads at a time, so that there is something to overlap.
    stride = max(1, k.shape[1] // 2)
    arguments = (dist.group.WORLD, q, k, v, *lengths, stride, key_range, q.shape[2] ** -0.5)
    return Call(lambda: _first(module.llama3_flash_attn_varlen_forward(*arguments)), tokens)


def _first(results: tuple[Tensor, Tensor]) -> Tensor:
    return results[0]


@cache
def _module(name: str) -> Any:
    """One module of the package. Its own ``__init__`` imports adapters to other libraries, which do not import beside new ones of
    them, so it is left out."""
    spec = find_spec("ring_flash_attn")
    if spec is None or spec.submodule_search_locations is None:
        raise Unserved("ring-flash-attn is not installed: pip install --no-deps ring-flash-attn")
    if "ring_flash_attn" not in sys.modules:
        package = ModuleType("ring_flash_attn")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["ring_flash_attn"] = package
    with _kernels_in_place():
        return import_module(f"ring_flash_attn.{name}")


@contextmanager
def _kernels_in_place() -> Iterator[None]:
    """While the package is imported; afterwards nobody else must take this for FlashAttention 2."""
    before = sys.modules.get(_KERNELS)
    stand_in: Any = ModuleType(_KERNELS)
    stand_in._flash_attn_varlen_forward = _flash_attn_varlen_forward
    stand_in._flash_attn_varlen_backward = None
    sys.modules[_KERNELS] = stand_in
    try:
        yield
    finally:
        del sys.modules[_KERNELS]
        if before is not None:
            sys.modules[_KERNELS] = before


def _flash_attn_varlen_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, **options: Any) -> tuple[Tensor, Tensor, None, None]:
    """FlashAttention 2's function of that name, as far as the package calls it: no dropout, no window, no bias."""
    lengths = Lengths(options["cu_seqlens_q"], options["cu_seqlens_k"], options["max_seqlen_q"], options["max_seqlen_k"])
    return *attention(q, k, v, lengths, causal), None, None
