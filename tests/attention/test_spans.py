from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpattn.attention.flash_varlen import packs_heads
from cpattn.keys import Keys
from cpattn.spans import HostSpans, Spans, SpanTable


@pytest.mark.parametrize(
    ("table", "alignment"),
    [
        pytest.param([], "bottom_right", id="no spans"),
        pytest.param([(4, 0, 10, 7)], "bottom_right", id="causal"),
        pytest.param([(4, 0, 10, 10)], "full", id="all keys in the past"),
        pytest.param([(4, 0, 10, 7), (4, 0, 10, 10)], "any", id="both kinds"),
        pytest.param([(4, 0, 10, 7), (9, 0, 0, -5), (0, 3, 5, 1)], "bottom_right", id="spans without work fit anything"),
        pytest.param([(1, 0, 10, 10)], "bottom_right", id="one query"),
        pytest.param([(4, 0, 10, 8)], "any", id="last query would see beyond the range"),
    ],
)
def test_alignment(table: list[tuple[int, int, int, int]], alignment: str) -> None:
    assert Spans.build(*np.array(table, dtype=np.int64).reshape(-1, 4).T).alignment == alignment


def test_tensors_and_lengths() -> None:
    spans = Spans.build(*np.array([(4, 7, 10, 7), (0, 3, 20, 1), (2, 0, 5, 4)]).T)
    assert spans.cu_seqlens_q.tolist() == [0, 4, 4, 6]
    assert spans.k_start.tolist() == [7, 3, 0]
    assert spans.k_len.tolist() == [10, 20, 5]
    assert spans.diagonal.tolist() == [7, 1, 4]
    assert {x.dtype for x in (spans.cu_seqlens_q, spans.k_start, spans.k_len, spans.diagonal)} == {torch.int32}
    assert (spans.max_seqlen_q, spans.max_seqlen_k, spans.num_queries, len(spans)) == (4, 20, 6, 3)


class Counted:
    """What a backend might keep with spans."""

    seen: HostSpans | None = None

    def refresh(self, host: HostSpans) -> None:
        self.seen = host


def table(*spans: tuple[int, int, int, int, int]) -> SpanTable:
    q_len, k_start, k_len, diagonal, request = np.array(spans, dtype=np.int64).T
    return SpanTable(q_len, k_start, k_len, diagonal, request, "any")


def test_fixed_spans_take_over_others_at_their_addresses() -> None:
    first, second = table((4, 7, 10, 7, 0), (2, 3, 20, 1, 1)), table((1, 0, 5, 5, 2), (0, 0, 0, 0, 0))
    names = ("cu_seqlens_q", "k_start_padded", "k_len", "diagonal", "request")
    (spans,), (other,) = (Spans.build_all([x], "cpu", fixed_lengths=(16, 64)) for x in (first, second))
    assert (spans.fixed, spans.max_seqlen_q, spans.max_seqlen_k, spans.has_empty_range) == (True, 16, 64, True)
    keys = Keys(torch.zeros(3, 64, 1, 8), torch.zeros(3, 64, 1, 8), torch.tensor([[0], [1], [2]]))
    kept = spans.derive("kept", Counted)
    assert spans.derive("made anew", lambda: [1]) == [1]
    before = {name: getattr(spans, name).data_ptr() for name in names}
    assert keys.lines(spans).tolist() == [[0], [1]]

    spans.copy_(other)
    assert {name: getattr(spans, name).data_ptr() for name in names} == before
    for name in names:
        assert torch.equal(getattr(spans, name), getattr(other, name)), name
    assert kept.seen is spans.host is other.host
    assert (spans.max_seqlen_q, spans.max_seqlen_k) == (16, 64)
    assert keys.lines(spans).tolist() == [[2], [0]]
    assert spans.derive("kept", Counted) is kept
    assert spans.derive("made anew", lambda: [2]) == [2]


def test_spans_that_are_not_fixed_know_whether_one_is_empty() -> None:
    one_empty, none_empty = Spans.build_all([table((1, 0, 5, 5, 2), (3, 0, 0, 0, 0)), table((1, 0, 5, 5, 2))], "cpu")
    assert (one_empty.has_empty_range, none_empty.has_empty_range) == (True, False)
    assert not one_empty.fixed


