"""What rows are moved by: one protocol, and which of its two implementations, modules beside this one, a device has.

Shapes: n rows to move; P pages, R requests. In pages, row ``i`` is token ``position[i]`` of request ``request[i]``; its slot is
``page_table[request[i], position[i] // page_size] * page_size + position[i] % page_size``, or, without a page table,
``position[i]`` itself. A row of negative position is padding.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from cpattn.kernels.available import has_kernels
from cpattn.moves import torch_moves
from cpattn.moves.stored_rows import StoredRows


class Moves(Protocol):
    """:mod:`cpattn.moves.torch_moves` defines what each gives; :mod:`cpattn.moves.triton_moves` gives the same bits, in one launch
    each, in which each row is read once and written once. Neither waits for the device."""

    def pack(
        self,
        message: Tensor,
        k: Tensor,
        v: Tensor | None,
        num_tokens: int | Tensor,
        slots: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        """Writes the first ``num_tokens`` rows of K and V into the message, and zeros after them. With ``slots`` row i
        goes into row slots[i] of the message, where that is not negative, and nothing else is written. With ``rows`` beside them that is
        row rows[i] of K and V.

        Padding may hold NaN, and a kernel that loads whole tiles would multiply it by a weight of 0, which is NaN.

        Args:
            message: ``[rows, Hkv, D + Dv]``; k ``[>= num_tokens, Hkv, D]``; v ``[>= num_tokens, Hkv, Dv]``, of one dtype, the
                last axis contiguous, the others may be strided. Rows of k and v after the tokens are not read. v is None where
                V is a part of K; the message is then K's.
            num_tokens: or an int32 tensor of one element on the device, which a replayed CUDA graph reads anew.
            slots: int32 or int64 ``[>= num_tokens]``, those that are not negative all different.
            rows: int32 or int64 ``[>= num_tokens]``; k and v then have as many rows as these say.
        """
        ...

    def gather_rows(self, out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None = None) -> None:
        """``out[i] = source[index[i]]``, or with ``slots`` ``out[slots[i]] = source[index[i]]``.

        Args:
            out: ``[n, ...]`` (any number of rows with slots); source ``[m, ...]``, of one dtype, whichever, and the same trailing
                shape, each row contiguous; they do not overlap.
            index: int32 or int64 ``[n]``, each below m; a negative one stands for a row of zeros.
            slots: int32 or int64 ``[n]``, all different rows of out; where it is negative nothing is written.
        """
        ...

    def write_pages(
        self,
        k_pages: Tensor,
        v_pages: Tensor | None,
        page_table: Tensor | None,
        request: Tensor | None,
        position: Tensor,
        k: Tensor,
        v: Tensor | None,
    ) -> None:
        """Writes row i of k and v into its slot; padding rows are skipped.

        Args:
            k_pages: ``[P, page_size, Hkv, D]``, any strides but a contiguous last axis; v_pages ``[P, page_size, Hkv, Dv]``,
                or None where V is a part of K.
            page_table: int32 or int64 ``[R, max_pages]``, or None; only the entries of tokens that are moved are looked at.
            request: int32 or int64 ``[n]``; not looked at without a page table.
            position: int32 or int64 ``[n]``; all slots are different.
            k, v: ``[>= n, Hkv, D]`` and ``[>= n, Hkv, Dv]`` of the pages' dtype, such as the halves of a message.
        """
        ...

    def read_pages(
        self,
        k_pages: Tensor,
        v_pages: Tensor | None,
        page_table: Tensor | None,
        request: Tensor | None,
        position: Tensor,
        k: Tensor,
        v: Tensor | None,
        out_rows: Tensor | None = None,
    ) -> None:
        """Reads each row's slot into row i of k and v, or into row ``out_rows[i]``; padding rows become 0.

        Args:
            out_rows: int32 or int64 ``[n]``, all different; the rest as for :meth:`write_pages`.
        """
        ...

    def quantize(self, out: StoredRows, k: Tensor, v: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
        """What numbers are where they are stored: ``x / scale`` in fp32, rounded to the nearest, to the even one of two. What
        overflows becomes the largest finite number, never NaN; NaN stays NaN.

        Args:
            out: rows of another dtype. Where it has scales, each row and head gets one of its own, by which its largest number
                becomes the largest that there is.
            k: ``[n, Hkv, D]``; v ``[n, Hkv, Dv]`` or None, of one floating dtype, the last axis contiguous, the others may be strided.
            k_scale, v_scale: fp32 ``[Hkv]``, or None where ``out`` has scales or none are needed.
        """
        ...

    def dequantize(self, k: Tensor, v: Tensor | None, stored: StoredRows) -> None:
        """What stored numbers mean: ``x * scale`` in fp32, rounded to the dtype of k and v. For fp16 what overflows becomes its largest
        finite number.

        Args:
            k, v: of another dtype than the stored rows, otherwise as they are.
        """
        ...


@cache
def moves_for(device: torch.device) -> Moves:
    """What moves rows on this device.

    >>> moves_for(torch.device("cpu")).__name__
    'cpattn.moves.torch_moves'
    """
    if has_kernels(device):
        # Triton need not be there.
        from cpattn.moves import triton_moves

        return triton_moves
    return torch_moves


def whole_rows(x: Tensor) -> Tensor:
    """A tensor as :meth:`Moves.gather_rows` takes it: contiguous, and its memory what it shows, which a lazy conjugate's is not."""
    return x.resolve_conj().contiguous()
