"""RaggedRows: the one description of work that every backend takes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cpattn.current import is_capturing
from cpattn.device_tables import DeviceTables, expand_runs_on_device
from cpattn.memo import Memo
from cpattn.metadata.batch import IntArray

# How the rows lie to their diagonal; a kernel that knows only some of these is kept away from the others.
#   bottom_right: the last query of every row sees the range's last key and no further: what "causal" means in varlen kernels
#   full:         every query of every row sees its whole range: no mask at all
#   any:          anything else
Alignment: TypeAlias = Literal["bottom_right", "full", "any"]


# Launches of one RaggedRows: a layout of the tensors each, of which a model has few.
_MOST_REMEMBERED = 64


class HostRows(NamedTuple):
    """The rows as int64 arrays on the host, for backends that loop or choose by length."""

    q_start: IntArray
    q_len: IntArray
    k_start: IntArray
    k_len: IntArray
    diagonal: IntArray
    request: IntArray


class RowTable(NamedTuple):
    """What a RaggedRows is built from: int64 arrays ``[n]`` on the host, and what is known of all rows.

    Attributes:
        q_len, k_start, k_len, diagonal, request: see :class:`RaggedRows`.
        alignment: what holds for all rows, whatever the batch.
    """

    q_len: IntArray
    k_start: IntArray
    k_len: IntArray
    diagonal: IntArray
    request: IntArray
    alignment: Alignment


class Prepared(Protocol):
    """What a backend has made of the rows and keeps with them, such as a table of tiles on the device."""

    def refresh(self, host: HostRows) -> None:
        """Makes it anew for other rows of the same capacity, at the same addresses."""


@dataclass(frozen=True, eq=False)
class _SeeingQueries:
    """Which queries see a key, in memory that stays where it is. It holds no rows, which hold it."""

    cu_seqlens_q: Tensor
    k_len: Tensor
    diagonal: Tensor
    window: int | None
    mask: Tensor

    def refresh(self, host: HostRows) -> None:
        """See :class:`Prepared`. The tables on the device have been filled by then."""
        self.mask.copy_(_sees_keys(self.cu_seqlens_q, self.k_len, self.diagonal, self.window, len(self.mask)))


def _sees_keys(cu_seqlens_q: Tensor, k_len: Tensor, diagonal: Tensor, window: int | None, num_queries: int) -> Tensor:
    """bool ``[num_queries]``, without waiting for the device: whether any key lies within a query's bounds."""
    q_len = cu_seqlens_q.diff()
    sees_to = expand_runs_on_device(diagonal, q_len, num_queries)
    in_range = expand_runs_on_device(k_len, q_len, num_queries, step=0)
    sees_from = torch.zeros_like(sees_to) if window is None else (sees_to - window).clamp(min=0)
    return torch.minimum(sees_to, in_range) > sees_from


