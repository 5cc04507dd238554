"""Moving rows by Triton kernels: the bits of :mod:`cpattn.moves.torch_moves`, one launch each, each row read once and written once."""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor, dtype, int8, int16, int32, uint8

from cpattn.kernels.arguments import Words
from cpattn.kernels.launch import Launcher, LaunchFunction, launch_nothing
from cpattn.kernels.move_pages import pages_kernel
from cpattn.kernels.move_rows import gather_kernel, pack_kernel
from cpattn.moves.triton_quantize import dequantize as dequantize
from cpattn.moves.triton_quantize import quantize as quantize

# Bytes that a thread moves at a time, where rows are aligned to it.
_ACCESS = 16
# What one program moves: 128 bytes for each of its 128 threads; of pages, of the wider of K and V.
_BYTES_PER_PROGRAM = 16384
_WORDS_PER_PROGRAM = _BYTES_PER_PROGRAM // 4

_pack = Launcher(pack_kernel)
_gather = Launcher(gather_kernel)
_pages = Launcher(pages_kernel)


def pack(
    message: Tensor, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, slots: Tensor | None = None, rows: Tensor | None = None
) -> None:
    """See :meth:`cpattn.moves.moves.Moves.pack`."""
    values = k if v is None else v
    key = (
        message.shape, message.stride(), message.dtype, k.shape, k.stride(), k.dtype,
        values.shape, values.stride(), values.dtype, v is None,
        num_tokens.dtype if isinstance(num_tokens, Tensor) else num_tokens, None if slots is None else (slots.shape, slots.dtype),
        None if rows is None else rows.dtype,
    )  # fmt: skip
    launch = _pack.prepared.get(key) or _pack.prepared.keep(key, _prepare_pack(message, k, v, num_tokens, slots, rows))
    counted = (num_tokens,) if isinstance(num_tokens, Tensor) else ()
    launch(message, k, values, message if slots is None else slots, message if rows is None else rows, *counted)


