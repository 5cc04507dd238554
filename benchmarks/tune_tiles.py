"""What the table of tile shapes is chosen by: times candidates for a head dim and dtype on this GPU, and prints the line for
cpattn/kernels/tile_shapes.py of the fastest.

Most of its minutes go into compiling. Shapes of another block_n sum a query's keys in another order, so a line that goes into the
table changes the last bits of results. Run the tests of tests/kernels with it: they check the error and that bits do not depend on
the batch.

PYTHONPATH=. python benchmarks/tune_tiles.py [--head-dim 128] [--v-head-dim 128] [--dtype bfloat16] [--heads 32] [--kv-heads 8]
    [--v-in-k] [--rounds 7]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from gpu_timing import gpu_machine, gpu_seconds
from torch import Tensor

from cpattn.kernels.ragged_attention import ragged_attention, specialized_kernel
from cpattn.kernels.tile_shapes import WIDE, PaddedDims, TileShape, padded_dims, tile_shapes
from cpattn.keys import Keys
from cpattn.options import AttentionOptions
from cpattn.spans import Spans
from cpattn.testing import relative_rmse

# Shapes that a batch's is chosen from, the largest block_m first.
ShapeSet: TypeAlias = tuple[TileShape, ...]

_RAGGED = np.random.default_rng(0).integers([0, 1], [4096, 400], (64, 2))
# (prefix_len, extend_len) of each request: one rank's attention after an all-gather.
BATCHES = {
    "1 x 16k": np.array([(0, 16384)]),
    "8 x (4k + 512)": np.array([(4096, 512)] * 8),
    "64 ragged": _RAGGED,
    "32 x (8k + 1)": np.array([(8191, 1)] * 32),
}
# The best of many by one measurement is partly the luckiest: so many are timed again, and only that counts.
FINALISTS = 4
# Of a thread's 255 registers, those that the accumulator and a block's scores may take; more would spill.
_REGISTERS = 192
# Multiply-adds of a thread for a block's scores in full precision; with more, unrolling them takes a compiler minutes.
_FULL_PRECISION_PRODUCTS = 512


class Sizes(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    v_in_k: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("heads", 32), ("kv-heads", 8), ("head-dim", 128), ("v-head-dim", None), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--v-in-k", action="store_true", help="v is k's first columns (multi-head latent attention)")
    options = parser.parse_args()
    v_head_dim = options.head_dim if options.v_head_dim is None else options.v_head_dim
    dtype = getattr(torch, options.dtype)
    sizes = Sizes(options.heads, options.kv_heads, options.head_dim, v_head_dim, dtype, options.v_in_k)
    capability = torch.cuda.get_device_capability()
    specialized = specialized_kernel(torch.device("cuda")) is not None
    default = tile_shapes(options.head_dim, v_head_dim, dtype, capability, specialized, options.v_in_k)
    print(gpu_machine())
    runs = batches(sizes)
    able = [shapes for shapes in dict.fromkeys([default, *candidates(sizes, capability, default)]) if runs_here(shapes, runs)]
    first = time_all(able, runs, options.rounds)
    finalists = sorted((shapes for shapes in able if shapes != default), key=partial(speed, first, default), reverse=True)[:FINALISTS]
    again = time_all([default, *finalists], runs, options.rounds)
    show(first, default, "all, once")
    show(again, default, "the fastest, again")
    results = {shapes: runs["64 ragged"](shapes)[0] for shapes in (default, *finalists)}
    for shapes in finalists:
        print(f"{in_words(shapes)}: relative RMSE to the table's {relative_rmse(results[shapes], results[default]):.1e}")
    best = max(finalists, key=partial(speed, again, default), default=default)
    print(f"\nfor compute capability {capability}, {options.dtype}, head dims {options.head_dim} and {v_head_dim}", end="")
    print(f"{', v in k' * options.v_in_k}{', specialized' * specialized}: {speed(again, default, best) - 1:+.1%} beside the table's")
    print(f"return {', '.join(map(repr, best))}{',' * (len(best) == 1)}")


def candidates(sizes: Sizes, capability: tuple[int, int], default: ShapeSet) -> Iterator[ShapeSet]:
    """Sets of shapes worth timing. All of a set have one block_n; in half precision none has fewer than 64 rows, or a warp fewer
    than 16, since the compiler would then split a block's keys over the warps."""
    dims = padded_dims(sizes.head_dim, sizes.v_head_dim)
    widest = max(dims.d, dims.dv)
    if sizes.dtype == torch.float32:
        for block_m, block_n, warps, stages in product((64, 32), (32, 16), (8, 4), (2, 1)):
            if block_m * block_n * widest // (warps * 32) <= _FULL_PRECISION_PRODUCTS:
                yield (TileShape(block_m, block_n, warps, stages),)
    elif default[0].specialized:
        # Of the plain kernel not even the best shape comes near.
        for block_n, stages in product((64, 128, 256), (2, 3)):
            yield tuple(TileShape(rows, block_n, rows // 16, 2, True, True, key_blocks=stages) for rows in (128, 64))
    else:
        # A descriptor's rows are multiples of 16 bytes, and it does not serve q and k that are cut in two.
        may_tma = capability >= (9, 0) and sizes.head_dim % 8 == sizes.v_head_dim % 8 == 0 and not dims.d_tail
        rows = [((64, 8),)] if widest > WIDE else [((128, 4), (64, 4)), ((128, 8), (64, 4)), ((64, 4),)]
        for rows_warps, block_n, stages, tma in product(rows, (32, 64, 128), (1, 2, 3), (True, False) if may_tma else (False,)):
            shapes = tuple(TileShape(block_m, block_n, warps, stages, tma) for block_m, warps in rows_warps)
            if all(fits_registers(shape, dims) for shape in shapes):
                yield shapes


def fits_registers(shape: TileShape, dims: PaddedDims) -> bool:
    return shape.block_m * (dims.dv + shape.block_n) // (shape.num_warps * 32) <= _REGISTERS


def batches(sizes: Sizes) -> dict[str, Callable[[ShapeSet], tuple[Tensor, Tensor]]]:
    """Of each batch, what launches the kernel with the shape that it chooses from these."""
    torch.manual_seed(0)
    num_queries = max(int(batch[:, 1].sum()) for batch in BATCHES.values())
    num_keys = max(int(batch.sum()) for batch in BATCHES.values())
    q = torch.randn(num_queries, sizes.heads, sizes.head_dim, dtype=sizes.dtype, device="cuda")
    # K and V as they lie after an all-gather: in one message.
    width = sizes.head_dim if sizes.v_in_k else sizes.head_dim + sizes.v_head_dim
    kv = torch.randn(num_keys, sizes.kv_heads, width, dtype=sizes.dtype, device="cuda")
    k = kv[..., : sizes.head_dim]
    v = k[..., : sizes.v_head_dim] if sizes.v_in_k else kv[..., sizes.head_dim :]
    runs: dict[str, Callable[[ShapeSet], tuple[Tensor, Tensor]]] = {}
    for name, batch in BATCHES.items():
        extend, total = batch[:, 1], batch.sum(1)
        spans = Spans.build(extend, np.cumsum(total) - total, total, batch[:, 0] + 1, torch.device("cuda"))
        runs[name] = partial(attend, q[: int(extend.sum())], Keys(k[: int(total.sum())], v[: int(total.sum())]), spans)
    return runs


def attend(q: Tensor, keys: Keys, spans: Spans, shapes: ShapeSet) -> tuple[Tensor, Tensor]:
    return ragged_attention(q, keys, spans, AttentionOptions(q.shape[2] ** -0.5), shapes=shapes)


def runs_here(shapes: ShapeSet, runs: dict[str, Callable[[ShapeSet], Any]]) -> bool:
    """Whether the shapes compile and launch; what does not fit a multiprocessor does not."""
    try:
        for run in runs.values():
            run(shapes)
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{in_words(shapes)}: left out: {' '.join(f'{type(error).__name__}: {error}'.split())[:160]}", flush=True)
        return False
    return True


def time_all(
    sets: list[ShapeSet], runs: dict[str, Callable[[ShapeSet], tuple[Tensor, Tensor]]], rounds: int
) -> dict[ShapeSet, dict[str, float]]:
    """Seconds of each set, by batch: medians of CUDA graphs, interleaved."""
    found: dict[ShapeSet, dict[str, float]] = {shapes: {} for shapes in sets}
    for batch, run in runs.items():
        times = gpu_seconds({in_words(shapes): partial(run, shapes) for shapes in sets}, rounds)
        for shapes in sets:
            found[shapes][batch] = float(np.median(times[in_words(shapes)]))
    return found


def speed(times: dict[ShapeSet, dict[str, float]], default: ShapeSet, shapes: ShapeSet) -> float:
    """Beside that of the table's shapes: the geometric mean over the batches."""
    return float(np.exp(np.mean([np.log(times[default][batch] / seconds) for batch, seconds in times[shapes].items()])))


def show(times: dict[ShapeSet, dict[str, float]], default: ShapeSet, title: str) -> None:
    print(f"\n{title}: ms, medians; rows x keys of a tile, warps, stages\n| shapes | {' | '.join(BATCHES)} | speed |")
    print("|---" * (len(BATCHES) + 2) + "|")
    for shapes in sorted(times, key=partial(speed, times, default), reverse=True):
        name = in_words(shapes) + " (the table's)" * (shapes == default)
        cells = [f"{times[shapes][batch] * 1e3:,.3f}" for batch in BATCHES]
        print(f"| {name} | {' | '.join(cells)} | {speed(times, default, shapes):.3f} |", flush=True)


def in_words(shapes: ShapeSet) -> str:
    columns = zip(
        *((shape.block_m, shape.num_warps, shape.key_blocks if shape.specialized else shape.num_stages) for shape in shapes), strict=True
    )
    rows, warps, stages = ("/".join(map(str, dict.fromkeys(column))) for column in columns)
    kind = " specialized" if shapes[0].specialized else " tma" if shapes[0].tma else ""
    return f"{rows}x{shapes[0].block_n} w{warps} s{stages}{kind}"


if __name__ == "__main__":
    main()
