"""Keys: where K and V lie."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cpattn.spans import Spans


class Arrivals(NamedTuple):
    """What has arrived of keys that another kernel brings while the attention runs; :mod:`cpattn.kernels.arrivals` says how it is
    written down.

    Attributes:
        flags: int32 ``[2 + pieces]``, and one more where that is odd: the number of the turn, that number once all pieces are there, and
            once each is.
        late: int32 ``[pieces]``: 1 for pieces that are waited for.
        side_by_side: whether what brings them runs on the multiprocessors of the attention, which has to leave room there.
    """

    flags: Tensor
    late: Tensor
    side_by_side: bool = False


class PrefixKeys(NamedTuple):
    """Cached keys that are read where they lie, beside new ones that lie elsewhere, one after another.

    Attributes:
        k, v: ``[P, Hkv, D]`` and ``[P, Hkv, Dv]``; or pages ``[P, page_size, Hkv, D]``, of which key ``s`` of a span is in
            ``page_table[request, s // page_size]``.
        places: int32 ``[2 * num_requests]``: of each request how many of a key range's first keys are read here, a multiple of
            :data:`PREFIX_UNIT`, and in which row the first of them lies, where they are not in pages.
        page_table: of pages; as in :class:`Keys`.
    """

    k: Tensor
    v: Tensor
    places: Tensor
    page_table: Tensor | None = None

    @property
    def page_size(self) -> int:
        """Tokens of a page; 0 where there are no pages."""
        return 0 if self.page_table is None else self.k.shape[1]


class OwnRows(NamedTuple):
    """A rank's new keys that are read in its own rows, as they lie: the last ones of a key range, after those that lie elsewhere.

    Attributes:
        k, v: ``[T, Hkv, D]`` and ``[T, Hkv, Dv]``; rows after the tokens may hold anything.
        places: int32 ``[2 * num_requests]``: of each request from which key of a range on they are read here, a multiple of
            :data:`PREFIX_UNIT`, and in which row its first key would lie: key ``s`` is in row ``places[2 * request + 1] + s``. From
            :data:`NOT_HERE` on for a request of which none is.
    """

    k: Tensor
    v: Tensor
    places: Tensor


def is_aligned(x: Tensor) -> bool:
    """Whether pages, rows and heads are at multiples of 16 bytes, as kernels take cached keys."""
    numbers = x.data_ptr()
    for stride in x.stride()[:-1]:
        numbers |= stride * x.element_size()
    return numbers % 16 == 0


PREFIX_UNIT = 128
"""Kernels load blocks of so many keys, or a divisor of it, and none of a block's keys may lie elsewhere."""

NOT_HERE = 2**30
"""A key that no range has; a multiple of the above."""


# A named tuple, as one is made in every call.
class Keys(NamedTuple):
    """K and V, one key after another or in pages.

    Without a page table key ``s`` of a span is row ``s`` of ``k`` and ``v``. With one it is in page
    ``page_table[request, s // page_size]`` at ``s % page_size``, of the span's request.

    Attributes:
        k: ``[S, Hkv, D]``, or pages ``[P, page_size, Hkv, D]``; the last axis is contiguous, the others may be strided. Backends that
            read stored keys (:attr:`cpattn.Backend.reads_stored`) get other dtypes than q's as well.
        v: the same with Dv; it may be a view of K's first columns.
        page_table: int32 or int64 ``[num_requests, max_pages]``, or None.
        k_scale, v_scale: fp32, what K and V are to be multiplied by where they are fp8: ``[Hkv]``, or one a token and head,
            ``[S, Hkv]`` or in pages ``[P, page_size, Hkv]``. None where they are what they are.
        arrivals: what tells a kernel that runs beside the one that brings them which are there, or None where all are. Only a
            launch that begins before the one before it in the stream has ended has to look at it.
        prefix: where the first keys of each span lie, if not in k and v; ``s`` of a span is row ``k_start + s`` there all the same.
        own: where the last keys of some lie, if not in k and v; the same holds of those between.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    arrivals: Arrivals | None = None
    prefix: PrefixKeys | None = None
    own: OwnRows | None = None

    @property
    def page_size(self) -> int:
        """Tokens of a page; 0 where there are no pages."""
        return 0 if self.page_table is None else self.k.shape[1]

    def lines(self, spans: Spans) -> Tensor:
        """The page table's line of each span, ``[n, max_pages]``, for kernels that take one a span."""
        assert self.page_table is not None
        return self.page_table.index_select(0, spans.request)

    def max_seqlen(self, spans: Spans) -> int:
        """What no key range is longer than: of the spans, and of what a line of the page table holds."""
        if self.page_table is None:
            return spans.max_seqlen_k
        return min(spans.max_seqlen_k, self.page_table.shape[1] * self.k.shape[1])
