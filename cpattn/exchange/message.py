"""K and V as one message: ``[rows, Hkv, D + Dv]``, K in the first D columns, so that one transfer carries both.

Where V is a part of K, the message is K alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.exchange.put_rows import put_rows_
from cpattn.kernels.available import has_kernels, kernel_module
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


def pack_(message: Tensor, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, slots: Tensor | None = None) -> None:
    """Writes the first ``num_tokens`` rows of K and V into the message, and zeros after them; or, with ``slots``, row i
    into row slots[i] of the message, where that is not negative, and nothing else.

    Padding may hold NaN, and a kernel that loads whole tiles would multiply it by a weight of 0, which is NaN.

    Args:
        v: or None where V is a part of K; the message is then K's.
        num_tokens: or an int32 tensor of one element on the device, which a replayed CUDA graph reads anew.
    """
    if has_kernels(k.device):
        kernel_module("move_rows").pack_kv(message, k, v, num_tokens, slots)
    else:
        torch_pack_(message, k, v, num_tokens, slots)


def torch_pack_(message: Tensor, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, slots: Tensor | None = None) -> None:
    """:func:`pack_` in plain torch, which defines it."""
    for part, source in ((message[..., : k.shape[2]], k), (message[..., k.shape[2] :], v)):
        if source is not None:
            _torch_pack_part_(part, source, num_tokens, slots)


def _torch_pack_part_(part: Tensor, source: Tensor, num_tokens: int | Tensor, slots: Tensor | None) -> None:
    if isinstance(num_tokens, int):
        if slots is not None:
            slots = slots[:num_tokens]
            put_rows_(part, (slots.clamp(min=0),), source[:num_tokens], slots >= 0)
        else:
            part[:num_tokens] = source[:num_tokens]
            part[num_tokens:] = 0
        return
    rows = min(len(part if slots is None else slots), len(source))
    is_token = torch.arange(rows, device=part.device) < num_tokens
    if slots is not None:
        slots = slots[:rows]
        put_rows_(part, (slots.clamp(min=0),), source[:rows], is_token & (slots >= 0))
    else:
        part[:rows] = torch.where(is_token[:, None, None], source[:rows], 0)
        part[rows:] = 0


# Dtypes of which torch moves single rows everywhere. Of others, such as fp8, it moves the bits under another name.
_INDEXED = frozenset(
    {torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool}
)
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def gather_rows_(out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None = None) -> None:
    """``out[i] = source[index[i]]``, or with ``slots`` ``out[slots[i]] = source[index[i]]``; contiguous rows of any shape
    and dtype. A negative index stands for a row of zeros; where the slot is negative nothing is written."""
    if has_kernels(out.device):
        kernel_module("move_rows").gather_rows(out, source, index, slots)
    else:
        torch_gather_rows_(out, source, index, slots)


def whole_rows(x: Tensor) -> Tensor:
    """A tensor as :func:`gather_rows_` takes it: contiguous, and its memory what it shows, which a lazy conjugate's is not."""
    return x.resolve_conj().contiguous()


def torch_gather_rows_(out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None = None) -> None:
    """:func:`gather_rows_` in plain torch, which defines it."""
    if out.dtype not in _INDEXED:
        word = _WORDS[out.itemsize]
        out, source = out.view(word), source.view(word)
    is_zero = index < 0
    if not len(source):
        gathered = out.new_zeros(len(index), *out.shape[1:])
        _put_or_copy_(out, gathered, slots)
        return
    index = index.clamp(min=0)
    if slots is not None:
        _put_or_copy_(out, _zero_rows_(source.index_select(0, index), is_zero), slots)
    elif out.ndim > 2:
        # As one flat row each; torch moves those fastest.
        _zero_rows_(torch.index_select(source.flatten(1), 0, index, out=out.flatten(1)), is_zero)
    else:
        _zero_rows_(torch.index_select(source, 0, index, out=out), is_zero)


def _put_or_copy_(out: Tensor, values: Tensor, slots: Tensor | None) -> None:
    if slots is None:
        out.copy_(values)
    else:
        put_rows_(out, (slots.clamp(min=0),), values, slots >= 0)


def _zero_rows_(x: Tensor, is_zero: Tensor) -> Tensor:
    if x.device.type == "cpu":
        x[is_zero] = 0
        return x
    return x.masked_fill_(is_zero.view(-1, *[1] * (x.ndim - 1)), 0)
