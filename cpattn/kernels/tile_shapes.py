"""The tile shapes of the ragged attention kernel: for each head dim, dtype and GPU generation, in code."""

from __future__ import annotations

import os
import warnings
from functools import cache, lru_cache
from typing import NamedTuple

import torch

# Head dims beyond this one are those of multi-head latent attention.
WIDE = 256
# What the kernel for Hopper takes pages in multiples of: it copies that many keys at a time, or more.
PAGE_UNIT = 16
# Numbers in half precision from which on rows in shared memory are all swizzled alike.
_SWIZZLED_ALIKE = 64
# Bytes of shared memory that a program may have on Hopper.
_SHARED_MEMORY = 227 * 1024
# Of them those of barriers, and of what the compiler needs.
_OTHER_BYTES = 1024


class TileShape(NamedTuple):
    """One compiled form of the kernel.

    Attributes:
        block_m: rows of a query tile: (token, query head) pairs. A power of two, at least 16.
        block_n: keys of a key block. A power of two, at least 16.
        num_warps, num_stages: of the compiled kernel, where that is the plain one.
        tma: keys and values come through tensor descriptors (SM90+) where their strides allow it.
        specialized: it is the kernel for SM90 whose warps have roles of their own, where tma applies.
        warpgroups: of that kernel, those that multiply, 64 rows each; key_blocks: how many shared memory holds.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    specialized: bool = False
    warpgroups: int = 2
    key_blocks: int = 2


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a head dim is computed in; tensor cores need at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


class PaddedDims(NamedTuple):
    """The head dims that blocks are computed in. Up to 256 a head dim is padded to the next power of two; beyond that
    q and k are cut in two, as the padding would be too much: 576 is 512 + 64. Where one of K and V is narrower than 64, both are
    padded alike up to there.

    Attributes:
        d: of q and k, without the tail; dv: of v.
        d_tail, d_tail_padded: dims of the tail, and what they are padded to; 0 if there is none.
    """

    d: int
    dv: int
    d_tail: int
    d_tail_padded: int


@lru_cache
def padded_dims(head_dim: int, v_head_dim: int) -> PaddedDims:
    d, dv = padded_head_dim(head_dim), padded_head_dim(v_head_dim)
    main = 1 << (head_dim.bit_length() - 1)
    # In shared memory rows of less than 128 bytes are swizzled in another way. Where blocks of K and V that are swizzled otherwise lie
    # in one place, one after the other, ptxas 12.8 takes the wrong register for the address of V: it reads what is not there.
    alike = min(_SWIZZLED_ALIKE, max(d, dv))
    if head_dim <= WIDE or head_dim == main:
        return PaddedDims(max(d, alike), max(dv, alike), 0, 0)
    return PaddedDims(main, max(dv, alike), head_dim - main, padded_head_dim(head_dim - main))


@lru_cache
def summed_dims(head_dim: int, v_head_dim: int, specialized: bool) -> int:
    """The dims that a kernel computes scores in. That for Hopper leaves out a last quarter of zeros: 192 is not computed as 256.

    >>> summed_dims(192, 128, specialized=True), summed_dims(192, 128, specialized=False), summed_dims(208, 128, specialized=True)
    (192, 256, 256)
    """
    padded = padded_dims(head_dim, v_head_dim).d
    return padded * 3 // 4 if specialized and padded == WIDE and 4 * head_dim <= 3 * padded else padded


@lru_cache
def packs_for(group: int, block_m: int) -> tuple[int, ...]:
    """How many query heads of a group may share a tile of ``block_m`` rows: 1, or as many as divide the group and fit."""
    most = max(pack for pack in range(1, min(group, block_m) + 1) if group % pack == 0)
    return (1,) if most == 1 else (1, most)


@lru_cache
def tile_shapes(
    head_dim: int, v_head_dim: int, dtype: torch.dtype, capability: tuple[int, int], specialized: bool = False, v_in_k: bool = False
) -> tuple[TileShape, ...]:
    """The shapes to choose from, largest ``block_m`` first; ``specialized`` if this Triton has what that kernel needs,
    ``v_in_k`` if V is read from K's blocks.

    All have one ``block_n``, which depends on these arguments alone and never on the batch: the order in which a
    query's keys are summed, and so the bits of its result, are the same in every batch. For the same reason no shape
    has fewer than 64 rows: the compiler then splits a block's keys over the warps, and sums them in another order.
    A single query still costs little in so large a tile, as reading its keys takes longer than the products.
    """
    widest = max(padded_head_dim(head_dim), padded_head_dim(v_head_dim))
    if widest > WIDE:
        # The accumulator takes half of the registers of 8 warps. A block of K takes 72 KiB of shared memory beside q's 72,
        # and one of V 64: two of K fit, but only one of both. On an H200 280 TFLOP/s with V in K, and 175 without.
        return (TileShape(64, 64, 8, 2 if v_in_k else 1),)
    if dtype == torch.float32:
        # Full fp32 products run outside the tensor cores, with operands in registers: larger tiles of wide heads spill.
        return (TileShape(64 if widest <= 64 else 32, 32 if widest <= 128 else 16, 8, 2),)
    # 228 KiB of shared memory a multiprocessor on SM90 and SM100, 164 on SM80, 100 on SM86, SM89 and SM120.
    if capability[0] in (9, 10):
        # It copies 8 elements at a time, and blocks of at least 64.
        suits = min(head_dim, v_head_dim) > 32 and head_dim % 8 == v_head_dim % 8 == 0
        if specialized and capability[0] == 9 and suits:
            block_n = 128 if widest <= 128 else 64
            key_blocks = _key_blocks(padded_dims(head_dim, v_head_dim), block_n)
            return tuple(TileShape(rows, block_n, rows // 16, 2, True, True, key_blocks=key_blocks) for rows in (128, 64))
        if capability[0] == 9 and widest <= 128:
            return TileShape(128, 64, 4, 2, tma=True), TileShape(64, 64, 4, 3, tma=True)
        block_n = 128 if widest <= 128 else 64
        return TileShape(128, block_n, 8, 2, tma=True), TileShape(64, block_n, 4, 2, tma=True)
    large = 128 if widest <= 64 or capability == (8, 0) else 64
    if widest <= 128:
        block_n, stages = 64, 3 if widest <= 64 and capability == (8, 0) else 2
    else:
        block_n, stages = 32, 2 if capability == (8, 0) else 1
    return tuple(TileShape(block_m, block_n, block_m // 16, stages) for block_m in (128, 64) if block_m <= large)


def _key_blocks(dims: PaddedDims, block_n: int) -> int:
    """Of numbers in half precision beside the queries of two warpgroups: 3 where they fit, as with head dims of up to 128. With 2 batches
    of short requests took 1.5% longer on an H100, and long ones as long, or 1% less with a head dim of 64."""
    numbers = 128 * dims.d + 3 * block_n * (dims.d + dims.dv)
    return 3 if 2 * numbers <= _SHARED_MEMORY - _OTHER_BYTES else 2


@lru_cache
def stored_shapes(head_dim: int, v_head_dim: int, dtype: torch.dtype, stored: torch.dtype) -> tuple[TileShape, ...]:
    """The shapes of the kernel for Hopper over keys that are stored in another dtype than q's.

    Tiles of 64 rows, as in decoding, leave one of two warpgroups without work. Over fp8 that one is left out, and its registers go to the
    warps that convert keys, which take longest: 0.93 to 0.96 of the time on an H200, with the same bits.

    >>> [shape.warpgroups for shape in stored_shapes(128, 128, torch.bfloat16, torch.float8_e4m3fn)]
    [2, 1]
    """
    # Their bytes have to fit as well.
    shapes = tile_shapes(head_dim, v_head_dim, dtype, (9, 0), specialized=True)
    whole, half = (shape._replace(key_blocks=2) for shape in shapes)
    return whole, half._replace(warpgroups=1) if stored.itemsize == 1 and padded_dims(head_dim, v_head_dim).dv <= 128 else half


@cache
def warn_of_tile_file() -> None:
    """Says once a process that a file of tuned shapes, which earlier releases read, is not read."""
    path = os.environ.get("CPATTN_TILES")
    if path:
        warnings.warn(
            f"CPATTN_TILES={path} is ignored: tile shapes come from cpattn's own table alone; unset it. "
            "benchmarks/tune_tiles.py times others, and prints a line for that table",
            stacklevel=2,
        )


@lru_cache
def has_specialized(
    head_dim: int, v_head_dim: int, dtype: torch.dtype, capability: tuple[int, int], page_size: int, stored: torch.dtype | None = None
) -> bool:
    """Whether the kernel for Hopper could serve, with a Triton that has what it needs; ``page_size`` is 0 without pages, ``stored`` the
    dtype of keys, if that is not q's."""
    if not tile_shapes(head_dim, v_head_dim, dtype, capability, specialized=True)[0].specialized:
        return False
    if stored is None or stored == dtype:
        return page_size % PAGE_UNIT == 0
    # It copies 16 bytes at a time, from pages of any size.
    is_whole = head_dim * stored.itemsize % 16 == v_head_dim * stored.itemsize % 16 == 0
    return is_whole and stored_blocks(head_dim, v_head_dim, stored) > 0


def stored_blocks(head_dim: int, v_head_dim: int, stored: torch.dtype) -> int:
    """Of how many key blocks the kernel for Hopper has room for the bytes of stored numbers, beside the blocks that they become: up to 2,
    so that one is copied while another is converted.

    >>> [stored_blocks(dim, dim, torch.float8_e4m3fn) for dim in (128, 256)], stored_blocks(128, 128, torch.bfloat16)
    ([2, 1], 1)
    """
    shape = stored_shapes(head_dim, v_head_dim, torch.bfloat16, stored)[0]
    dims = padded_dims(head_dim, v_head_dim)
    of_a_block = shape.block_n * (dims.d + dims.dv)
    # Each of them and its scales; the converted ones; a tile's queries.
    each = of_a_block * stored.itemsize + 2 * 4 * shape.block_n
    return min(2, (_SHARED_MEMORY - 2 * (shape.key_blocks * of_a_block + shape.block_m * dims.d) - _OTHER_BYTES) // each)
