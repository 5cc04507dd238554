"""Moving rows in plain torch: what :class:`cpattn.moves.moves.Moves` means."""

from __future__ import annotations

import torch
from torch import Tensor

from cpattn.moves.torch_quantize import dequantize as dequantize
from cpattn.moves.torch_quantize import quantize as quantize

# Dtypes of which torch moves single rows everywhere. Of others, such as fp8, it moves the bits under another name.
_INDEXED = frozenset(
    {torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool}
)
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def pack(
    message: Tensor, k: Tensor, v: Tensor | None, num_tokens: int | Tensor, slots: Tensor | None = None, rows: Tensor | None = None
) -> None:
    """See :meth:`cpattn.moves.moves.Moves.pack`."""
    if rows is not None:
        k, v = k[rows], None if v is None else v[rows]
    parts = [(message[..., : k.shape[2]], k)]
    if v is not None:
        parts.append((message[..., k.shape[2] :], v))
    count, is_token = num_tokens, None
    if isinstance(num_tokens, Tensor):
        # How many there are is known on the device alone: of all rows that may be tokens some are taken.
        count = min(len(message) if slots is None else len(slots), *[len(source) for _, source in parts])
        is_token = torch.arange(count, device=message.device) < num_tokens
    if slots is not None:
        slots = slots[:count]
        is_row = slots >= 0 if is_token is None else (slots >= 0) & is_token
        _put_rows([(part, source[:count]) for part, source in parts], (slots.clamp(min=0),), is_row)
        return
    for part, source in parts:
        part[:count] = source[:count] if is_token is None else torch.where(is_token[:, None, None], source[:count], 0)
        part[count:] = 0


def gather_rows(out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None = None) -> None:
    """See :meth:`cpattn.moves.moves.Moves.gather_rows`."""
    if out.dtype not in _INDEXED:
        word = _WORDS[out.itemsize]
        out, source = out.view(word), source.view(word)
    is_zero = index < 0
    if not len(source):
        gathered = out.new_zeros(len(index), *out.shape[1:])
        _put_or_copy(out, gathered, slots)
        return
    index = index.clamp(min=0)
    if slots is not None:
        _put_or_copy(out, _zero_rows(source.index_select(0, index), is_zero), slots)
    elif out.ndim > 2:
        # As one flat row each; torch moves those fastest.
        _zero_rows(torch.index_select(source.flatten(1), 0, index, out=out.flatten(1)), is_zero)
    else:
        _zero_rows(torch.index_select(source, 0, index, out=out), is_zero)


def _put_or_copy(out: Tensor, values: Tensor, slots: Tensor | None) -> None:
    if slots is None:
        out.copy_(values)
    else:
        _put_rows([(out, values)], (slots.clamp(min=0),), slots >= 0)


def _zero_rows(x: Tensor, is_zero: Tensor) -> Tensor:
    if x.device.type == "cpu":
        x[is_zero] = 0
        return x
    return x.masked_fill_(is_zero.view(-1, *[1] * (x.ndim - 1)), 0)


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
    if not k_pages.numel():
        return
    is_token, slot = _slots(k_pages, page_table, request, position)
    parts = [(k_pages, k[: len(position)])]
    if v_pages is not None and v is not None:
        parts.append((v_pages, v[: len(position)]))
    _put_rows(parts, slot, is_token)


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
    to = slice(0, len(position)) if out_rows is None else out_rows
    if not k_pages.numel():
        k[to] = 0
        if v is not None:
            v[to] = 0
        return
    is_token, slot = _slots(k_pages, page_table, request, position)
    k[to] = torch.where(is_token[:, None, None], k_pages[slot], 0)
    if v_pages is not None and v is not None:
        v[to] = torch.where(is_token[:, None, None], v_pages[slot], 0)


def _slots(k_pages: Tensor, page_table: Tensor | None, request: Tensor | None, position: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Which rows are tokens, and each row's page and place in it: those of slot 0 for padding."""
    page_size = k_pages.shape[1]
    is_token = position >= 0
    position = torch.where(is_token, position, 0).long()
    page = position // page_size
    if page_table is not None and page_table.numel():
        assert request is not None
        page = torch.where(is_token, page_table[torch.where(is_token, request, 0), page].long(), 0)
    return is_token, (page, position % page_size)


def _put_rows(parts: list[tuple[Tensor, Tensor]], index: tuple[Tensor, ...], is_row: Tensor) -> None:
    """``out[index[0][i], index[1][i], ...] = values[i]`` where ``is_row[i]``, for each ``(out, values)``, without waiting for the
    device; the others' index must lie inside of out, too."""
    if is_row.device.type == "cpu":
        to = tuple([axis[is_row] for axis in index])
        for out, values in parts:
            out[to] = values[is_row]
        return
    if not len(is_row):
        return
    # How many rows there are is known on the device alone: the others repeat the first one, or, where there is none,
    # write back what the first place of out holds.
    first = is_row.int().argmax()
    any_row = is_row[first]
    source = torch.where(is_row, torch.arange(len(is_row), device=is_row.device), first)
    to = tuple([torch.where(any_row, axis[source], 0) for axis in index])
    for out, values in parts:
        out[to] = torch.where(any_row, values[source], out[(0,) * len(index)])
