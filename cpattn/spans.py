"""Spans: which queries see which keys. The one description of work that every backend takes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from cpattn.current import is_capturing
from cpattn.device_tables import IntArray, Unsent, exclusive_cumsum, expand_runs_on_device
from cpattn.memo import Memo

# How spans lie to their diagonal; a kernel that knows only some of these is kept away from the others.
#   bottom_right: the last query of every span sees the range's last key and no further: what "causal" means in varlen kernels
#   full:         every query of every span sees its whole range: no mask at all
#   any:          anything else
Alignment: TypeAlias = Literal["bottom_right", "full", "any"]

T = TypeVar("T")
S = TypeVar("S", bound="Spans")

# What is derived and can be made anew, such as launches: one for each layout of the tensors, of which a model has few.
_MOST_REMEMBERED = 64


class HostSpans(NamedTuple):
    """The spans as int64 arrays on the host, for backends that loop or choose by length."""

    q_start: IntArray
    q_len: IntArray
    k_start: IntArray
    k_len: IntArray
    diagonal: IntArray
    request: IntArray


class SpanTable(NamedTuple):
    """What spans are built from: int64 arrays ``[n]`` on the host, and what is known of all of them.

    Attributes:
        q_len, k_start, k_len, diagonal, request: see :class:`Spans`.
        alignment: what holds for all spans, whatever the batch.
    """

    q_len: IntArray
    k_start: IntArray
    k_len: IntArray
    diagonal: IntArray
    request: IntArray
    alignment: Alignment


class Refreshed(Protocol):
    """What is derived from spans and has to stay where it is, such as a table of tiles whose address a CUDA graph has captured."""

    def refresh(self, host: HostSpans) -> None:
        """Makes it anew for other spans of the same capacity, at the same addresses."""


@dataclass(frozen=True, eq=False)
class _SeeingQueries:
    """Which queries see a key, in memory that stays where it is. It holds no spans, which hold it."""

    cu_seqlens_q: Tensor
    k_len: Tensor
    diagonal: Tensor
    window: int | None
    mask: Tensor

    def refresh(self, host: HostSpans) -> None:
        """See :class:`Refreshed`. The tables on the device have been filled by then."""
        self.mask.copy_(_sees_keys(self.cu_seqlens_q, self.k_len, self.diagonal, self.window, len(self.mask)))


def _sees_keys(cu_seqlens_q: Tensor, k_len: Tensor, diagonal: Tensor, window: int | None, num_queries: int) -> Tensor:
    """bool ``[num_queries]``, without waiting for the device: whether any key lies within a query's bounds."""
    q_len = cu_seqlens_q.diff()
    sees_to = expand_runs_on_device(diagonal, q_len, num_queries)
    in_range = expand_runs_on_device(k_len, q_len, num_queries, step=0)
    sees_from = torch.zeros_like(sees_to) if window is None else (sees_to - window).clamp(min=0)
    return torch.minimum(sees_to, in_range) > sees_from