def test_tiled_pairs_count_the_padding_of_tiles() -> None:
    spans = Spans.build(*np.array([(100, 0, 10, 10), (130, 0, 7, 7), (5, 0, 0, 0)]).T)
    assert spans.tiled_pairs(tile=128, pack=1) == 128 * 10 + 256 * 7
    # 400 and 520 rows of four heads each fill 4 and 5 tiles.
    assert spans.tiled_pairs(tile=128, pack=4) == 128 * 10 + 160 * 7


@pytest.mark.parametrize(("q_len", "packed"), [(1, True), (96, True), (128, False), (1024, False), (8192, False)])
def test_flash_attn4_packs_heads_where_tiles_would_be_empty(q_len: int, packed: bool) -> None:
    spans = Spans.build(*np.array([(q_len, 0, 8192, 8192 - q_len + 1)] * 3).T)
    assert packs_heads(spans, group=4) == packed
    assert not packs_heads(spans, group=1)


@given(
    table=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(-12, 30)), max_size=5),
    window=st.one_of(st.none(), st.integers(1, 25)),
)
@settings(max_examples=200, deadline=None)
def test_which_queries_see_keys(table: list[tuple[int, int, int]], window: int | None) -> None:
    q_len, k_len, diagonal = np.array(table, dtype=np.int64).reshape(-1, 3).T
    spans = Spans.build(q_len, np.zeros_like(q_len), k_len, diagonal)
    expected = [
        any(sees_to - (window or 999) <= key < sees_to for key in range(length))
        for number, length, first in table
        for sees_to in range(first, first + number)
    ]
    assert spans.sees_keys(window).tolist() == expected


def test_which_queries_see_keys_is_kept_and_refilled_in_place() -> None:
    (spans,), (other,) = (
        Spans.build_all([table(*lines)], "cpu", fixed_lengths=(16, 64))
        for lines in ([(4, 0, 10, 7, 0), (2, 0, 0, 0, 0)], [(1, 0, 0, 0, 0), (5, 0, 9, -1, 1)])
    )
    with torch.inference_mode():
        sees = spans.sees_keys()
    assert spans.sees_keys() is sees
    assert spans.sees_keys(3) is not sees
    assert sees.tolist() == [True] * 4 + [False] * 2
    spans.copy_(other)
    assert spans.sees_keys() is sees
    assert sees.tolist() == [False] * 3 + [True] * 3
    assert spans.sees_keys(1).tolist() == other.sees_keys(1).tolist()


def test_spans_are_freed_with_what_they_keep() -> None:
    spans = Spans.build(*np.array([(4, 0, 10, 7)]).T)
    spans.sees_keys()
    alive = weakref.ref(spans)
    gc.disable()
    try:
        del spans
        assert alive() is None
    finally:
        gc.enable()


def test_what_is_derived_is_made_once_and_does_not_grow() -> None:
    spans = Spans.build(*np.array([(4, 0, 10, 7)]).T)
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number

    for _ in range(2):
        for number in range(3):
            assert spans.derive(("number", number), make, number) == number
    assert made == [0, 1, 2]
    assert not spans.derive("no", lambda: False)
    kept = spans.derive("kept", Counted)
    for number in range(1000):
        spans.derive(("number", number), make, number)
    assert len(spans._remade) <= 64
    # What a CUDA graph may have captured stays.
    assert spans.derive("kept", Counted) is kept


def test_keys_say_where_they_lie() -> None:
    spans = Spans.build_all([table((4, 0, 40, 37, 1), (2, 0, 5, 4, 0))], "cpu")[0]
    dense = Keys(torch.zeros(50, 2, 8), torch.zeros(50, 2, 4))
    assert (dense.page_size, dense.max_seqlen(spans)) == (0, 40)
    paged = Keys(torch.zeros(9, 16, 2, 8), torch.zeros(9, 16, 2, 4), torch.tensor([[3, 4], [7, 8]]))
    assert (paged.page_size, paged.max_seqlen(spans)) == (16, 32)
    assert paged.lines(spans).tolist() == [[7, 8], [3, 4]]
