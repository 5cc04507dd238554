"""K and V as one message: ``[rows, Hkv, D + Dv]``, K in the first D columns, so that one transfer carries both."""

from __future__ import annotations

import torch
from torch import Tensor

from cpattn.exchange.communicator import Communicator
from cpattn.exchange.put_rows import put_rows_
from cpattn.kernels.available import has_kernels


def message_buffer(communicator: Communicator, name: str, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """Reused memory for a message of that many rows."""
    return communicator.buffer(name, (rows, k.shape[1], k.shape[2] + v.shape[2]), k.dtype, k.device)


def pack_(message: Tensor, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, slots: Tensor | None = None) -> None:
    """Writes the first ``num_tokens`` rows of K and V into the message, and zeros after them; or, with ``slots``, row i
    into row slots[i] of the message, where that is not negative, and nothing else.

    Padding may hold NaN, and a kernel that loads whole tiles would multiply it by a weight of 0, which is NaN.

    Args:
        v: or None where V is a part of K; the message is then K's.
        num_tokens: or an int32 tensor of one element on the device, which a replayed CUDA graph reads anew.
    """
    if has_kernels(k.device):
        from cpattn.kernels.move_rows import pack_kv

        pack_kv(message, k, v, num_tokens, slots)
    else:
        torch_pack_(message, k, v, num_tokens, slots)


def torch_pack_(message: Tensor, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, slots: Tensor | None = None) -> None:
    """:func:`pack_` in plain torch, which defines it."""
    for part, source in zip(unpack(message, k.shape[2]), (k, v), strict=True):
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


def gather_rows_(out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None = None) -> None:
    """``out[i] = source[index[i]]``, or with ``slots`` ``out[slots[i]] = source[index[i]]``; contiguous rows of any shape
    and dtype. A negative index stands for a row of zeros; where the slot is negative nothing is written."""
    if has_kernels(out.device):
        from cpattn.kernels.move_rows import gather_rows

        gather_rows(out, source, index, slots)
    else:
        torch_gather_rows_(out, source, index, slots)


def torch_gather_rows_(out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None = None) -> None:
    """:func:`gather_rows_` in plain torch, which defines it."""
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


def unpack(message: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """K and V as views of the message."""
    return message[..., :head_dim], message[..., head_dim:]
