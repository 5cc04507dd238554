"""Which of the keys at hand the queries of a launch see, and the same launch over these alone: for keys that cost something each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from cpattn.current import is_capturing
from cpattn.device_tables import exclusive_cumsum, expand_all
from cpattn.errors import CPError
from cpattn.spans import Spans, SpanTable


class SeenRows(NamedTuple):
    """Rows of keys that lie one after another, without pages.

    Attributes:
        rows: those that some query sees, in their order: a slice where they follow each other, else int32 ``[n]``. None where all are seen.
        spans: the same queries over these.
    """

    rows: slice | Tensor | None
    spans: Spans

    @classmethod
    def of(cls, spans: Spans, window: int | None, num_keys: int) -> SeenRows:
        """Of a launch over so many keys; made once a batch. A bucket's sizes are fixed, and so are all of its keys.

        >>> spans = Spans.build(q_len=[2, 1], k_start=[0, 6], k_len=[6, 3], diagonal=[5, 3])
        >>> seen = SeenRows.of(spans, window=3, num_keys=9)
        >>> seen.rows, seen.spans.host.k_start.tolist(), seen.spans.host.k_len.tolist(), seen.spans.host.diagonal.tolist()
        (slice(2, 9, None), [0, 4], [4, 3], [3, 3])
        """
        if spans.fixed:
            return cls(None, spans)
        return spans.derive(("seen rows", window, num_keys), _seen_rows, spans, window, num_keys)

    def take(self, keys: Tensor) -> Tensor:
        """These rows ``[n, ...]`` of ``[num_keys, ...]``."""
        if self.rows is None:
            return keys
        return keys[self.rows] if isinstance(self.rows, slice) else keys.index_select(0, self.rows)


def _seen_rows(spans: Spans, window: int | None, num_keys: int) -> SeenRows:
    host = spans.host
    unseen = np.zeros_like(host.k_len) if window is None else np.clip(host.diagonal - window, 0, host.k_len)
    ends = np.clip(host.diagonal + host.q_len - 1, unseen, host.k_len)
    k_len = np.where(host.q_len > 0, ends - unseen, 0)
    first, sees = host.k_start + unseen, k_len > 0
    # Ranges that overlap, or follow each other, are one run of rows.
    order = first[sees].argsort(kind="stable")
    begins = first[sees][order]
    reached = np.maximum.accumulate(begins + k_len[sees][order])
    is_first = np.ones(len(begins), dtype=bool)
    is_first[1:] = begins[1:] > reached[:-1]
    run_begins, run_ends = begins[is_first], reached[np.append(is_first[1:], True)] if len(begins) else reached
    lengths = run_ends - run_begins
    if lengths.sum() == num_keys:
        return SeenRows(None, spans)
    if not len(begins):
        return SeenRows(slice(0, 0), spans)
    run = np.maximum(run_begins.searchsorted(first, side="right") - 1, 0)
    k_start = np.where(sees, first + (exclusive_cumsum(lengths) - run_begins)[run], 0)
    table = SpanTable(host.q_len, k_start, k_len, host.diagonal - unseen, host.request, spans.alignment)
    device = spans.cu_seqlens_q.device
    if is_capturing(device):
        raise CPError("the first launch over these spans would be captured with its tables; make the same call once before capturing it")
    rows: slice | Tensor = slice(int(run_begins[0]), int(run_ends[0]))
    if len(lengths) > 1:
        rows = expand_all({"rows": (run_begins, lengths)}, device)["rows"]
    return SeenRows(rows, Spans.build_all([table], device)[0])
