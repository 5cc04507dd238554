from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpattn.attention.flash_varlen import packs_heads
from cpattn.attention.ragged_rows import RaggedRows
from cpattn.spans import HostSpans, SpanTable


@pytest.mark.parametrize(
    ("table", "alignment"),
    [
        pytest.param([], "bottom_right", id="no rows"),
        pytest.param([(4, 0, 10, 7)], "bottom_right", id="causal"),
        pytest.param([(4, 0, 10, 10)], "full", id="all keys in the past"),
        pytest.param([(4, 0, 10, 7), (4, 0, 10, 10)], "any", id="both kinds"),
        pytest.param([(4, 0, 10, 7), (9, 0, 0, -5), (0, 3, 5, 1)], "bottom_right", id="rows without work fit anything"),
        pytest.param([(1, 0, 10, 10)], "bottom_right", id="one query"),
        pytest.param([(4, 0, 10, 8)], "any", id="last query would see beyond the range"),
    ],
)
def test_alignment(table: list[tuple[int, int, int, int]], alignment: str) -> None:
    assert RaggedRows.build(*np.array(table, dtype=np.int64).reshape(-1, 4).T).alignment == alignment


def test_tensors_and_lengths() -> None:
    rows = RaggedRows.build(*np.array([(4, 7, 10, 7), (0, 3, 20, 1), (2, 0, 5, 4)]).T)
    assert rows.cu_seqlens_q.tolist() == [0, 4, 4, 6]
    assert rows.k_start.tolist() == [7, 3, 0]
    assert rows.k_len.tolist() == [10, 20, 5]
    assert rows.diagonal.tolist() == [7, 1, 4]
    assert {x.dtype for x in (rows.cu_seqlens_q, rows.k_start, rows.k_len, rows.diagonal)} == {torch.int32}
    assert (rows.max_seqlen_q, rows.max_seqlen_k, rows.num_queries, len(rows)) == (4, 20, 6, 3)


class Counted:
    """What a backend might keep with rows."""

    seen: HostSpans | None = None

    def refresh(self, host: HostSpans) -> None:
        self.seen = host


def table(*rows: tuple[int, int, int, int, int]) -> SpanTable:
    q_len, k_start, k_len, diagonal, request = np.array(rows, dtype=np.int64).T
    return SpanTable(q_len, k_start, k_len, diagonal, request, "any")


def test_fixed_rows_take_over_others_at_their_addresses() -> None:
    first, second = table((4, 7, 10, 7, 0), (2, 3, 20, 1, 1)), table((1, 0, 5, 5, 2), (0, 0, 0, 0, 0))
    names = ("cu_seqlens_q", "k_start_padded", "k_len", "diagonal", "request")
    (rows,), (other,) = (RaggedRows.build_all([x], "cpu", fixed_lengths=(16, 64)) for x in (first, second))
    assert (rows.fixed, rows.max_seqlen_q, rows.max_seqlen_k, rows.has_empty_range) == (True, 16, 64, True)
    paged = rows.with_pages(torch.tensor([[0], [1], [2]]), 64)
    rows.prepared["kept"] = kept = Counted()
    before = {name: getattr(rows, name).data_ptr() for name in names}
    assert paged.row_pages.tolist() == [[0], [1]]

    rows.copy_(other)
    assert {name: getattr(rows, name).data_ptr() for name in names} == before
    for name in names:
        assert torch.equal(getattr(rows, name), getattr(other, name)), name
    assert kept.seen is rows.host is other.host
    assert (rows.max_seqlen_q, rows.max_seqlen_k) == (16, 64)
    # What was made of them before a copy sees it, too: the tensors are the same.
    assert paged.row_pages.tolist() == [[2], [0]]
    assert rows.page_table is None


