"""Triton kernels that move rows for the exchange: one launch, each row read once and written once."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, dtype, int8, int16, int32

from cpattn.kernels.arguments import Words
from cpattn.kernels.launch import Launcher, LaunchFunction, launch_nothing

# Bytes that a thread moves at a time, where rows are aligned to it.
_ACCESS = 16
# 32-bit words that one program moves: 128 bytes for each of its 128 threads.
_WORDS_PER_PROGRAM = 4096


@triton.jit
def _pack_columns(
    message, source, row_R, to_row_R, head_R, is_row_R, is_token_R, message_stride_row, message_stride_head, stride_row, stride_head,
    FIRST: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """Columns ``FIRST .. FIRST + DIM - 1`` of the message: the source's on tokens, 0 on padding, which is not read."""
    column_1D = tl.arange(0, DIM_PADDED)[None, :]
    from_R1 = (row_R * stride_row + head_R * stride_head)[:, None]
    to_R1 = (to_row_R * message_stride_row + head_R * message_stride_head)[:, None]
    values = tl.load(source + from_R1 + column_1D, mask=is_token_R[:, None] & (column_1D < DIM), other=0)
    tl.store(message + to_R1 + FIRST + column_1D, values, mask=is_row_R[:, None] & (column_1D < DIM))


