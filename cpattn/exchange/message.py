"""K and V as one message: ``[rows, Hkv, D + Dv]``, K in the first D columns, so that one transfer carries both.

Where V is a part of K, the message is K alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.transports.transport import Transport


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

    @property
    def width(self) -> int:
        """Numbers that a token's K and V take up in a message, for each head."""
        return self.head_dim if self.v_in_k else self.head_dim + self.v_head_dim

    def split(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """K and V as views of a message."""
        return self.pair(message[..., : self.head_dim], None if self.v_in_k else message[..., self.head_dim :])

    def parts(self, message: Tensor) -> tuple[Tensor, Tensor | None]:
        """K and V as views of a message, V only where it is not in K: what has to be copied."""
        return message[..., : self.head_dim], None if self.v_in_k else message[..., self.head_dim :]

    def pair(self, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """K and V to attend to."""
        return k, k[..., : self.v_head_dim] if v is None else v

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
        pair: K and V to attend to; parts: what has to be copied, without a V that is in K.
    """

    whole: Tensor
    pair: tuple[Tensor, Tensor]
    parts: tuple[Tensor, Tensor | None]

    @classmethod
    def of(cls, whole: Tensor, kv: KVFormat) -> Message:
        return cls(whole, kv.split(whole), kv.parts(whole))


def message_buffer(communicator: Transport, name: str, kv: KVFormat, rows: int) -> Message:
    """Reused memory for a message of that many rows."""

    def make() -> Message:
        return Message.of(communicator.buffer(name, (rows, kv.heads, kv.width), kv.dtype, kv.device), kv)

    return communicator.reuse(name, (kv, rows), kv.device, make)
