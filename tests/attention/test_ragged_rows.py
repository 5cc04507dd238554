"""RaggedRows: what callers' kernels are handed, and what users build, as spans with a page table."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import torch

import cpattn
from cpattn.attention.ragged_rows import RaggedRows
from cpattn.keys import Keys
from cpattn.spans import HostSpans, Spans, SpanTable

Q_LEN, K_LEN, DIAGONAL, REQUEST = np.array([(4, 10, 7, 1), (2, 5, 4, 0)]).T
TABLE = SpanTable(Q_LEN, 0 * K_LEN, K_LEN, DIAGONAL, REQUEST, "any")


def fixed(kind: type[Spans]) -> Any:
    return kind.build_all([TABLE], "cpu", fixed_lengths=(16, 64))[0]


class Kept:
    """What a kernel might keep with rows."""

    refreshed = 0

    def refresh(self, host: HostSpans) -> None:
        self.refreshed += 1


def test_layers_with_one_page_table_share_one_object_until_the_rows_change() -> None:
    rows, other = fixed(RaggedRows), fixed(RaggedRows)
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


def test_rows_over_pages_follow_a_copy() -> None:
    rows, other = fixed(RaggedRows), RaggedRows.build_all([TABLE._replace(request=np.array([2, 0]))], "cpu", fixed_lengths=(16, 64))[0]
    paged = rows.with_pages(torch.tensor([[0], [1], [2]]), 64)
    assert paged.row_pages.tolist() == [[1], [0]]
    rows.copy_(other)
    # The tensors are the same.
    assert paged.row_pages.tolist() == [[2], [0]]
    assert rows.page_table is None


def test_what_a_kernel_keeps_with_its_rows_is_kept_with_the_spans() -> None:
    """A CUDA graph has captured it, and the spans' copy_ is what is called."""
    spans, keys = fixed(Spans), Keys(torch.zeros(4, 16, 1, 8), torch.zeros(4, 16, 1, 8), torch.tensor([[0, 1], [2, 3]]))
    rows = RaggedRows.of(spans, keys)
    rows.prepared["mine"] = kept = Kept()
    rows.memo.keep("found out", 1)
    assert rows.sees_keys() is spans.sees_keys()
    # Over another table it is still there.
    other = RaggedRows.of(spans, keys._replace(page_table=torch.tensor([[1, 0], [2, 3]])))
    assert other is not rows
    assert other.prepared["mine"] is kept
    spans.copy_(fixed(Spans))
    assert kept.refreshed == 1
    assert not rows.memo


def test_layers_are_handed_one_object_while_spans_and_table_are_the_same() -> None:
    spans = fixed(Spans)
    table = torch.tensor([[0, 1], [2, 3]])
    handed = []

    def kernel(q: Any, k: Any, v: Any, rows: RaggedRows, **options: Any) -> Any:
        handed.append(rows)
        return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(q.shape[:2])

    backend, q = cpattn.custom_backend(kernel, page_sizes=lambda size: True), torch.zeros(6, 1, 8)
    options = cpattn.AttentionOptions(1.0)
    k, v = torch.zeros(2, 4, 16, 1, 8)
    for _ in range(3):
        backend.attend(q, Keys(k, v, table), spans, options, q.dtype)
    backend.attend(q, Keys(k, v, table.clone()), spans, options, q.dtype)
    backend.attend(q, Keys(k.flatten(0, 1), v.flatten(0, 1)), spans, options, q.dtype)
    first, second, third, over_another, dense = handed
    assert first is second is third is not over_another
    assert (first.page_table, first.max_seqlen_k, dense.page_table, dense.max_seqlen_k) == (table, 32, None, 64)
    assert (len(first), first.fixed, first.alignment, first.host) == (2, True, "any", spans.host)
    # What a caller builds is handed on as it is.
    rows = RaggedRows.build(*np.array([(6, 0, 30, 25)]).T).with_pages(table, 16)
    backend.run(q, k, v, rows, options, q.dtype)
    assert handed[-1] is rows


def test_spans_are_freed_with_the_rows_made_of_them() -> None:
    spans = fixed(Spans)
    rows = weakref.ref(RaggedRows.of(spans, Keys(*torch.zeros(2, 64, 1, 8))))
    assert rows() is not None
    alive = weakref.ref(spans)
    gc.disable()
    try:
        del spans
        assert alive() is rows() is None
    finally:
        gc.enable()
