"""Calls where a default device, or any other mode, is asked about each operation: theirs are few, and a caller's own functions keep it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from torch import Tensor
from torch.overrides import TorchFunctionMode

import cpattn
from cpattn.attention.reference import reference_attention


class Asked(TorchFunctionMode):
    """Notes what it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", ["packed", "paged"])
def test_a_layer_asks_about_its_arguments_alone(cache: str) -> None:
    """It reads what their layouts are; all else it does unasked."""
    case = AttentionCase([(5, 20), (0, 7)], cache=cache)
    plan = case.plan(1)
    meta, pages = plan.metadata(0), None if cache == "packed" else case.pages(plan, 0).cache
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))

    def layer() -> Tensor:
        return cpattn.cp_attention(q, k, v, meta, kv_cache=pages or case.prefix)

    expected = layer()
    with Asked() as asked:
        out = layer()
    assert torch.equal(out, expected)
    reads = {"__get__", "stride", "is_inference", "size", "dim", "data_ptr", "numel", "element_size", "is_contiguous"}
    assert asked.names
    # A CPU looks at what a page table holds.
    assert cache == "paged" or set(asked.names) <= reads
    assert not {"empty", "new_empty", "matmul", "scaled_dot_product_attention", "index_select", "copy_"} & set(asked.names)


def own_kernel(seen: list[str]) -> Callable[..., tuple[Tensor, Tensor]]:
    def attend(*arguments: Any) -> tuple[Tensor, Tensor]:
        seen.append(torch.empty(0).device.type)
        return reference_attention(*arguments)

    return attend


def test_a_kernel_of_ones_own_keeps_the_default_device() -> None:
    case = AttentionCase([(0, 9)], cache="packed")
    seen: list[str] = []
    meta = case.plan(1).metadata(0)
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    backend = cpattn.Backend(**{**vars(cpattn.BACKENDS["reference"]), "name": "mine", "attend": own_kernel(seen)})
    with torch.device("meta"):
        out = cpattn.cp_attention(q, k, v, meta, backend=backend)
    assert seen == ["meta"]
    assert torch.equal(out, cpattn.cp_attention(q, k, v, meta, backend="reference"))