def _prepare_pack(
    message: Tensor, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, slots: Tensor | None, rows: Tensor | None
) -> LaunchFunction:
    heads = message.shape[1]
    most = message.shape[0] if slots is None else slots.shape[0] if rows is not None else min(slots.shape[0], k.shape[0])
    num_rows = most if slots is None or isinstance(num_tokens, Tensor) else num_tokens
    values = k if v is None else v
    d_padded, dv_padded = triton.next_power_of_2(k.shape[2]), triton.next_power_of_2(values.shape[2])
    block = max(1, _BYTES_PER_PROGRAM // (message.element_size() * max(d_padded, dv_padded)))
    tensors = {"message": 0, "k": 1, "v": 2, "slots": 3, "rows": 4}
    return _pack.prepare(
        (triton.cdiv(num_rows * heads, block), 1), {}, tensors | ({"num_tokens": 5} if isinstance(num_tokens, Tensor) else {}),
        message=message, k=k, v=values, slots=message if slots is None else slots, rows=message if rows is None else rows,
        num_rows=num_rows, num_tokens=num_tokens, message_stride_row=message.stride(0), message_stride_head=message.stride(1),
        k_stride_row=k.stride(0), k_stride_head=k.stride(1), v_stride_row=values.stride(0), v_stride_head=values.stride(1),
        HEADS=heads, D=k.shape[2], DV=values.shape[2], D_PADDED=d_padded, DV_PADDED=dv_padded, BLOCK_R=block,
        SLOTS=slots is not None, ROWS=rows is not None, HAS_V=v is not None, COUNT_ON_DEVICE=isinstance(num_tokens, Tensor),
    )  # fmt: skip


def gather_rows(out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None = None) -> None:
    """See :meth:`cpattn.moves.moves.Moves.gather_rows`; rows move as words of memory, whatever their dtype."""
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


class _Paged(NamedTuple):
    """The tensors of a launch over pages; what is not given is stood in for by another, which is not looked at."""

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    request: Tensor
    position: Tensor
    k: Tensor
    v: Tensor
    out_rows: Tensor


_PAGED_TENSORS = {name: i for i, name in enumerate(_Paged._fields)}


def write_pages(
    k_pages: Tensor,
    v_pages: Tensor | None,
    page_table: Tensor | None,
    request: Tensor | None,
    position: Tensor,
    k: Tensor,
    v: Tensor | None,
) -> None:
    """See :meth:`cpattn.moves.moves.Moves.write_pages`."""
    _move(k_pages, v_pages, page_table, request, position, k, v, None, write=True)


def read_pages(
    k_pages: Tensor,
    v_pages: Tensor | None,
    page_table: Tensor | None,
    request: Tensor | None,
    position: Tensor,
    k: Tensor,
    v: Tensor | None,
    out_rows: Tensor | None = None,
) -> None:
    """See :meth:`cpattn.moves.moves.Moves.read_pages`."""
    _move(k_pages, v_pages, page_table, request, position, k, v, out_rows, write=False)


def _move(
    k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor | None, request: Tensor | None, position: Tensor, k: Tensor,
    v: Tensor | None, out_rows: Tensor | None, *, write: bool,
) -> None:  # fmt: skip
    has_v = v_pages is not None and v is not None
    if v_pages is None or v is None:
        v_pages, v = k_pages, k
    key = (
        k_pages.shape, k_pages.stride(), k_pages.dtype, v_pages.stride(), k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype,
        has_v, write,
        position.shape, position.dtype, None if page_table is None else (page_table.stride(), page_table.dtype),
        None if request is None else request.dtype, None if out_rows is None else out_rows.dtype,
    )  # fmt: skip
    tensors = (
        k_pages, v_pages, position if page_table is None else page_table, position if request is None else request, position, k, v,
        position if out_rows is None else out_rows,
    )  # fmt: skip
    launch = _pages.prepared.get(key)
    if launch is None:
        table_stride = None if page_table is None else page_table.stride()
        launch = _pages.prepared.keep(key, _prepare_pages(_Paged(*tensors), table_stride, out_rows is not None, has_v, write))
    launch(*tensors)


def _prepare_pages(x: _Paged, table_stride: tuple[int, ...] | None, has_out_rows: bool, has_v: bool, write: bool) -> LaunchFunction:
    rows, (_, heads, head_dim), v_head_dim = x.position.shape[0], x.k.shape, x.v.shape[2]
    d_padded, dv_padded = triton.next_power_of_2(head_dim), triton.next_power_of_2(v_head_dim)
    block = max(1, _BYTES_PER_PROGRAM // (x.k.element_size() * max(d_padded, dv_padded)))
    table_stride_request, table_stride_page = table_stride or (0, 0)
    arguments: dict[str, Any] = x._asdict()
    if x.k.element_size() == 1:
        # fp8 is moved as bytes, which every GPU and the interpreter have.
        arguments |= {name: Words(arguments[name], uint8) for name in ("k_pages", "v_pages", "k", "v")}
    return _pages.prepare(
        (triton.cdiv(rows * heads, block), 1), {}, _PAGED_TENSORS, **arguments,
        num_rows=rows, page_size=x.k_pages.shape[1], table_stride_request=table_stride_request, table_stride_page=table_stride_page,
        k_page_stride=x.k_pages.stride(0), k_page_stride_token=x.k_pages.stride(1), k_page_stride_head=x.k_pages.stride(2),
        v_page_stride=x.v_pages.stride(0), v_page_stride_token=x.v_pages.stride(1), v_page_stride_head=x.v_pages.stride(2),
        k_stride_row=x.k.stride(0), k_stride_head=x.k.stride(1), v_stride_row=x.v.stride(0), v_stride_head=x.v.stride(1),
        HEADS=heads, D=head_dim, DV=v_head_dim, D_PADDED=d_padded, DV_PADDED=dv_padded, BLOCK_R=block,
        WRITE=write, TABLE=table_stride is not None, OUT_ROWS=has_out_rows, HAS_V=has_v,
    )  # fmt: skip
