"""K and V as one message: ``[rows, Hkv, D + Dv]``, K in the first D columns, so that one transfer carries both."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from cpattn.exchange.communicator import Communicator


def message_buffer(communicator: Communicator, name: str, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """Reused memory for a message of that many rows."""
    return communicator.buffer(name, (rows, k.shape[1], k.shape[2] + v.shape[2]), k.dtype, k.device)


def pack_(message: Tensor, k: Tensor, v: Tensor, num_tokens: int, slots: Tensor | None = None) -> None:
    """Writes the first ``num_tokens`` rows of K and V into the message, and zeros after them; or, with ``slots``, row i
    into row slots[i] of the message and nothing else.

    Padding may hold NaN, and a kernel that loads whole tiles would multiply it by a weight of 0, which is NaN.
    """
    if _has_kernels(k.device):
        from cpattn.kernels.move_rows import pack_kv

        pack_kv(message, k, v, num_tokens, slots)
    else:
        torch_pack_(message, k, v, num_tokens, slots)


def torch_pack_(message: Tensor, k: Tensor, v: Tensor, num_tokens: int, slots: Tensor | None = None) -> None:
    """:func:`pack_` in plain torch, which defines it."""
    to_k, to_v = unpack(message, k.shape[2])
    if slots is not None:
        to_k[slots] = k[:num_tokens]
        to_v[slots] = v[:num_tokens]
        return
    to_k[:num_tokens] = k[:num_tokens]
    to_v[:num_tokens] = v[:num_tokens]
    message[num_tokens:] = 0


def gather_rows_(out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None = None) -> None:
    """``out[i] = source[index[i]]``, or with ``slots`` ``out[slots[i]] = source[index[i]]``; contiguous rows of any shape
    and dtype."""
    if _has_kernels(out.device):
        from cpattn.kernels.move_rows import gather_rows

        gather_rows(out, source, index, slots)
    else:
        torch_gather_rows_(out, source, index, slots)


def torch_gather_rows_(out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None = None) -> None:
    """:func:`gather_rows_` in plain torch, which defines it."""
    if slots is not None:
        out[slots] = source.index_select(0, index)
    elif out.ndim > 2:
        # As one flat row each; torch moves those fastest.
        torch.index_select(source.flatten(1), 0, index, out=out.flatten(1))
    else:
        torch.index_select(source, 0, index, out=out)


def unpack(message: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """K and V as views of the message."""
    return message[..., :head_dim], message[..., head_dim:]


@cache
def _has_kernels(device: torch.device) -> bool:
    """Whether rows are moved by the Triton kernels; each has its twin in plain torch here."""
    return device.type == "cuda" and find_spec("triton") is not None