@dataclass(eq=False)
class RaggedRows:
    """Rows of attention work: which queries see which keys. All of a launch's rows together, in any number.

    Row ``i`` is the queries ``cu_seqlens_q[i] .. cu_seqlens_q[i + 1] - 1`` against the keys ``k_start[i] ..
    k_start[i] + k_len[i] - 1``. Query ranges follow each other; key ranges may lie anywhere and overlap.
    Query ``j`` of the row (from 0) sees the first ``clamp(diagonal[i] + j, 0, k_len[i])`` keys of its range, and with
    a window ``W`` those from number ``diagonal[i] + j - W`` on. The diagonal is thus the number of keys that the row's
    first query would see in a range without end; it may lie beyond the range (all keys are in the past) or below 1.

    Without a page table, K and V are ``[S, heads, head_dim]`` and key ``s`` is their row s. With one they are pages
    ``[num_pages, page_size, heads, head_dim]``, and key ``s`` of row ``i`` is in page ``page_table[request[i], s //
    page_size]`` at ``s % page_size``; all key ranges then begin at 0.

    Attributes:
        cu_seqlens_q: int32 ``[n + 1]``, begins with 0.
        k_start, k_len, diagonal, request: int32 ``[n]``.
        k_start_padded: int32 ``[n + 1]``: k_start and one entry more, for kernels that take starts as cumulative lengths.
        max_seqlen_q, max_seqlen_k: the longest query range and the longest key range, in rows (0 if there is none);
            where the rows are fixed, what they may grow to.
        alignment: what holds for all rows; see :data:`Alignment`.
        fixed: their number and the sizes above stay, but :meth:`copy_` may change what they are, under a CUDA graph.
        host: the same numbers on the host.
        prepared: what backends keep with the rows, by a key of their own; a CUDA graph may have captured its addresses.
        memo: what else they have worked out, by a key of their own, and can make anew.
        page_table: int32 or int64 ``[num_requests, max_pages]``, or None.
    """

    cu_seqlens_q: Tensor
    k_start_padded: Tensor
    k_len: Tensor
    diagonal: Tensor
    request: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    alignment: Alignment
    host: HostRows
    fixed: bool = False
    prepared: dict[Hashable, Prepared] = field(default_factory=dict)
    memo: Memo[Hashable, Any] = field(default_factory=lambda: Memo(_MOST_REMEMBERED))
    page_table: Tensor | None = None
    _paged: RaggedRows | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.host.q_len)

    @property
    def k_start(self) -> Tensor:
        """int32 ``[n]``: where each row's key range begins."""
        return self.k_start_padded[:-1]

    @property
    def row_pages(self) -> Tensor:
        """The page table's line of each row, ``[n, max_pages]``, for kernels that take one a row."""
        assert self.page_table is not None
        return self.page_table.index_select(0, self.request)

    @cached_property
    def num_queries(self) -> int:
        """Query rows that the work covers; what lies beyond them in q is padding."""
        return int(self.host.q_len.sum())

    def tiled_pairs(self, tile: int, pack: int) -> float:
        """Query-key pairs that a kernel computes whose tiles hold ``tile`` rows, where a query takes up ``pack`` of them
        (that many heads share a tile); the padding of the last tile of each row is computed as well."""
        return float((-(-self.host.q_len * pack // tile) * tile / pack * self.host.k_len).sum())

    @cached_property
    def has_empty_range(self) -> bool:
        """Whether some row has, or may come to have, no keys at all."""
        return self.fixed or bool((self.host.k_len == 0).any())

    def sees_keys(self, window: int | None = None) -> Tensor:
        """Which queries see at least one key, bool ``[num_queries]`` on the device; made once a batch and window.

        >>> rows = RaggedRows.build(q_len=[3, 1], k_start=[0, 0], k_len=[9, 0], diagonal=[0, 5])
        >>> rows.sees_keys().tolist()
        [False, True, True, False]
        """
        key = "sees keys", window
        kept = self.prepared.get(key)
        if isinstance(kept, _SeeingQueries):
            return kept.mask
        tables = self.cu_seqlens_q, self.k_len, self.diagonal, window
        if is_capturing(self.k_len.device):
            # Memory of the graph, which each replay fills anew: nobody else may read it.
            return _sees_keys(*tables, self.num_queries)
        # A mask made under inference_mode could not be refilled outside of it.
        with torch.inference_mode(False):
            made = _SeeingQueries(*tables, _sees_keys(*tables, self.num_queries))
        self.prepared[key] = made
        return made.mask

    def with_pages(self, page_table: Tensor, page_size: int) -> RaggedRows:
        """The same rows over pages: one object for all layers of a batch that come with the same table."""
        max_seqlen_k = min(self.max_seqlen_k, page_table.shape[1] * page_size)
        paged = self._paged
        if paged is None or paged.page_table is not page_table or paged.max_seqlen_k != max_seqlen_k:
            paged = self._paged = replace(self, page_table=page_table, max_seqlen_k=max_seqlen_k)
        return paged

    def copy_(self, other: RaggedRows) -> None:
        """Takes over the other's work at the addresses of this; both are fixed, for the same sizes."""
        for name in ("cu_seqlens_q", "k_start_padded", "k_len", "diagonal", "request"):
            getattr(self, name).copy_(getattr(other, name))
        self.host = other.host
        self.memo.clear()
        self._paged = None
        for prepared in self.prepared.values():
            prepared.refresh(self.host)

    @classmethod
    def build_all(
        cls, tables: list[RowTable], device: torch.device | str, fixed_lengths: tuple[int, int] | None = None
    ) -> list[RaggedRows]:
        """Makes one RaggedRows for each table, with one copy to the device for all.

        Args:
            fixed_lengths: if the rows are to be fixed, the ``max_seqlen_q`` and ``max_seqlen_k`` that they may grow to.
        """
        hosts = [HostRows(np.cumsum(table.q_len) - table.q_len, *table[:-1]) for table in tables]
        packed: dict[str, IntArray] = {}
        for i, host in enumerate(hosts):
            packed[f"cu_seqlens_q {i}"] = np.append(host.q_start, host.q_len.sum())
            packed[f"k_start_padded {i}"] = np.append(host.k_start, 0)
            packed |= {f"{name} {i}": getattr(host, name) for name in ("k_len", "diagonal", "request")}
        on_device = DeviceTables(packed, torch.device(device))
        return [
            cls(
                cu_seqlens_q=on_device[f"cu_seqlens_q {i}"],
                k_start_padded=on_device[f"k_start_padded {i}"],
                k_len=on_device[f"k_len {i}"],
                diagonal=on_device[f"diagonal {i}"],
                request=on_device[f"request {i}"],
                max_seqlen_q=fixed_lengths[0] if fixed_lengths else int(host.q_len.max(initial=0)),
                max_seqlen_k=fixed_lengths[1] if fixed_lengths else int(host.k_len.max(initial=0)),
                alignment=table.alignment,
                host=host,
                fixed=fixed_lengths is not None,
            )
            for i, (host, table) in enumerate(zip(hosts, tables, strict=True))
        ]

    @classmethod
    def build(
        cls,
        q_len: IntArray,
        k_start: IntArray,
        k_len: IntArray,
        diagonal: IntArray,
        device: torch.device | str = "cpu",
        request: IntArray | None = None,
    ) -> RaggedRows:
        """Makes one RaggedRows from integer arrays ``[n]``, one entry a row; its alignment is found out."""
        q_len, k_start, k_len, diagonal = (np.asarray(column, dtype=np.int64) for column in (q_len, k_start, k_len, diagonal))
        request = np.zeros_like(q_len) if request is None else np.asarray(request, dtype=np.int64)
        alignment = find_alignment(q_len, k_start, k_len, diagonal)
        return cls.build_all([RowTable(q_len, k_start, k_len, diagonal, request, alignment)], device)[0]


def find_alignment(q_len: IntArray, k_start: IntArray, k_len: IntArray, diagonal: IntArray) -> Alignment:
    """The narrowest alignment that all rows have."""
    # A row without keys or without queries fits any alignment.
    has_work = (k_len > 0) & (q_len > 0)
    if (~has_work | (diagonal + q_len - 1 == k_len)).all():
        return "bottom_right"
    if (~has_work | (diagonal >= k_len)).all():
        return "full"
    return "any"
