"""What is refused of queries in fp8, over pages in fp8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpattn.errors import UnsupportedError
from cpattn.kv_cache import PagedKV
from cpattn.stored import is_fp8

_RULE = (
    "queries in fp8 are float8_e4m3fn, over pages in that dtype with one scale or one a head, which each rank has whole, and for "
    "backend='flash_attn3' by name, as it rounds weights to fp8 as well; else pass q in bf16 or fp16"
)


def check_fp8_queries(q: Tensor, cache: PagedKV, backend: Any, is_sharded: bool) -> None:
    """Raises UnsupportedError for queries in fp8 that no kernel is for; others are fine."""
    if not is_fp8(q.dtype):
        return
    pages, scales = cache.k_pages.dtype, {None: "no scales", "head": "scales of heads", "token": "scales of tokens"}[cache.scales]
    if (q.dtype, pages, cache.scales) != (torch.float8_e4m3fn, torch.float8_e4m3fn, "head"):
        raise UnsupportedError(f"q is {q.dtype}, kv_cache.k_pages {pages} with {scales}; {_RULE}")
    if is_sharded:
        raise UnsupportedError(f"q is {q.dtype}, and the cache is sharded over ranks, so that queries travel; {_RULE}")
    if backend == "auto":
        raise UnsupportedError(f"q is {q.dtype}, and backend is 'auto'; {_RULE}")
