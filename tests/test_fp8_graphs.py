"""Compiled graphs over pages in fp8."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from stored_cases import StoredCase
from torch import Tensor

import cpattn


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("scales", ["head", "token"])
def test_a_graph_does_what_its_calls_do(scales: str) -> None:
    """With scales of tokens, which calls write, it ends before each call, and goes on after it."""
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
    as_graph = torch.compile(layer, backend="aot_eager", fullgraph=scales == "head")
    assert torch.equal(as_graph(case.q, case.k, case.v, compiled.cache, written.cache), want)
    compiled.check_written()
    written.check_written()
