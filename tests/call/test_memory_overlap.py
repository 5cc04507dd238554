"""Which views have an element in common: against a look at each element, and for the layouts that caches have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpattn.call.memory_overlap import overlaps_itself, share_elements

STORAGE = torch.zeros(2000, dtype=torch.uint8)


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """Small views of one storage: strides of all kinds, 0 and overlapping windows among them."""
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
    dims = draw(st.integers(0, 4))
    shape = draw(st.lists(st.integers(0, 4) | st.integers(1, 3), min_size=dims, max_size=dims))
    strides = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 7, 8, 12, 16, 24]), min_size=dims, max_size=dims))
    return STORAGE.view(dtype).as_strided(shape, strides, draw(st.integers(0, 40)))


def element_starts(x: Tensor) -> list[int]:
    """The first byte of the element at each index."""
    numbers = torch.arange(len(STORAGE) // x.element_size()).as_strided(x.shape, x.stride(), int(x.storage_offset()))
    return [x.element_size() * int(number) for number in numbers.flatten()]


def bytes_of(x: Tensor) -> set[int]:
    return {start + i for start in element_starts(x) for i in range(x.element_size())}


@given(x=views(), y=views())
@settings(max_examples=200, deadline=None)
def test_views_share_what_some_byte_of_both_says(x: Tensor, y: Tensor) -> None:
    assert share_elements(x, y) == bool(bytes_of(x) & bytes_of(y))


@given(x=views())
@settings(max_examples=200, deadline=None)
def test_a_view_overlaps_itself_where_two_indices_are_one_element(x: Tensor) -> None:
    starts = element_starts(x)
    assert overlaps_itself(x) == (len(set(starts)) < len(starts))


P, PAGE, H, D = 1000, 16, 8, 128


def pool(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def every_other(heads: Tensor) -> tuple[Tensor, Tensor]:
    return heads[:, :, ::2], heads[:, :, 1::2]


def heads_first(k_pages: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
    return k_pages.transpose(1, 2), v_pages.transpose(1, 2)


APART: dict[str, Any] = {
    "two tensors": (pool(P, PAGE, H, D), pool(P, PAGE, H, D)),
    "K before V": pool(2, P, PAGE, H, D).unbind(),
    "page by page": pool(P, 2, PAGE, H, D).unbind(1),
    "token by token": pool(P, PAGE, 2, H, D).unbind(2),
    "head by head": pool(P, PAGE, H, 2, D).unbind(3),
    "halves of the last axis": pool(P, PAGE, H, 2 * D).chunk(2, -1),
    "halves of the heads": pool(P, PAGE, 2 * H, D).chunk(2, 2),
    "every other head": every_other(pool(P, PAGE, 2 * H, D)),
    "heads outside of tokens": heads_first(*pool(P, 2, H, PAGE, D).unbind(1)),
    "head by head, heads outside": heads_first(*pool(P, H, PAGE, 2, D).unbind(3)),
    "other head dims": torch.split(pool(P, PAGE, H, 192 + 128), [192, 128], -1),
    "layers outside of K and V": pool(P, 4, 2, PAGE, H, D)[:, 3].unbind(1),
    "layers innermost": pool(P, PAGE, H, 4, 2, D)[:, :, :, 1].unbind(3),
    "padded rows": pool(P, PAGE, 2, H, D + 8)[..., :D].unbind(2),
}


@pytest.mark.parametrize(("k_pages", "v_pages"), APART.values(), ids=APART)
def test_layouts_of_caches_are_apart(k_pages: Tensor, v_pages: Tensor) -> None:
    assert k_pages.shape[:3] == v_pages.shape[:3] == (P, PAGE, H)
    assert not share_elements(k_pages, v_pages)
    assert not overlaps_itself(k_pages)
    # One page, token, head or column on, the two meet.
    assert share_elements(k_pages, k_pages[-1:, -1:, -1:, -1:])
    assert share_elements(v_pages[-1:, -1:, -1:, -1:], v_pages)


def test_the_memory_counts_and_not_the_storage() -> None:
    x = torch.zeros(8, 4)
    alias = torch.from_numpy(x.numpy()[2:])
    assert x.untyped_storage().data_ptr() != alias.untyped_storage().data_ptr()
    assert share_elements(x, alias)
    assert not share_elements(x[:2], alias)


def test_a_search_that_would_take_too_long_is_given_up() -> None:
    """Many axes whose strides have nothing to do with each other; two such views count as apart, though they are not."""
    strides = [10_007 + 95_028 * i + 101 * i * i for i in range(14)]
    x = torch.empty(1 + 2 * sum(strides), dtype=torch.uint8).as_strided((3,) * 14, strides)
    assert not share_elements(x, x[..., :1])
