"""RaggedRows: spans with the table of their keys' pages, as callers' kernels are handed them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from cpattn.keys import Keys
from cpattn.memo import Memo
from cpattn.spans import Refreshed, Spans


@dataclass(eq=False)
class RaggedRows(Spans):
    """Rows of attention work: which queries see which keys. All of a launch's rows together, in any number.

    Row ``i`` is the queries ``cu_seqlens_q[i] .. cu_seqlens_q[i + 1] - 1`` against the keys ``k_start[i] ..
    k_start[i] + k_len[i] - 1``. Query ranges follow each other; key ranges may lie anywhere and overlap.
    Query ``j`` of the row (from 0) sees the first ``clamp(diagonal[i] + j, 0, k_len[i])`` keys of its range, and with
    a window ``W`` those from number ``diagonal[i] + j - W`` on. The diagonal is thus the number of keys that the row's
    first query would see in a range without end. It may lie beyond the range (all keys are in the past) or below 1.

    Without a page table, K and V are ``[S, heads, head_dim]`` and key ``s`` is their row s. With one they are pages
    ``[num_pages, page_size, heads, head_dim]``, and key ``s`` of row ``i`` is in page ``page_table[request[i], s //
    page_size]`` at ``s % page_size``; all key ranges then begin at 0.

    They are :class:`cpattn.Spans` and have all that those have; what is derived from either is derived for both.

    Attributes:
        cu_seqlens_q: int32 ``[n + 1]``, begins with 0.
        k_start, k_len, diagonal, request: int32 ``[n]``.
        k_start_padded: int32 ``[n + 1]``: k_start and one entry more, for kernels that take starts as cumulative lengths.
        max_seqlen_q, max_seqlen_k: the longest query range and the longest key range, in rows (0 if there is none);
            where the rows are fixed, what they may grow to.
        alignment: what holds for all rows; see :data:`cpattn.spans.Alignment`.
        fixed: their number and the sizes above stay, but ``copy_`` may change what they are, under a CUDA graph.
        host: the same numbers on the host.
        page_table: int32 or int64 ``[num_requests, max_pages]``, or None.
    """

    page_table: Tensor | None = None

    @property
    def row_pages(self) -> Tensor:
        """The page table's line of each row, ``[n, max_pages]``, for kernels that take one a row."""
        assert self.page_table is not None
        return self.page_table.index_select(0, self.request)

    @property
    def prepared(self) -> dict[Hashable, Refreshed]:
        """What kernels keep with the rows and ``copy_`` refreshes, by a key of their own; ``derive`` puts it here."""
        return self._refreshed

    @property
    def memo(self) -> Memo[Hashable, Any]:
        """What else they have worked out, by a key of their own, and can make anew; ``derive`` puts it here."""
        return self._remade

    def with_pages(self, page_table: Tensor, page_size: int) -> RaggedRows:
        """The same rows over pages: one object for all layers of a batch that come with the same table."""
        return _view(self, page_table, min(self.max_seqlen_k, page_table.shape[1] * page_size))

    @classmethod
    def of(cls, spans: Spans, keys: Keys) -> RaggedRows:
        """The spans over such keys: one object for all layers of a batch that come with the same table."""
        max_seqlen_k = keys.max_seqlen(spans)
        if isinstance(spans, RaggedRows) and _is_over(spans, keys.page_table, max_seqlen_k):
            return spans
        return _view(spans, keys.page_table, max_seqlen_k)


def _is_over(rows: RaggedRows, page_table: Tensor | None, max_seqlen_k: int) -> bool:
    return rows.page_table is page_table and rows.max_seqlen_k == max_seqlen_k


def _view(spans: Spans, page_table: Tensor | None, max_seqlen_k: int) -> RaggedRows:
    """The last that was made of these spans, if it is over the same pages: keeping more would be a list that grows."""
    view: RaggedRows | None = spans.view
    if view is None or not _is_over(view, page_table, max_seqlen_k):
        same = {field.name: getattr(spans, field.name) for field in fields(Spans) if field.init}
        view = RaggedRows(**(same | {"max_seqlen_k": max_seqlen_k, "page_table": page_table}))
        # A CUDA graph may have captured what is derived from one of them, and the other's copy_ refreshes it.
        view._refreshed, view._remade = spans._refreshed, spans._remade
        spans.view = view
    return view
