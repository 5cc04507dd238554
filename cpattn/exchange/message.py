"""K and V as one message: ``[rows, Hkv, D + Dv]``, K in the first D columns, so that one transfer carries both."""

from __future__ import annotations

from torch import Tensor

from cpattn.exchange.communicator import Communicator


def message_shape(k: Tensor, v: Tensor, rows: int) -> tuple[int, int, int]:
    """The shape of a message of that many rows."""
    return rows, k.shape[1], k.shape[2] + v.shape[2]


def message_buffer(communicator: Communicator, name: str, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """Reused memory for a message of that many rows."""
    return communicator.buffer(name, message_shape(k, v, rows), k.dtype, k.device)


def pack_(message: Tensor, k: Tensor, v: Tensor, num_tokens: int) -> None:
    """Writes the first ``num_tokens`` rows of K and V into the message, and zeros after them.

    Padding may hold NaN, and a kernel that loads whole tiles would multiply it by a weight of 0, which is NaN.
    """
    head_dim = k.shape[2]
    message[:num_tokens, :, :head_dim] = k[:num_tokens]
    message[:num_tokens, :, head_dim:] = v[:num_tokens]
    message[num_tokens:] = 0


def unpack(message: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """K and V as views of the message."""
    return message[..., :head_dim], message[..., head_dim:]
