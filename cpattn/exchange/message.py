"""K and V as one message: ``[rows, Hkv, D + Dv]``, K in the first D columns, so that one transfer carries both.

Where V is a part of K, the message is K alone. fp8 is bytes in it, as not every transport has such numbers, and scales of tokens follow
in the last columns: K's, and V's where it is no part of K.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from cpattn.keys import Keys
from cpattn.kv_cache import PagedKV
from cpattn.moves.stored_rows import StoredRows
from cpattn.problem import Problem
from cpattn.stored import SCALE_BYTES, ScaleKind, is_fp8, row_bytes
from cpattn.transports.arena import Arena

_NAN_BYTE = 0x7F


class KVFormat(NamedTuple):
    """K and V of a call: KV heads, head dims, dtype and device, and whether V is the first columns of K (MLA).

    >>> KVFormat(1, 576, 512, True, torch.bfloat16, torch.device("cpu")).width
    576

    Attributes:
        dtype: as they are stored and travel.
        scales: what a scale belongs to; see :data:`cpattn.stored.ScaleKind`.
    """

    heads: int
    head_dim: int
    v_head_dim: int
    v_in_k: bool
    dtype: torch.dtype
    device: torch.device
    scales: ScaleKind | None = None

    @classmethod
    def of(cls, problem: Problem) -> KVFormat:
        """As a call has them."""
        heads, head_dim, v_head_dim, v_in_k = problem.kv_heads, problem.head_dim, problem.v_head_dim, problem.v_in_k
        if problem.latent_dim is not None:
            # All of it is key and value.
            heads, head_dim, v_head_dim, v_in_k = 1, problem.latent_dim, problem.latent_dim, True
        return cls(heads, head_dim, v_head_dim, v_in_k, problem.stored_dtype, problem.device, problem.scales)

    @classmethod
    def of_pages(cls, cache: PagedKV) -> KVFormat:
        """As pages have them."""
        k, v = cache.k_pages, cache.v_pages
        return cls(k.shape[2], k.shape[3], k.shape[3] if v is None else v.shape[3], v is None, k.dtype, k.device, cache.scales)

    def group(self, groups: int) -> KVFormat:
        """Of one of so many groups of heads."""
        return self if groups == 1 else self._replace(heads=self.heads // groups)

    @property
    def as_bytes(self) -> bool:
        """Whether messages are bytes."""
        return is_fp8(self.dtype)

    @property
    def wire_dtype(self) -> torch.dtype:
        """Of messages."""
        return torch.uint8 if self.as_bytes else self.dtype

    @property
    def width(self) -> int:
        """Numbers, or bytes, that a token's K and V take up in a message, for each head."""
        v_head_dim = 0 if self.v_in_k else self.v_head_dim
        return row_bytes(self.head_dim, v_head_dim, self.dtype, self.scales) // self.wire_dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether messages are numbers of K and V alone."""
        return self.width == (self.head_dim if self.v_in_k else self.head_dim + self.v_head_dim)

    def parts(self, message: Tensor) -> tuple[Tensor, Tensor | None]:
        """K and V as views of a message, V only where it is not in K: what has to be copied. The last of them has all that follows."""
        return (message, None) if self.v_in_k else (message[..., : self.head_dim], message[..., self.head_dim :])

    def stored(self, k: Tensor, v: Tensor | None) -> StoredRows:
        """What parts of messages hold: V where it is not in K, and scales where tokens have them."""
        if not self.as_bytes:
            return StoredRows(k, v)
        k_scale = v_scale = None
        if self.scales == "token":
            last = k if v is None else v
            scales = last[..., -SCALE_BYTES * (1 if v is None else 2) :].view(torch.float32)
            k_scale, v_scale = scales[..., 0], None if v is None else scales[..., 1]
        values = None if v is None else v[..., : self.v_head_dim].view(self.dtype)
        return StoredRows(k[..., : self.head_dim].view(self.dtype), values, k_scale, v_scale)

    def keys(self, k: Tensor, v: Tensor | None) -> Keys:
        """Parts of messages to attend to. Scales of heads come with each call: :class:`cpattn.exchange.attend.Attend` has them."""
        k, v, k_scale, v_scale = self.stored(k, v)
        if v is None:
            return Keys(k, k[..., : self.v_head_dim], None, k_scale, k_scale)
        return Keys(k, v, None, k_scale, v_scale)

    def keys_in_pages(self, cache: PagedKV) -> Keys:
        """Pages to attend to."""
        k, v = cache.k_pages, cache.v_pages
        scales = (cache.k_scale, cache.v_scale if v is not None else cache.k_scale) if self.scales == "token" else (None, None)
        return Keys(k, k[..., : self.v_head_dim] if v is None else v, cache.page_table, *scales)

    def fill_missing_(self, message: Tensor) -> None:
        """What stands for keys that a rank could not make: whoever sees one of them gets NaN, and LSE NaN.

        Keys are NaN. Values are 0, since kernels multiply also those that a query does not see by a weight of 0, which is NaN
        for NaN. (Where all of a key is its value, all is NaN.)
        """
        k, v, *scales = self.stored(*self.parts(message))
        # Bytes are fp8 of a caller's, in which this is NaN of either kind.
        k.fill_(_NAN_BYTE if k.dtype == torch.uint8 else torch.nan)
        if v is not None:
            v.fill_(0)
        elif self.v_head_dim < self.head_dim:
            k[..., : self.v_head_dim].fill_(0)
        for scale in scales:
            if scale is not None:
                scale.fill_(1)


class Message(NamedTuple):
    """Memory of a message, and its K and V.

    Attributes:
        whole: ``[rows, Hkv, width]``.
        keys: K and V to attend to; parts: what has to be copied, without a V that is in K.
    """

    whole: Tensor
    keys: Keys
    parts: tuple[Tensor, Tensor | None]

    @classmethod
    def of(cls, whole: Tensor, kv: KVFormat) -> Message:
        parts = kv.parts(whole)
        return cls(whole, kv.keys(*parts), parts)


def message_buffer(arena: Arena, name: str, kv: KVFormat, rows: int) -> Message:
    """Memory for a message of that many rows."""
    return Message.of(arena.buffer(name, (rows, kv.heads, kv.width), kv.wire_dtype, kv.device), kv)


@overload
def heads_of(x: Tensor, heads: slice | None) -> Tensor: ...


@overload
def heads_of(x: Tensor | None, heads: slice | None) -> Tensor | None: ...


def heads_of(x: Tensor | None, heads: slice | None) -> Tensor | None:
    """Some of the heads of K or V; None for all of them."""
    return x if x is None or heads is None else x[:, heads]


def pages_of_heads(cache: PagedKV, heads: slice | None) -> PagedKV:
    """Some of the heads of pages; None for all of them."""
    if heads is None:
        return cache
    k_scale, v_scale = cache.k_scale, cache.v_scale
    if cache.scales == "token":
        k_scale, v_scale = (scale if scale is None else scale[:, :, heads] for scale in (k_scale, v_scale))
    v_pages = None if cache.v_pages is None else cache.v_pages[:, :, heads]
    return PagedKV(cache.k_pages[:, :, heads], v_pages, cache.page_table, k_scale=k_scale, v_scale=v_scale)
