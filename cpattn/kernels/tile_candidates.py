"""Which tile shapes are worth timing for a head dim, dtype and GPU generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import TypeAlias

import torch

from cpattn.kernels.tile_shapes import WIDE, PaddedDims, TileShape, padded_dims, tile_shapes

# Shapes that a batch's is chosen from, the largest block_m first.
ShapeSet: TypeAlias = tuple[TileShape, ...]

_ROWS = 64
_THREADS = 32
# Of a thread's 255 registers, those that the accumulator and a block's scores may take; more would spill.
_REGISTERS = 192
# Multiply-adds of a thread for the scores of a block in full precision, as many as the default shapes have: with more,
# operands spill, and unrolling them takes a compiler minutes.
_FULL_PRECISION_PRODUCTS = 512


def tile_candidates(
    head_dim: int, v_head_dim: int, dtype: torch.dtype, capability: tuple[int, int], specialized: bool = False, v_in_k: bool = False
) -> list[ShapeSet]:
    """The sets of shapes to time, the default one first; the arguments are those of
    :func:`cpattn.kernels.tile_shapes.tile_shapes`, whose rules each set obeys.

    - Half precision: tiles of 128 and 64 rows, or of 64 alone; blocks of 32, 64 or 128 keys; 4 or 8 warps; 1 to 3 stages;
      from SM90 on with tensor descriptors and without.
    - Where the specialized kernel is: its tiles of 128 and 64 rows, blocks of 64 or 128 keys (to head dim 64 also 256), 2 or
      3 stages; of the plain kernel only the default, as its best shape is far behind (benchmarks/results/tune_attention.md
      beside attention_gpu.md).
    - fp32: one shape of 32 or 64 rows and 16 or 32 keys.

    What can not fit a multiprocessor by estimate is left out: shared memory for q and for each stage's K and V, registers
    for the accumulator and the scores.
    """
    default = tile_shapes(head_dim, v_head_dim, dtype, capability, specialized, v_in_k)
    dims = padded_dims(head_dim, v_head_dim)
    found: Iterable[ShapeSet]
    if dtype == torch.float32:
        found = _full_precision(dims)
    elif default[0].specialized:
        found = [*_specialized(dims), tile_shapes(head_dim, v_head_dim, dtype, capability, v_in_k=v_in_k)]
    else:
        # A descriptor's rows are multiples of 16 bytes, and it does not serve q and k that are cut in two.
        may_tma = capability >= (9, 0) and head_dim % 8 == v_head_dim % 8 == 0 and not dims.d_tail
        found = _plain(dims, may_tma)
    most = _shared_bytes(capability)
    fit = [shapes for shapes in found if max(_needed_bytes(shape, dims, dtype.itemsize, v_in_k) for shape in shapes) <= most]
    return list(dict.fromkeys([default, *fit]))


def _specialized(dims: PaddedDims) -> Iterator[ShapeSet]:
    for block_n, stages in product((64, 128, 256), (2, 3)):
        if block_n < 256 or max(dims.d, dims.dv) <= 64:
            yield TileShape(128, block_n, 8, stages, True, True), TileShape(64, block_n, 4, stages, True, True)


def _plain(dims: PaddedDims, may_tma: bool) -> Iterator[ShapeSet]:
    # Of tiles of head dims beyond WIDE, only those of 64 rows fit, and these need the registers of 8 warps.
    wide = max(dims.d, dims.dv) > WIDE
    sets = [((_ROWS, 8),)] if wide else [((128, 4), (_ROWS, 4)), ((128, 8), (_ROWS, 4)), ((_ROWS, 4),)]
    for rows, block_n, stages, tma in product(sets, (32, 64, 128), (1, 2, 3), (True, False) if may_tma else (False,)):
        shapes = tuple(TileShape(block_m, block_n, warps, stages, tma) for block_m, warps in rows)
        if max(shape.block_m * (dims.dv + block_n) // (shape.num_warps * _THREADS) for shape in shapes) <= _REGISTERS:
            yield shapes


def _full_precision(dims: PaddedDims) -> Iterator[ShapeSet]:
    for block_m, block_n, warps, stages in product((64, 32), (32, 16), (8, 4), (2, 1)):
        if block_m * block_n * max(dims.d, dims.dv) // (warps * _THREADS) <= _FULL_PRECISION_PRODUCTS:
            yield (TileShape(block_m, block_n, warps, stages),)


def _needed_bytes(shape: TileShape, dims: PaddedDims, itemsize: int, v_in_k: bool) -> int:
    """Of shared memory, by estimate: a tile of q, and K and V of each stage. The specialized kernel has room for 128 rows."""
    d = dims.d + dims.d_tail_padded
    rows = 2 * _ROWS if shape.specialized else shape.block_m
    block = shape.block_n * (d if v_in_k and not shape.tma else d + dims.dv)
    return (rows * d + shape.num_stages * block) * itemsize


def _shared_bytes(capability: tuple[int, int]) -> int:
    """Of shared memory that a program may have (CUDA programming guide, "Technical Specifications per Compute Capability")."""
    if capability[0] in (9, 10):
        return 227 * 1024
    return (163 if capability in ((8, 0), (8, 7)) else 99) * 1024
