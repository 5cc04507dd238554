"""Compiled graphs over pages in fp8."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from inputs.stored_cases import StoredCase
from torch import Tensor

import cpattn


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("scales", ["head", "token"])
def test_a_graph_does_what_its_calls_do(scales: str) -> None:
    """It ends before each call, and goes on after it: scales may be written in it, by calls or by the model."""
    case = StoredCase([(5, 13), (17, 6)], cache="paged", page_size=4, scales=scales, dtype=torch.bfloat16)
    plan = case.plan(1)
    meta = plan.metadata(0)
    eager, compiled, written = (case.pages(plan, 0) for _ in range(3))

    def layer(q: Tensor, k: Tensor, v: Tensor, cache: cpattn.PagedKV, into: cpattn.PagedKV) -> Tensor:
        out = cpattn.cp_attention(2 * q, k, v, meta, kv_cache=cache)
        cpattn.write_kv(k, v, into, slots)
        return out + cpattn.attend(q, into, meta)

    slots = cpattn.slot_mapping(meta, written.cache.page_table, 4)
    want = layer(case.q, case.k, case.v, eager.cache, eager.cache)
    as_graph = torch.compile(layer, backend="aot_eager", fullgraph=False)
    assert torch.equal(as_graph(case.q, case.k, case.v, compiled.cache, written.cache), want)
    compiled.check_written()
    written.check_written()


def test_scales_may_be_written_in_the_graph() -> None:
    """As engines do that calibrate: before a call by whose scales it then goes."""
    torch.manual_seed(0)
    q, k = (torch.randn(9, heads, 16, dtype=torch.bfloat16) for heads in (4, 2))
    meta, table = cpattn.build_metadata([(0, 9)], 1, 0), torch.tensor([[2, 0, 1]])

    def layer(cache: cpattn.PagedKV, k_scale: Tensor, v_scale: Tensor) -> Tensor:
        for scale in (k_scale, v_scale):
            scale.copy_(k.abs().amax(dim=(0, 2)).float() / 448)
        out = cpattn.cp_attention(q, k, k, meta, kv_cache=cache)
        assert isinstance(out, Tensor)
        return out

    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager")):
        pages = torch.zeros(2, 4, 4, 2, 16).to(torch.float8_e4m3fn)
        k_scale, v_scale = torch.ones(2), torch.ones(2)
        cache = cpattn.PagedKV(pages[0], pages[1], table, k_scale=k_scale, v_scale=v_scale)
        results.append((run(cache, k_scale, v_scale), pages.view(torch.uint8)))
    assert all(map(torch.equal, *results))