# Counts change from batch to batch, and must not compile anew.
@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _pack_kernel(
    message, k, v, slots, num_rows, num_tokens, message_stride_row, message_stride_head,
    k_stride_row, k_stride_head, v_stride_row, v_stride_head,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
    SLOTS: tl.constexpr, HAS_V: tl.constexpr, COUNT_ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_R (row, head) pairs, ``R``."""
    if COUNT_ON_DEVICE:
        num_tokens = tl.load(num_tokens)
    pair_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_R = pair_R // HEADS
    head_R = pair_R % HEADS
    is_row_R = row_R < num_rows
    is_token_R = row_R < num_tokens
    to_row_R = row_R
    if SLOTS:
        is_row_R = is_row_R & is_token_R
        to_row_R = tl.load(slots + row_R, mask=is_row_R, other=-1).to(tl.int64)
        is_row_R = is_row_R & (to_row_R >= 0)
    _pack_columns(
        message, k, row_R, to_row_R, head_R, is_row_R, is_token_R, message_stride_row, message_stride_head, k_stride_row, k_stride_head,
        0, D, D_PADDED,
    )  # fmt: skip
    if HAS_V:
        _pack_columns(
            message, v, row_R, to_row_R, head_R, is_row_R, is_token_R, message_stride_row, message_stride_head, v_stride_row, v_stride_head,
            D, DV, DV_PADDED,
        )  # fmt: skip


_pack = Launcher(_pack_kernel)


def pack_kv(message: Tensor, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, slots: Tensor | None = None) -> None:
    """Writes the first ``num_tokens`` rows of K and V into the message, and zeros after them; or, with ``slots``, row i
    into row slots[i] of the message, where that is not negative, and nothing else.

    The twin of :func:`cpattn.exchange.message.torch_pack_`, with the same bits.

    Args:
        message: ``[rows, Hkv, D + Dv]``; k ``[>= num_tokens, Hkv, D]``; v ``[>= num_tokens, Hkv, Dv]``, of one dtype,
            the last axis contiguous, the others may be strided. Rows of k and v after the tokens are not read.
            v may be None: the message is then K's alone.
        num_tokens: or an int32 tensor of one element on the device.
        slots: int32 or int64 ``[>= num_tokens]``, those that are not negative all different.
    """
    values = k if v is None else v
    key = (
        message.shape, message.stride(), message.dtype, k.shape, k.stride(), k.dtype,
        values.shape, values.stride(), values.dtype, v is None,
        num_tokens.dtype if isinstance(num_tokens, Tensor) else num_tokens, None if slots is None else (slots.shape, slots.dtype),
    )  # fmt: skip
    launch = _pack.prepared.get(key) or _pack.prepared.keep(key, _prepare_pack(message, k, v, num_tokens, slots))
    launch(message, k, values, message if slots is None else slots, *((num_tokens,) if isinstance(num_tokens, Tensor) else ()))


def _prepare_pack(message: Tensor, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, slots: Tensor | None) -> LaunchFunction:
    heads = message.shape[1]
    most = message.shape[0] if slots is None else min(slots.shape[0], k.shape[0])
    rows = most if slots is None or isinstance(num_tokens, Tensor) else num_tokens
    values = k if v is None else v
    d_padded, dv_padded = triton.next_power_of_2(k.shape[2]), triton.next_power_of_2(values.shape[2])
    block = max(1, _WORDS_PER_PROGRAM * 4 // (message.element_size() * max(d_padded, dv_padded)))
    tensors = {"message": 0, "k": 1, "v": 2, "slots": 3}
    return _pack.prepare(
        (triton.cdiv(rows * heads, block), 1), {}, tensors | ({"num_tokens": 4} if isinstance(num_tokens, Tensor) else {}),
        message=message, k=k, v=values, slots=message if slots is None else slots,
        num_rows=rows, num_tokens=num_tokens, message_stride_row=message.stride(0), message_stride_head=message.stride(1),
        k_stride_row=k.stride(0), k_stride_head=k.stride(1), v_stride_row=values.stride(0), v_stride_head=values.stride(1),
        HEADS=heads, D=k.shape[2], DV=values.shape[2], D_PADDED=d_padded, DV_PADDED=dv_padded, BLOCK_R=block,
        SLOTS=slots is not None, HAS_V=v is not None, COUNT_ON_DEVICE=isinstance(num_tokens, Tensor),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    out, source, index, slots, num_rows, out_stride, source_stride,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_R rows, ``R``, and BLOCK_W of their words, ``W``. Strides are in units of UNIT words."""
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    word_1W = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    is_row_R = row_R < num_rows
    from_R = tl.load(index + row_R, mask=is_row_R, other=0).to(tl.int64)
    from_inside_RW = (is_row_R & (from_R >= 0))[:, None] & (word_1W < WIDTH)
    to_R = row_R
    if SLOTS:
        to_R = tl.load(slots + row_R, mask=is_row_R, other=-1).to(tl.int64)
        is_row_R = is_row_R & (to_R >= 0)
    to_inside_RW = is_row_R[:, None] & (word_1W < WIDTH)
    # Multiplied by a constant, from which the compiler sees that rows are aligned and that it may use wide accesses.
    values_RW = tl.load(source + (from_R * source_stride)[:, None] * UNIT + word_1W, mask=from_inside_RW, other=0)
    tl.store(out + (to_R * out_stride)[:, None] * UNIT + word_1W, values_RW, mask=to_inside_RW)


_gather = Launcher(_gather_kernel)


def gather_rows(out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None = None) -> None:
    """``out[i] = source[index[i]]``, or with ``slots`` ``out[slots[i]] = source[index[i]]``: rows of any width, moved as
    words of memory whatever their dtype.

    The twin of :func:`cpattn.exchange.message.torch_gather_rows_`, with the same bits.

    Args:
        out: ``[n, ...]`` (any number of rows with slots); source ``[m, ...]``, of one dtype and the same trailing shape,
            each row contiguous; they do not overlap.
        index: int32 or int64 ``[n]``, each below m; a negative one stands for a row of zeros.
        slots: int32 or int64 ``[n]``, all different rows of out; where it is negative nothing is written.
    """
    # Of an offset in elements the last two bits say which words of up to 4 bytes fit.
    key = (
        out.shape, out.stride(), out.dtype, out.storage_offset() & 3,
        source.shape, source.stride(), source.dtype, source.storage_offset() & 3,
        (out.data_ptr() | source.data_ptr()) % _ACCESS == 0, index.shape, index.dtype, None if slots is None else slots.dtype,
    )  # fmt: skip
    launch = _gather.prepared.get(key) or _gather.prepared.keep(key, _prepare_gather(out, source, index, slots))
    launch(out, source, index, index if slots is None else slots)


def _prepare_gather(out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None) -> LaunchFunction:
    flat = [_flat(x) for x in (out, source)]
    if not len(index) * flat[0].shape[1]:
        return launch_nothing
    word = _word(flat)
    out_words, source_words = (x.view(word) for x in flat)
    rows, width = index.shape[0], out_words.shape[1]
    per_access = _ACCESS // word.itemsize
    aligned = all(x.stride(0) % per_access == 0 and x.data_ptr() % _ACCESS == 0 for x in (out_words, source_words))
    unit = per_access if aligned else 1
    block_w = min(1024, triton.next_power_of_2(width))
    block_r = _WORDS_PER_PROGRAM // block_w
    return _gather.prepare(
        (triton.cdiv(rows, block_r), triton.cdiv(width, block_w)), {}, {"out": 0, "source": 1, "index": 2, "slots": 3},
        out=Words(out, word), source=Words(source, word), index=index,
        slots=index if slots is None else slots, num_rows=rows,
        out_stride=out_words.stride(0) // unit, source_stride=source_words.stride(0) // unit,
        WIDTH=width, UNIT=unit, BLOCK_R=block_r, BLOCK_W=block_w, SLOTS=slots is not None,
    )  # fmt: skip


def _flat(x: Tensor) -> Tensor:
    """A view ``[rows, elements]``."""
    flat = x.reshape(len(x), 1) if x.ndim == 1 else x.flatten(1)
    if flat.data_ptr() != x.data_ptr():
        raise ValueError("rows are not contiguous; gather_rows moves whole rows")
    return flat


def _word(flat: list[Tensor]) -> dtype:
    """The widest word up to 4 bytes that all of them are made of."""
    size = flat[0].element_size()
    for word in (int32, int16, int8):
        # A view in another word needs widths, strides and offsets that are whole numbers of it.
        if all(n * size % word.itemsize == 0 for x in flat for n in (x.shape[1], x.stride(0), x.storage_offset())):
            return word
    raise AssertionError("every tensor is made of bytes")