@dataclass(eq=False)
class Spans:
    """Ranges of queries and the ranges of keys that they see. All of a launch's spans together, in any number.

    Span ``i`` is the queries ``cu_seqlens_q[i] .. cu_seqlens_q[i + 1] - 1`` against the keys ``k_start[i] ..
    k_start[i] + k_len[i] - 1``. Query ranges follow each other; key ranges may lie anywhere and overlap.
    Query ``j`` of the span (from 0) sees the first ``clamp(diagonal[i] + j, 0, k_len[i])`` keys of its range, and with
    a window ``W`` those from number ``diagonal[i] + j - W`` on. The diagonal is thus the number of keys that the span's
    first query would see in a range without end. It may lie beyond the range (all keys are in the past) or below 1.

    Where the keys lie is said by :class:`cpattn.Keys`. In pages all key ranges begin at 0, and a span reads the
    pages of its request.

    Attributes:
        cu_seqlens_q: int32 ``[n + 1]``, begins with 0.
        k_start, k_len, diagonal, request: int32 ``[n]``.
        k_start_padded: int32 ``[n + 1]``: k_start and one entry more, for kernels that take starts as cumulative lengths.
        max_seqlen_q, max_seqlen_k: the longest query range and the longest key range, in tokens (0 if there is none);
            where the spans are fixed, what they may grow to.
        alignment: what holds for all spans; see :data:`Alignment`.
        host: the same numbers on the host.
        fixed: their number and the sizes above stay, but :meth:`copy_` may change what they are, under a CUDA graph.
        view: what was last made of the spans for a caller's kernel, if anything. It is not kept as what is derived is: the
            two share that, so it would hold itself.
    """

    cu_seqlens_q: Tensor
    k_start_padded: Tensor
    k_len: Tensor
    diagonal: Tensor
    request: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    alignment: Alignment
    host: HostSpans
    fixed: bool = False
    view: Any = field(default=None, init=False, repr=False)
    # What derive() keeps: to be refreshed, for as long as there are graphs; and what can be made anew at any time.
    _refreshed: dict[Hashable, Refreshed] = field(default_factory=dict, init=False, repr=False)
    _remade: Memo[Hashable, Any] = field(default_factory=lambda: Memo(_MOST_REMEMBERED), init=False, repr=False)

    def __len__(self) -> int:
        return len(self.host.q_len)

    @property
    def k_start(self) -> Tensor:
        """int32 ``[n]``: where each span's key range begins."""
        return self.k_start_padded[:-1]

    @cached_property
    def num_queries(self) -> int:
        """Queries that the spans cover; what lies beyond them in q is padding."""
        return int(self.host.q_len.sum())

    @cached_property
    def has_empty_range(self) -> bool:
        """Whether some span has, or may come to have, no keys at all."""
        return self.fixed or bool((self.host.k_len == 0).any())

    def tiled_pairs(self, tile: int, pack: int) -> float:
        """Query-key pairs that a kernel computes whose tiles hold ``tile`` rows, where a query takes up ``pack`` of them
        (that many heads share a tile). The padding of the last tile of each span is computed as well."""
        return float((-(-self.host.q_len * pack // tile) * tile / pack * self.host.k_len).sum())

    def derive(self, key: Hashable, make: Callable[..., T], *arguments: Any) -> T:
        """What ``make(*arguments)`` gives, made once for a batch and kept under ``key``, for all layers.

        :meth:`copy_` refreshes what has a method ``refresh`` (see :class:`Refreshed`) and drops everything else, of which
        the last few are kept.

        >>> spans = Spans.build(q_len=[3, 1], k_start=[0, 0], k_len=[9, 0], diagonal=[0, 5])
        >>> spans.derive("total", lambda: int(spans.host.q_len.sum()))
        4

        Args:
            key: of whoever asks: a name, and all that the result depends on beside the spans.
            make: must not return None.
        """
        found: Any = self._remade.get(key)
        if found is None:
            found = self._refreshed.get(key)
        if found is None:
            found = make(*arguments)
            if hasattr(found, "refresh"):
                self._refreshed[key] = found
            else:
                self._remade.keep(key, found)
        derived: T = found
        return derived

    def sees_keys(self, window: int | None = None) -> Tensor:
        """Which queries see at least one key, bool ``[num_queries]`` on the device; made once a batch and window.

        >>> spans = Spans.build(q_len=[3, 1], k_start=[0, 0], k_len=[9, 0], diagonal=[0, 5])
        >>> spans.sees_keys().tolist()
        [False, True, True, False]
        """
        key = "sees keys", window
        kept = self._refreshed.get(key)
        if isinstance(kept, _SeeingQueries):
            return kept.mask
        tables = self.cu_seqlens_q, self.k_len, self.diagonal, window
        if is_capturing(self.k_len.device):
            # Memory of the graph, which each replay fills anew: nobody else may read it.
            return _sees_keys(*tables, self.num_queries)
        # A mask made under inference_mode could not be refilled outside of it.
        with torch.inference_mode(False):
            return self.derive(key, _SeeingQueries, *tables, _sees_keys(*tables, self.num_queries)).mask

    def copy_(self, other: Spans) -> None:
        """Takes over the other's work at the addresses of this; both are fixed, for the same sizes."""
        for name in ("cu_seqlens_q", "k_start_padded", "k_len", "diagonal", "request"):
            mine, theirs = getattr(self, name), getattr(other, name)
            # They may have been put there already.
            if mine.data_ptr() != theirs.data_ptr():
                mine.copy_(theirs)
        self.host = other.host
        self.view = None
        self._remade.clear()
        for derived in self._refreshed.values():
            derived.refresh(self.host)

    @classmethod
    def build_all(
        cls: type[S], tables: list[SpanTable], device: torch.device | str, fixed_lengths: tuple[int, int] | None = None
    ) -> list[S]:
        """Makes spans of each table, with one copy to the device for all.

        Args:
            fixed_lengths: if the spans are to be fixed, the ``max_seqlen_q`` and ``max_seqlen_k`` that they may grow to.
        """
        return cls.unsent(tables, fixed_lengths).sent(torch.device(device))

    @classmethod
    def unsent(cls: type[S], tables: list[SpanTable], fixed_lengths: tuple[int, int] | None = None) -> Unsent[list[S]]:
        """The same before they are sent."""
        hosts = [HostSpans(exclusive_cumsum(table.q_len), *table[:-1]) for table in tables]
        packed: dict[str, IntArray] = {}
        for i, host in enumerate(hosts):
            ends = np.zeros((2, len(host.q_len) + 1), dtype=np.int64)
            host.q_len.cumsum(out=ends[0, 1:])
            ends[1, :-1] = host.k_start
            packed |= {f"cu_seqlens_q {i}": ends[0], f"k_start_padded {i}": ends[1]}
            packed |= {f"k_len {i}": host.k_len, f"diagonal {i}": host.diagonal, f"request {i}": host.request}

        def finish(on_device: Mapping[str, Tensor]) -> list[S]:
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

        return Unsent(packed, finish)

    @classmethod
    def build(
        cls: type[S],
        q_len: IntArray,
        k_start: IntArray,
        k_len: IntArray,
        diagonal: IntArray,
        device: torch.device | str = "cpu",
        request: IntArray | None = None,
    ) -> S:
        """Makes spans from integer arrays ``[n]``, one entry a span; their alignment is found out."""
        q_len, k_start, k_len, diagonal = (np.asarray(column, dtype=np.int64) for column in (q_len, k_start, k_len, diagonal))
        request = np.zeros_like(q_len) if request is None else np.asarray(request, dtype=np.int64)
        alignment = find_alignment(q_len, k_start, k_len, diagonal)
        return cls.build_all([SpanTable(q_len, k_start, k_len, diagonal, request, alignment)], device)[0]


def find_alignment(q_len: IntArray, k_start: IntArray, k_len: IntArray, diagonal: IntArray) -> Alignment:
    """The narrowest alignment that all spans have."""
    # A span without keys or without queries fits any alignment.
    has_work = (k_len > 0) & (q_len > 0)
    if (~has_work | (diagonal + q_len - 1 == k_len)).all():
        return "bottom_right"
    if (~has_work | (diagonal >= k_len)).all():
        return "full"
    return "any"