def test_layers_with_one_page_table_share_one_object_until_the_rows_change() -> None:
    (rows,), (other,) = (RaggedRows.build_all([table((4, 0, 10, 7, 0))], "cpu", fixed_lengths=(16, 64)) for _ in range(2))
    page_table = torch.tensor([[0, 1]])
    paged = rows.with_pages(page_table, 16)
    assert rows.with_pages(page_table, 16) is paged
    assert (rows.with_pages(page_table, 8).max_seqlen_k, paged.max_seqlen_k) == (16, 32)
    assert rows.with_pages(page_table.clone(), 16) is not paged
    rows.memo.keep("found out", 1)
    paged = rows.with_pages(page_table, 16)
    assert paged.memo is rows.memo
    rows.copy_(other)
    assert not rows.memo
    assert rows.with_pages(page_table, 16) is not paged
    assert rows.with_pages(page_table, 16).host is other.host


def test_rows_that_are_not_fixed_know_whether_one_is_empty() -> None:
    one_empty, none_empty = RaggedRows.build_all([table((1, 0, 5, 5, 2), (3, 0, 0, 0, 0)), table((1, 0, 5, 5, 2))], "cpu")
    assert (one_empty.has_empty_range, none_empty.has_empty_range) == (True, False)
    assert not one_empty.fixed


def test_tiled_pairs_count_the_padding_of_tiles() -> None:
    rows = RaggedRows.build(*np.array([(100, 0, 10, 10), (130, 0, 7, 7), (5, 0, 0, 0)]).T)
    assert rows.tiled_pairs(tile=128, pack=1) == 128 * 10 + 256 * 7
    # 400 and 520 rows of four heads each fill 4 and 5 tiles.
    assert rows.tiled_pairs(tile=128, pack=4) == 128 * 10 + 160 * 7


@pytest.mark.parametrize(("q_len", "packed"), [(1, True), (96, True), (128, False), (1024, False), (8192, False)])
def test_flash_attn4_packs_heads_where_tiles_would_be_empty(q_len: int, packed: bool) -> None:
    rows = RaggedRows.build(*np.array([(q_len, 0, 8192, 8192 - q_len + 1)] * 3).T)
    assert packs_heads(rows, group=4) == packed
    assert not packs_heads(rows, group=1)


@given(
    table=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(-12, 30)), max_size=5),
    window=st.one_of(st.none(), st.integers(1, 25)),
)
@settings(max_examples=200, deadline=None)
def test_which_queries_see_keys(table: list[tuple[int, int, int]], window: int | None) -> None:
    q_len, k_len, diagonal = np.array(table, dtype=np.int64).reshape(-1, 3).T
    rows = RaggedRows.build(q_len, np.zeros_like(q_len), k_len, diagonal)
    expected = [
        any(sees_to - (window or 999) <= key < sees_to for key in range(length))
        for number, length, first in table
        for sees_to in range(first, first + number)
    ]
    assert rows.sees_keys(window).tolist() == expected


def test_which_queries_see_keys_is_kept_and_refilled_in_place() -> None:
    (rows,), (other,) = (
        RaggedRows.build_all([table(*lines)], "cpu", fixed_lengths=(16, 64))
        for lines in ([(4, 0, 10, 7, 0), (2, 0, 0, 0, 0)], [(1, 0, 0, 0, 0), (5, 0, 9, -1, 1)])
    )
    with torch.inference_mode():
        sees = rows.sees_keys()
    assert rows.sees_keys() is sees
    assert rows.with_pages(torch.tensor([[0]]), 64).sees_keys() is sees
    assert rows.sees_keys(3) is not sees
    assert sees.tolist() == [True] * 4 + [False] * 2
    rows.copy_(other)
    assert rows.sees_keys() is sees
    assert sees.tolist() == [False] * 3 + [True] * 3
    assert rows.sees_keys(1).tolist() == other.sees_keys(1).tolist()


def test_rows_are_freed_with_what_they_keep() -> None:
    rows = RaggedRows.build(*np.array([(4, 0, 10, 7)]).T)
    rows.sees_keys()
    alive = weakref.ref(rows)
    gc.disable()
    try:
        del rows
        assert alive() is None
    finally:
        gc.enable()
