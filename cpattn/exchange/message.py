"""K and V as one message: ``[rows, Hkv, D + Dv]``, K in the first D columns, so that one transfer carries both.

Where V is a part of K, the message is K alone.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from cpattn.keys import Keys
from cpattn.kv_cache import PagedKV
from cpattn.problem import Problem
from cpattn.transports.arena import Arena


class KVFormat(NamedTuple):
    """K and V of a call: KV heads, head dims, dtype and device, and whether V is the first columns of K (MLA).

    >>> KVFormat(1, 576, 512, True, torch.bfloat16, torch.device("cpu")).width
    576
    """

    heads: int
    head_dim: int
    v_head_dim: int
    v_in_k: bool
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, problem: Problem) -> KVFormat:
        """As a call has them."""
        return cls(problem.kv_heads, problem.head_dim, problem.v_head_dim, problem.v_in_k, problem.dtype, problem.device)

    def group(self, groups: int) -> KVFormat:
        """Of one of so many groups of heads."""
        return self if groups == 1 else self._replace(heads=self.heads // groups)

    @property
    def width(self) -> int:
        """Numbers that a token's K and V take up in a message, for each head."""
        return self.head_dim if self.v_in_k else self.head_dim + self.v_head_dim

    def parts(self, message: Tensor) -> tuple[Tensor, Tensor | None]:
        """K and V as views of a message, V only where it is not in K: what has to be copied."""
        return message[..., : self.head_dim], None if self.v_in_k else message[..., self.head_dim :]

    def keys(self, k: Tensor, v: Tensor | None, page_table: Tensor | None = None) -> Keys:
        """K and V to attend to."""
        return Keys(k, k[..., : self.v_head_dim] if v is None else v, page_table)

    def fill_missing_(self, message: Tensor) -> None:
        """What stands for keys that a rank could not make: whoever sees one of them gets NaN, and LSE NaN.

        Keys are NaN. Values are 0, since kernels multiply also those that a query does not see by a weight of 0, which is NaN
        for NaN. (Where all of a key is its value, all is NaN.)
        """
        message.fill_(torch.nan)
        if self.v_in_k:
            if self.v_head_dim < self.head_dim:
                message[..., : self.v_head_dim] = 0
        else:
            message[..., self.head_dim :] = 0


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
    return Message.of(arena.buffer(name, (rows, kv.heads, kv.width), kv.dtype, kv.device), kv)


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
    return PagedKV(cache.k_pages[:, :, heads], None if cache.v_pages is None else cache.v_pages[:, :, heads], cache.page_table)
