"""Device code for Hopper: how the producer brings key blocks that are stored in other numbers than queries have.

Tensor cores multiply what lies in shared memory, in one dtype of 16 bits. So warps copy bytes, as they are stored, beside what is being
computed; then they read them, and write what they stand for where the consumers expect a block. There are two ways:

- C.HALF: fp8 with one scale or one a head becomes fp16, exactly and by one instruction for two numbers. Queries become fp16 as well,
  and scales wait until after the products (:mod:`cpattn.kernels.hopper_half`).
- Else numbers are multiplied by their scales, if they have any, and rounded to q's dtype. The products are of the same numbers as the
  plain kernel's, to the bit.

A block is copied while the one before it is converted, if shared memory has room for the bytes of two: C.RAW. Which pages it lies in is
read a block earlier, as copies would wait for that.

Suffixes: N keys of a block, or of a part of it, D its padded head dim.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from cpattn.kernels.hopper_channels import wait_empty
from cpattn.kernels.hopper_items import Brought, bring_queries
from cpattn.kernels.stored_numbers import in_dtype, in_half, meant
from cpattn.kernels.tile_keys import last_block, page_entry

# Triton 3.6 has it under another name than later ones.
_copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


class Raw(NamedTuple):
    """Stored numbers ``[C.RAW, C.BLOCK_N, padded dim]`` and scales ``[C.RAW, C.BLOCK_N]`` in shared memory."""

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any


class StoredKeys(NamedTuple):
    """Where they lie: each a :class:`cpattn.kernels.tile_keys.Source`, but ``raw``, which is where their bytes are copied to."""

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    raw: Any


class Places(NamedTuple):
    """Where keys lie: in which pages and rows; and which of them are in the range."""

    page_N: Any
    row_N: Any
    inside_N: Any


class Pages(NamedTuple):
    """The page of each key of a block, as threads copy K, V and scales of tokens."""

    k_N: Any
    v_N: Any
    scale_N: Any


class Waiting(NamedTuple):
    """A block whose bytes are on their way.

    Attributes:
        there: 1 if there is one; is_first: whether queries come with it, as with each item's first.
        q_begin, q_count, first_head: of its item's queries.
        pages: of the item's next block.
    """

    there: Any
    is_first: Any
    q_begin: Any
    q_count: Any
    first_head: Any
    pages: Any


@gluon.jit
def allocate_raw(DTYPE: gl.constexpr, C: gl.constexpr):
    """Shared memory for the bytes of C.RAW blocks."""
    # Threads read what is side by side, row after row: nothing has to be swizzled.
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    k = gl.allocate_shared_memory(DTYPE, [C.RAW, C.BLOCK_N, C.D_PADDED], layout)
    v = gl.allocate_shared_memory(DTYPE, [C.RAW, C.BLOCK_N, C.DV_PADDED], layout)
    k_scale = k
    v_scale = v
    if C.OF_TOKENS:
        of_rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        k_scale = gl.allocate_shared_memory(gl.float32, [C.RAW, C.BLOCK_N], of_rows)
        v_scale = gl.allocate_shared_memory(gl.float32, [C.RAW, C.BLOCK_N], of_rows)
    return Raw(k, v, k_scale, v_scale)


@gluon.constexpr_function
def _layout(numbers, dim, C):
    """Of rows of so many dims over the producer's warps, so many numbers side by side for each thread."""
    across = min(32, dim // numbers)
    return gl.BlockedLayout([1, numbers], [32 // across, across], [C.PRODUCER_WARPS, 1], [1, 0])


@gluon.constexpr_function
def _copy_layout(C, dtype, dim):
    """As threads copy rows of so many dims: 16 bytes for each, side by side."""
    return _layout(128 // dtype.primitive_bitwidth, dim, C)


@gluon.constexpr_function
def _scale_layout(C):
    return gl.BlockedLayout([1], [32], [C.PRODUCER_WARPS], [0])


@gluon.jit
def _keys(item, block, layout: gl.constexpr, C: gl.constexpr):
    """A block's keys; instead of those outside of the range, whose entries of the page table may be anything, the nearest inside."""
    key_N = block + gl.arange(0, C.BLOCK_N, layout)
    return gl.maximum(gl.minimum(key_N, item.keys.end - 1), item.keys.first)


@gluon.jit
def _pages(item, block, layout: gl.constexpr, C: gl.constexpr):
    """The page of each key of a block."""
    PAGE_SIZE: gl.constexpr = C.PAGE_SIZE
    key_N = _keys(item, block, layout, C)
    page_N = key_N * 0
    if PAGE_SIZE:
        # Tables are of int32 or int64, and what is carried from one block to the next is of one type.
        page_N = gl.load(page_entry(item.line, key_N, PAGE_SIZE)).to(gl.int32)
    return page_N


@gluon.jit
def _all_pages(item, block, dtype: gl.constexpr, C: gl.constexpr):
    """The pages of a block, as each of its parts is copied."""
    k_N = _pages(item, block, gl.SliceLayout(1, _copy_layout(C, dtype, C.D_PADDED)), C)
    v_N = k_N
    scale_N = k_N
    if C.DV_PADDED != C.D_PADDED:
        v_N = _pages(item, block, gl.SliceLayout(1, _copy_layout(C, dtype, C.DV_PADDED)), C)
    if C.OF_TOKENS:
        scale_N = _pages(item, block, _scale_layout(C), C)
    return Pages(k_N, v_N, scale_N)


@gluon.jit
def nothing_yet(stored, C: gl.constexpr):
    """Before the first block."""
    BLOCK_N: gl.constexpr = C.BLOCK_N
    k_N = gl.zeros([BLOCK_N], gl.int32, gl.SliceLayout(1, _copy_layout(C, stored.raw.k.dtype, C.D_PADDED)))
    v_N = k_N
    scale_N = k_N
    if C.DV_PADDED != C.D_PADDED:
        v_N = gl.zeros([BLOCK_N], gl.int32, gl.SliceLayout(1, _copy_layout(C, stored.raw.k.dtype, C.DV_PADDED)))
    if C.OF_TOKENS:
        scale_N = gl.zeros([BLOCK_N], gl.int32, _scale_layout(C))
    return Waiting(0, 0, 0, 0, 0, Pages(k_N, v_N, scale_N))


@gluon.jit
def _find(item, block, page_N, layout: gl.constexpr, C: gl.constexpr):
    """Where a block's keys lie, and which of them are in the range."""
    PAGE_SIZE: gl.constexpr = C.PAGE_SIZE
    key_N = block + gl.arange(0, C.BLOCK_N, layout)
    inside_N = (key_N >= item.keys.first) & (key_N < item.keys.end)
    row_N = _keys(item, block, layout, C)
    row_N = row_N % PAGE_SIZE if PAGE_SIZE else item.k_start + row_N
    return Places(page_N.to(gl.int64), row_N.to(gl.int64), inside_N)


@gluon.jit
def _rows(source, item, places, UNIT: gl.constexpr):
    """Where the rows of a source begin, which is at multiples of so many numbers."""
    offset_N = places.page_N * source.page_stride + places.row_N * source.stride_row + item.kv_head.to(gl.int64) * source.stride_head
    return source.at + gl.multiple_of(offset_N, [UNIT])


@gluon.jit
def _copy(source, smem, item, places, layout: gl.constexpr, DIM: gl.constexpr, PADDED: gl.constexpr, C: gl.constexpr):
    """Starts to copy a block, and 0 for what is outside of the range or of the head dim."""
    UNIT: gl.constexpr = 8 * C.COPIED // smem.dtype.primitive_bitwidth
    dim_1D = gl.arange(0, PADDED, gl.SliceLayout(0, layout))[None, :]
    _copy_async(smem, _rows(source, item, places, UNIT)[:, None] + dim_1D, places.inside_N[:, None] & (dim_1D < DIM))


@gluon.jit
def _start(i, block, item, pages, stored, C: gl.constexpr):
    """Starts to copy the ``i``-th block; pages are those of the item's next one, if it is not its first."""
    raw = stored.raw
    slot = i % C.RAW
    k_layout: gl.constexpr = _copy_layout(C, raw.k.dtype, C.D_PADDED)
    v_layout: gl.constexpr = _copy_layout(C, raw.k.dtype, C.DV_PADDED)
    if block == last_block(item.keys, C):
        pages = _all_pages(item, block, raw.k.dtype, C)
    places = _find(item, block, pages.k_N, gl.SliceLayout(1, k_layout), C)
    _copy(stored.k, raw.k.index(slot), item, places, k_layout, C.D, C.D_PADDED, C)
    if C.DV_PADDED != C.D_PADDED:
        places = _find(item, block, pages.v_N, gl.SliceLayout(1, v_layout), C)
    _copy(stored.v, raw.v.index(slot), item, places, v_layout, C.DV, C.DV_PADDED, C)
    if C.OF_TOKENS:
        of_tokens = _find(item, block, pages.scale_N, _scale_layout(C), C)
        _copy_async(raw.k_scale.index(slot), _rows(stored.k_scale, item, of_tokens, 1), of_tokens.inside_N)
        _copy_async(raw.v_scale.index(slot), _rows(stored.v_scale, item, of_tokens, 1), of_tokens.inside_N)
    async_copy.commit_group()
    is_first = (block == last_block(item.keys, C)).to(gl.int32)
    pages = _all_pages(item, block - C.BLOCK_N, raw.k.dtype, C)
    return Waiting(1, is_first, item.q_begin, item.q_count, item.first_head, pages)


@gluon.constexpr_function
def _keys_of_a_part(C, dim):
    """Of what is converted at a time: with fp8 32 numbers for a thread of eight warps, 64 for one of four; else half as many. Where there
    are registers, all at once: the warps wait for each other after each part."""
    return min(C.BLOCK_N, (16384 if C.CONSUMERS == 1 else 8192 if C.FP8 else 4096) // dim)


@gluon.jit
def _convert_part(
    raw, scale, block, SATURATED: gl.constexpr, BEGIN: gl.constexpr, KEYS: gl.constexpr, PADDED: gl.constexpr, C: gl.constexpr
):
    """Writes the keys of a block from BEGIN on as consumers expect them."""
    # Eight threads write 128 bytes of a row, one after another: no two to the same bank.
    layout: gl.constexpr = _layout(8, PADDED, C)
    stored_ND = raw.slice(BEGIN, KEYS).load(layout)
    if C.HALF:
        x_ND = in_half(stored_ND, C.FP8, SATURATED)
    else:
        x_ND = meant(stored_ND, C.FP8, True)
        if C.OF_TOKENS:
            x_ND = x_ND * scale.slice(BEGIN, KEYS).load(gl.SliceLayout(1, layout))[:, None]
        x_ND = in_dtype(x_ND, block.dtype)
    block.slice(BEGIN, KEYS).store(x_ND)


@gluon.jit
def _convert(i, raw, scale, channel, SATURATED: gl.constexpr, PADDED: gl.constexpr, C: gl.constexpr):
    """Puts the ``i``-th block of K or of V where the consumers expect it, and says so."""
    BLOCK_N: gl.constexpr = C.BLOCK_N
    STAGES: gl.constexpr = C.STAGES
    slot = i % C.RAW
    wait_empty(channel, i, STAGES)
    block = channel.smem.index(i % STAGES).reshape([BLOCK_N, PADDED])
    KEYS: gl.constexpr = _keys_of_a_part(C, PADDED)
    for part in gl.static_range(BLOCK_N // KEYS):
        _convert_part(raw.index(slot), scale.index(slot), block, SATURATED, part * KEYS, KEYS, PADDED, C)
    fence_async_shared()
    mbarrier.arrive(channel.full.index(i % STAGES), count=1)


@gluon.jit
def _finish(brought, i, waiting, sources, channels, C: gl.constexpr):
    """Hands the consumers the ``i``-th block, whose bytes are there, and the queries that come with it."""
    raw = sources.k.raw
    # As fp16 queries have it of all keys.
    SATURATED: gl.constexpr = channels.q.smem.dtype == gl.float16
    _convert(i, raw.k, raw.k_scale, channels.k, SATURATED, C.D_PADDED, C)
    if C.Q_TMA:  # noqa: SIM102, as this one is for the compiler
        # After the first keys, which need not wait until the warpgroups are done with the last queries. Those are done with only when
        # all blocks before this one have been handed over.
        if waiting.is_first > 0:
            brought = bring_queries(brought, waiting, sources, channels.q, C)
    _convert(i, raw.v, raw.v_scale, channels.v, SATURATED, C.DV_PADDED, C)
    return brought


@gluon.jit
def finish_stored(brought, waiting, sources, channels, C: gl.constexpr):
    """Hands over the block that is waiting, if there is one; none is then."""
    if waiting.there > 0:
        async_copy.wait_group(0)
        brought = _finish(brought, brought.blocks - 1, waiting, sources, channels, C)
    return brought, _nothing_waits(waiting)


@gluon.jit
def _nothing_waits(waiting):
    """After a block has been handed over."""
    return Waiting(0, waiting.is_first, waiting.q_begin, waiting.q_count, waiting.first_head, waiting.pages)


@gluon.jit
def bring_stored(brought, waiting, block, item, sources, channels, C: gl.constexpr):
    """Brings one key block: starts to copy its bytes, and hands over the block before it."""
    i = brought.blocks
    if C.RAW == 1:
        brought, waiting = finish_stored(brought, waiting, sources, channels, C)
        new = _start(i, block, item, waiting.pages, sources.k, C)
    else:
        new = _start(i, block, item, waiting.pages, sources.k, C)
        if waiting.there > 0:
            async_copy.wait_group(1)
            brought = _finish(brought, i - 1, waiting, sources, channels, C)
    return Brought(i + 1, brought.queries0, brought.queries1, brought.edges, brought.all_here, brought.here_from), new
