"""Pages in which each head's scale lies behind its numbers, as vLLM's ``fp8_per_token_head`` has them, are taken as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cpattn
from cpattn.testing import run_loopback

E4M3, PAGES, PAGE, HEADS, DIM = torch.float8_e4m3fn, 12, 4, 2, 16
STEPS = [[(0, 23), (0, 9)], [(23, 2), (9, 1)]]
TABLE = torch.tensor([[5, 2, 7, 0, 1, 3, 11], [4, 6, 8, 0, 0, 0, 0]])


def inline_pages(heads_first: bool) -> tuple[Tensor, cpattn.PagedKV]:
    """All bytes, ``[pages, heads, page_size, K | its scale | V | its scale]`` whichever of the two lies first; and the views."""
    row = 2 * (DIM + 4)
    memory = torch.zeros(PAGES, *((HEADS, PAGE) if heads_first else (PAGE, HEADS)), row, dtype=torch.uint8)
    whole = memory if heads_first else memory.transpose(1, 2)
    by_token = whole.transpose(1, 2)
    k_pages, v_pages = (by_token[..., first : first + DIM].view(E4M3) for first in (0, DIM + 4))
    as_floats = torch.empty(0).set_(memory.untyped_storage())
    strides = [stride // 4 for stride in by_token.stride()[:3]]
    k_scale, v_scale = (as_floats.as_strided(k_pages.shape[:3], strides, first // 4) for first in (DIM, 2 * DIM + 4))
    return memory, cpattn.PagedKV(k_pages, v_pages, TABLE, k_scale=k_scale, v_scale=v_scale)


def plain_pages() -> cpattn.PagedKV:
    pages, scales = torch.zeros(2, PAGES, PAGE, HEADS, DIM), torch.zeros(2, PAGES, PAGE, HEADS)
    k_pages, v_pages = pages.to(E4M3).unbind()
    return cpattn.PagedKV(k_pages, v_pages, TABLE, k_scale=scales[0], v_scale=scales[1])


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("cp_size", "owner"), [(1, None), (2, None), (2, cpattn.Striped(2))], ids=str)
def test_bits_are_those_of_scales_beside_the_pages(cp_size: int, owner: Any, heads_first: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 25, heads, DIM).bfloat16() for heads in (4, HEADS, HEADS))

    def program(group: cpattn.Transport) -> None:
        memory, inline = inline_pages(heads_first)
        caches = inline, plain_pages()
        for batch in STEPS:
            meta = cpattn.plan(batch, cp_size, owner=owner).metadata(group.rank)
            new = [torch.cat([x[i, prefix : prefix + extend] for i, (prefix, extend) in enumerate(batch)]) for x in (q, k, v)]
            my_q, my_k, my_v = (cpattn.shard(x, meta) for x in new)
            out, expected = (cpattn.cp_attention(my_q, my_k, my_v, meta, group=group, kv_cache=cache, check=True) for cache in caches)
            assert torch.equal(out, expected)
        for name in ("k_pages", "v_pages", "k_scale", "v_scale"):
            x, y = (getattr(cache, name).contiguous().view(torch.uint8) for cache in caches)
            assert torch.equal(x, y)
        assert memory.any()

    run_loopback(program, cp_size)
