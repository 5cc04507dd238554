"""Cutting spans into tiles of queries on the host.

An *item* of work is a tile and a query head, or the heads that share the tile: item ``tile * heads + head``. Tiles of one
span that are about as long follow each other and make a *run*. For the cache's sake a run's items are computed head after
head, all of its tiles for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cpattn.current import is_capturing
from cpattn.device_tables import DeviceTables, IntArray, exclusive_cumsum
from cpattn.errors import CPError
from cpattn.kernels.tile_shapes import TileShape
from cpattn.rounds import makespan
from cpattn.spans import HostSpans, Spans

# Columns of a tile in the table that the kernel reads; see Tiles.
TILE_FIELDS = 8

# Rows of a tile that one warpgroup of the specialized kernel owns; a warpgroup without rows rests.
WARPGROUP_ROWS = 64

# Tiles are sorted by length in this many steps, and by span within a step.
LENGTH_CLASSES = 16

# What a key block costs a tile beside its rows, in rows: loading K and V, and the loop itself. In the specialized kernel
# a second warpgroup mostly fills the gaps of the first, so that half a tile costs 0.7 of a whole one.
_BLOCK_OVERHEAD = 24
_SPECIALIZED_BLOCK_OVERHEAD = 90
# What the same costs tiles of one warpgroup, in what it costs them where a second one rests: over fp8 keys, on an H200.
_ONE_WARPGROUP = 0.92
# What a tile costs beside its key blocks, in key blocks: loading q, the first K and V, writing the result.
_TILE_OVERHEAD = 2
# What it costs programs of the specialized kernel that there are more items than programs, in rows of a block: about 1 us. Before its first
# item each draws a number, and looks up which one that is (small_tiles.md).
_QUEUE_OVERHEAD = 150

# After so many key blocks, about 3 ms on an H200, a program of the specialized kernel ends, where tiles are alike: a quota of
# items is what it has. A new one takes its place, or a transfer's kernel, which else would have to wait for all of the
# attention; one that starts costs the time of two to four blocks.
_PROGRAM_BLOCKS = 2048
_NO_QUOTA = 2**30

# By how much an estimate must be better than that of what stands before it.
MARGIN = 0.02


class Tiles(NamedTuple):
    """A batch cut into tiles, about the longest first, so that the last programs to start are short.

    Columns, int64 ``[n]`` each:
        q_begin, q_count: the tile's tokens: their first row in q, and how many.
        k_start, k_len: the key range of the tile's span.
        sees: how many keys of a range without end the tile's first token would see (below 1: none).
        request: the line of the page table, where there is one.
        run_begin, run_tiles: the first tile of the tile's run, and how many it has.
    """

    q_begin: IntArray
    q_count: IntArray
    k_start: IntArray
    k_len: IntArray
    sees: IntArray
    request: IntArray
    run_begin: IntArray
    run_tiles: IntArray


@dataclass(frozen=True)
class Launch:
    """How to launch the kernel over one object of spans.

    Attributes:
        shape: the compiled form.
        pack: query heads of one KV head that share a tile: the whole group, or 1.
        num_tiles: a head; for fixed spans as many as they may ever need, and those without work at the end have no tokens.
        table: int32 ``[num_tiles * TILE_FIELDS]`` on the device, tile after tile.
        num_programs: of the specialized kernel, which share the tiles' items.
        limits: int32 ``[2]`` on the device: the tiles that have tokens, and how many items a program may compute.
        window: of the attention, or None.
    """

    shape: TileShape
    pack: int
    num_tiles: int
    table: Tensor
    num_programs: int
    limits: Tensor
    window: int | None

    def refresh(self, host: HostSpans) -> None:
        """See :class:`cpattn.spans.Refreshed`."""
        tiles, _ = cut(host, self.shape.block_m // self.pack, self.shape.block_n, self.window)
        tables = _on_device(tiles, self.num_tiles, _NO_QUOTA, self.table.device)
        self.table.copy_(tables["tiles"])
        self.limits.copy_(tables["limits"])


class _Lengths(Protocol):
    """What tiles are cut by: see :class:`cpattn.spans.Spans`."""

    @property
    def q_len(self) -> IntArray: ...
    @property
    def k_len(self) -> IntArray: ...
    @property
    def diagonal(self) -> IntArray: ...


class TilesOfSpans(NamedTuple):
    """The tiles of spans, in their order.

    Columns, int64 ``[n]`` each:
        span: the tile's span.
        first, tokens: its first query within the span, and how many it has.
        blocks: the key blocks that it visits.
    """

    span: IntArray
    first: IntArray
    tokens: IntArray
    blocks: IntArray

    @classmethod
    def of(cls, host: _Lengths, tokens_per_tile: int, block_n: int, window: int | None) -> TilesOfSpans:
        tiles_of_span = -(-host.q_len // tokens_per_tile)
        span = np.arange(len(host.q_len)).repeat(tiles_of_span)
        first = (np.arange(len(span)) - exclusive_cumsum(tiles_of_span).repeat(tiles_of_span)) * tokens_per_tile
        tokens = np.minimum(tokens_per_tile, host.q_len[span] - first)
        sees = host.diagonal[span] + first
        end = np.minimum(np.maximum(sees + tokens - 1, 0), host.k_len[span])
        keys = end if window is None else np.maximum(0, end - np.maximum(0, sees - window) // block_n * block_n)
        return cls(span, first, tokens, -(-keys // block_n))


def cut(host: HostSpans, tokens_per_tile: int, block_n: int, window: int | None) -> tuple[Tiles, IntArray]:
    """Returns the tiles and how many key blocks each visits."""
    return in_runs(host, TilesOfSpans.of(host, tokens_per_tile, block_n, window))


def in_runs(host: HostSpans, tiles: TilesOfSpans) -> tuple[Tiles, IntArray]:
    """The same of tiles in the order of their spans."""
    span, first, q_count, blocks = tiles
    # Tiles of one span and length class stay side by side and share its keys in the cache.
    length_class = blocks * LENGTH_CLASSES // max(1, int(blocks.max(initial=0)))
    order = np.lexsort((-blocks, span, -length_class))
    span, first, length_class = span[order], first[order], length_class[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (span[1:] != span[:-1]) | (length_class[1:] != length_class[:-1])
    run_begin = is_first.nonzero()[0]
    run_tiles = np.empty_like(run_begin)
    run_tiles[:-1], run_tiles[-1:] = run_begin[1:] - run_begin[:-1], len(order) - run_begin[-1:]
    in_order = Tiles(
        q_begin=host.q_start[span] + first,
        q_count=q_count[order],
        k_start=host.k_start[span],
        k_len=host.k_len[span],
        sees=host.diagonal[span] + first,
        request=host.request[span],
        run_begin=run_begin.repeat(run_tiles),
        run_tiles=run_tiles.repeat(run_tiles),
    )
    return in_order, blocks[order]


def block_costs(rows: IntArray, shape: TileShape) -> IntArray:
    """What a key block costs tiles that have so many rows, in rows."""
    if shape.specialized:
        cost = -(-rows // WARPGROUP_ROWS) * WARPGROUP_ROWS + _SPECIALIZED_BLOCK_OVERHEAD
        return cost if shape.warpgroups == 2 else (cost * _ONE_WARPGROUP).astype(np.int64)
    return np.full_like(rows, shape.block_m + _BLOCK_OVERHEAD)


def choose(
    host: HostSpans, shapes: tuple[TileShape, ...], packs: tuple[int, ...], num_heads: int, window: int | None, num_processors: int
) -> tuple[TileShape, int, Tiles, IntArray]:
    """The shape and packing that finish first by estimate, and their tiles with the key blocks that each visits.

    Of the kernel for Hopper it is estimated when its programs, which take tiles in turn, have computed all; of the plain one by the
    mean load of a processor, or the longest tile. Large tiles use the tensor cores best. Small ones waste less on short query
    ranges, and spread few queries over more processors. Packing the heads of a group fills a tile where there are few tokens.
    What is about as good goes to what stands first.
    (Smaller tiles of the kernel for Hopper are more work in any batch: they are looked at where processors wait for others, or where they
    leave out a warpgroup.)
    """
    best: tuple[float, TileShape, int, TilesOfSpans] | None = None
    for pack in packs:
        is_shared = False
        for shape in shapes:
            if shape.block_m < pack or (is_shared and shape.specialized and shape.warpgroups == 2):
                continue
            tiles = TilesOfSpans.of(host, shape.block_m // pack, shape.block_n, window)
            cost = (tiles.blocks + _TILE_OVERHEAD) * block_costs(tiles.tokens * pack, shape)
            heads = num_heads // pack
            load = cost.sum() * heads / num_processors
            # Several programs of the plain kernel share a processor, which so is not left alone with its last one.
            time = float(makespan(cost, heads, num_processors) if shape.specialized else max(load, cost.max(initial=0)))
            is_shared = load >= time * (1 - MARGIN)
            if shape.specialized and len(cost) * heads > num_processors:
                time += _QUEUE_OVERHEAD
            if best is None or time < best[0] * (1 - MARGIN):
                best = time, shape, pack, tiles
    assert best is not None  # an unpacked tile fits any shape
    _, shape, pack, tiles = best
    return shape, pack, *in_runs(host, tiles)


def _share(num_items: int, blocks: float, num_processors: int, fixed: bool) -> tuple[int, int]:
    """How many items a program of the specialized kernel may compute, and how many programs there are, given the mean key
    blocks of an item. Fixed spans change under a graph: they have no quota."""
    quota = max(2, math.ceil(_PROGRAM_BLOCKS / blocks))
    if fixed or num_items <= num_processors * quota:
        return _NO_QUOTA, min(num_items, num_processors)
    # Enough to compute all, and for one to begin on every processor until the queue is empty.
    return quota, -(-num_items // quota) + num_processors


def launch_for(
    spans: Spans, shapes: tuple[TileShape, ...], packs: tuple[int, ...], num_heads: int, window: int | None, num_processors: int
) -> Launch:
    """The launch for these spans, kept with them; its table reaches the device in one copy that the host does not wait for."""
    key = "tiles", shapes, packs, num_heads, window
    return spans.derive(key, _make_launch, spans, shapes, packs, num_heads, window, num_processors)


def _make_launch(
    spans: Spans, shapes: tuple[TileShape, ...], packs: tuple[int, ...], num_heads: int, window: int | None, num_processors: int
) -> Launch:
    device = spans.cu_seqlens_q.device
    if is_capturing(device):
        raise CPError("the first launch over these spans would be captured with its tables; make the same call once before capturing it")
    shape, pack, tiles, blocks = choose(spans.host, shapes, packs, num_heads, window, num_processors)
    num_tiles, heads = len(tiles.q_begin), num_heads // pack
    if spans.fixed:
        # Each span may leave one tile partly empty; the number of queries in all of them is fixed.
        num_tiles = int(spans.host.q_len.sum()) // (shape.block_m // pack) + len(spans)
    quota, num_programs = _share(num_tiles * heads, _TILE_OVERHEAD + blocks.sum() / max(1, len(blocks)), num_processors, spans.fixed)
    tables = _on_device(tiles, num_tiles, quota, device)
    return Launch(shape, pack, num_tiles, tables["tiles"], num_programs, tables["limits"], window)


def _on_device(tiles: Tiles, num_tiles: int, quota: int, device: torch.device) -> DeviceTables:
    table = np.zeros((num_tiles, TILE_FIELDS), dtype=np.int64)
    for field, column in enumerate(tiles):
        table[: len(column), field] = column
    return DeviceTables({"tiles": table.reshape(-1), "limits": np.array([len(tiles.q_begin), quota])}, device)
