"""Device code: which tile a program computes, which rows of it are queries, and which keys those see.

Both attention kernels find their work with it. Values go from function to function as NamedTuples, which every release of
Triton takes, its interpreter and Gluon included; they hold nothing that has to be constant. What a kernel is compiled for
is one constant object, ``C`` (:mod:`cpattn.kernels.attention_config`).

Suffixes: M rows of a tile, or those of a warpgroup.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from cpattn.kernels.tiles import TILE_FIELDS

_FIELDS: tl.constexpr = tl.constexpr(TILE_FIELDS)


class Run(NamedTuple):
    """Tiles that have the same keys and follow each other: the first, and how many."""

    begin: Any
    tiles: Any


class Tile(NamedTuple):
    """What a tile's queries are and see; see :class:`cpattn.kernels.tiles.Tiles`."""

    q_begin: Any
    q_count: Any
    k_len: Any
    sees: Any


class TileRows(NamedTuple):
    """A tile's rows: token, counted from the tile's first; query head; and whether it is there."""

    token_M: Any
    head_M: Any
    is_token_M: Any


class KeyRange(NamedTuple):
    """The keys ``first .. end - 1``, in blocks that begin at ``begin``, a multiple of the block size."""

    first: Any
    end: Any
    begin: Any


class Bounds(NamedTuple):
    """Row m sees the keys ``from_M[m] .. to_M[m] - 1``; without a window all those before ``to_M[m]``."""

    from_M: Any
    to_M: Any


class PageLine(NamedTuple):
    """A request's line of the page table."""

    pointer: Any
    stride: Any


class Source(NamedTuple):
    """K or V of all heads, or their scales: a pointer, or for TMA a tensor descriptor; and the tensor's strides."""

    at: Any
    page_stride: Any
    stride_row: Any
    stride_head: Any


@triton.jit
def load_run(tiles, number, C: tl.constexpr):
    """The run of tiles that the ``number``-th item in the order of work belongs to."""
    tile = tiles + (number // C.HEADS) * _FIELDS
    return Run(tl.load(tile + 6), tl.load(tile + 7))


@triton.jit
def find_in_run(number, run, C: tl.constexpr):
    """Tile and head of the ``number``-th item. A run's tiles come one after another for each head: they have the same keys,
    which are then read from memory once."""
    in_run = number - run.begin * C.HEADS
    return run.begin + in_run % run.tiles, in_run // run.tiles


@triton.jit
def load_tile(tiles, tile):
    """The tile, and where its range of keys begins."""
    fields = tiles + tile * _FIELDS
    q_begin = tl.load(fields)
    q_count = tl.load(fields + 1)
    k_start = tl.load(fields + 2)
    return Tile(q_begin, q_count, tl.load(fields + 3), tl.load(fields + 4)), k_start


@triton.jit
def load_request(tiles, tile):
    """The tile's request."""
    return tl.load(tiles + tile * _FIELDS + 5)


@triton.jit
def load_page_line(page_table, stride_request, tiles, tile):
    """Where the line of the page table begins that the tile's request has."""
    return page_table + load_request(tiles, tile).to(tl.int64) * stride_request


@triton.jit
def page_entry(line, key, PAGE_SIZE: tl.constexpr):
    """Where the table says which page a key is in."""
    return line.pointer + (key // PAGE_SIZE).to(tl.int64) * line.stride


@triton.jit
def rows_of(row_M, tile, first_head, C: tl.constexpr):
    """Row r of the tile is query head r % C.PACK of token r // C.PACK."""
    token_M = row_M // C.PACK
    return TileRows(token_M, first_head + row_M % C.PACK, token_M < tile.q_count)


@triton.jit
def bounds_of(token_M, tile, window):
    """Which keys each row sees."""
    return Bounds(tile.sees + token_M - window, tl.minimum(tile.sees + token_M, tile.k_len))


@triton.jit
def keys_seen(tile, window, C: tl.constexpr):
    """The keys that any of a tile's queries sees."""
    end = tl.minimum(tile.sees + tile.q_count - 1, tile.k_len)
    first = 0
    begin = 0
    if C.WINDOW:
        first = tl.maximum(tile.sees - window, 0)
        begin = first // C.BLOCK_N * C.BLOCK_N
        # Without a key no block is visited, as a page table need not have an entry for it.
        end = tl.where(end > first, end, begin)
    return KeyRange(first, end, begin)


@triton.jit
def last_block(seen, C: tl.constexpr):
    """Where the last block begins of the keys that are seen: the first that is visited."""
    return seen.begin + tl.maximum(seen.end - seen.begin - 1, 0) // C.BLOCK_N * C.BLOCK_N


@triton.jit
def whole_blocks(tile, window, C: tl.constexpr):
    """Where those blocks of keys begin and end that all of a tile's queries see whole."""
    end = tl.maximum(tl.minimum(tile.sees, tile.k_len), 0) // C.BLOCK_N * C.BLOCK_N
    begin = 0
    if C.WINDOW:
        begin = (tl.maximum(tile.sees + tile.q_count - 1 - window, 0) + C.BLOCK_N - 1) // C.BLOCK_N * C.BLOCK_N
        end = tl.maximum(end, begin)
    return begin, end
