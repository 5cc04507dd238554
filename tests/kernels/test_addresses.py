"""Every offset that a caller's stride makes is right where it needs more than 32 bits: one tensor of a launch at a time is laid
out so that its last row, head, page or part is just less or just more than 2**31 elements from its first."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from devices.far_memory import LIMIT, far
from inputs.ragged_inputs import compiled_only, launch_attention, make_rows
from torch import Tensor

from cpattn.attention.ragged_rows import RaggedRows

pytest.importorskip("triton")
from cpattn.kernels.merge import merge_all
from cpattn.kernels.tile_shapes import TileShape, tile_shapes
from cpattn.moves.triton_moves import gather_rows, pack, read_pages, write_pages

Tensors: TypeAlias = "dict[str, Tensor]"

# What is just below the limit is of compiled kernels: the interpreter has one kind of address.
REACH = pytest.mark.parametrize("reach", [pytest.param(LIMIT - 1, marks=compiled_only), LIMIT + 2**20], ids=["below", "above"])


@pytest.fixture(autouse=True)
def memory_goes_back() -> Iterator[None]:
    yield
    # What no page stands behind need not go back at once.
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def check(run: Callable[[Tensors], Tensors], tensors: Tensors, name: str, axis: int, reach: int) -> None:
    """What is computed of a tensor that is stretched is what is computed of the same numbers side by side, to the bit."""
    expected = run({key: x.clone() for key, x in tensors.items()})
    stretched = {key: x.clone() for key, x in tensors.items()} | {name: far(tensors[name], axis, reach)}
    got = run(stretched)
    for key, x in expected.items():
        assert torch.equal(got[key], x), key


# ---- attention

HEADS, KV_HEADS = 4, 2
# Queries and keys: of one tile and block alone, which then has offsets as large inside, and of several.
SIZES = pytest.mark.parametrize("is_small", [True, False], ids=["inside a tile", "over tiles"])
STRETCHED = [(name, axis) for name in ("q", "k", "v", "acc", "lse") for axis in range(2)]
STRETCHED_PAGES = [(name, axis) for name in ("k", "v") for axis in range(3)] + [("page_table", 0), ("page_table", 1)]


def names(stretched: list[tuple[str, int]]) -> list[str]:
    """Test ids."""
    return [f"{name} axis {axis}" for name, axis in stretched]


def kernels(dim: int, device: str) -> list[tuple[TileShape, float]]:
    """Tile shapes, and scales: a negative one has the kernel for Hopper load queries by itself."""
    if device == "cpu":
        return [(TileShape(32, 16, 4, 2), 0.3)]
    capability = torch.cuda.get_device_capability()
    plain = tile_shapes(dim, dim, torch.bfloat16, capability)[0]
    found = [(plain, 0.3), (plain._replace(tma=False), 0.3)]
    if capability == (9, 0):
        hopper = tile_shapes(dim, dim, torch.bfloat16, capability, specialized=True)[0]
        found += [(hopper, 0.3), (hopper, -0.3)]
    return found


def sizes(is_small: bool, device: str) -> tuple[int, int]:
    """Of queries and keys."""
    if device == "cpu":
        return (13, 16) if is_small else (41, 64)
    return (41, 64) if is_small else (301, 320)


def attention_inputs(num_queries: int, num_keys: int, dim: int, device: str) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (num_queries, HEADS, dim), "k": (num_keys, KV_HEADS, dim), "v": (num_keys, KV_HEADS, dim)}
    tensors = {name: torch.randn(shape, generator=generator).bfloat16().to(device) for name, shape in shapes.items()}
    tensors["acc"] = torch.randn(num_queries, HEADS, dim, generator=generator).to(device)
    tensors["lse"] = torch.randn(num_queries, HEADS, generator=generator).to(device)
    return tensors


@REACH
@SIZES
@pytest.mark.parametrize(("name", "axis"), STRETCHED, ids=names(STRETCHED))
def test_attention(name: str, axis: int, is_small: bool, reach: int, device: str) -> None:
    dim = 16 if device == "cpu" else 128
    num_queries, num_keys = sizes(is_small, device)
    # All queries see the last key, and the last one all of them.
    rows = make_rows([num_queries], [0], [num_keys], [num_keys - 1], device)
    for shape, scale in kernels(dim, device):

        def run(x: Tensors, shape: TileShape = shape, scale: float = scale) -> Tensors:
            launch_attention(x["q"], x["k"], x["v"], rows, scale=scale, into=(x["acc"], x["lse"]), shapes=(shape,))
            return {"acc": x["acc"], "lse": x["lse"]}

        check(run, attention_inputs(num_queries, num_keys, dim, device), name, axis, reach)


@REACH
@pytest.mark.parametrize(("name", "axis"), STRETCHED_PAGES, ids=names(STRETCHED_PAGES))
@pytest.mark.parametrize("page_size", [4, 16])
def test_attention_over_pages(page_size: int, name: str, axis: int, reach: int, device: str) -> None:
    """Pages that are smaller than a block of keys, and in the interpreter as large."""
    dim = 16 if device == "cpu" else 128
    # Of three pages or more: a stride between two is itself of more than 32 bits.
    num_queries, num_keys = (33, 48) if device == "cpu" else (41, 64)
    tensors = attention_inputs(num_queries, num_keys, dim, device)
    for key in ("k", "v"):
        tensors[key] = tensors[key].view(-1, page_size, KV_HEADS, dim)
    num_pages = len(tensors["k"])
    tensors["page_table"] = torch.stack([torch.arange(num_pages - 1, -1, -1), torch.arange(num_pages)]).int().to(device)
    q_len, k_len = np.array([1, num_queries - 1]), np.array([num_keys - 14, num_keys - 3])
    diagonal = k_len - q_len + 1
    rows = RaggedRows.build(q_len, np.zeros_like(q_len), k_len, diagonal, device, request=np.array([0, 1]))
    for shape, scale in kernels(dim, device):
        if shape.specialized and page_size % 16:
            continue

        def run(x: Tensors, shape: TileShape = shape, scale: float = scale) -> Tensors:
            over = rows.with_pages(x["page_table"], page_size)
            out, lse = launch_attention(x["q"], x["k"], x["v"], over, scale=scale, shapes=(shape,))
            return {"out": out, "lse": lse}

        check(run, tensors, name, axis, reach)


# ---- what moves and merges rows


def rows_of(device: str, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16().to(device) for name, shape in shapes.items()}


@REACH
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "heads"])
@pytest.mark.parametrize("name", ["message", "k", "v"])
def test_pack(name: str, axis: int, reach: int, device: str) -> None:
    def run(x: Tensors) -> Tensors:
        pack(x["message"], x["k"], x["v"], 7)
        return {"message": x["message"]}

    check(run, rows_of(device, message=(9, 2, 24), k=(7, 2, 8), v=(7, 2, 16)), name, axis, reach)


@REACH
@pytest.mark.parametrize("name", ["out", "source"])
def test_gather(name: str, reach: int, device: str) -> None:
    index = torch.tensor([8, 0, 3, -1, 8], device=device)

    def run(x: Tensors) -> Tensors:
        gather_rows(x["out"], x["source"], index)
        return {"out": x["out"]}

    check(run, rows_of(device, out=(5, 16), source=(9, 16)), name, 0, reach)


MOVED = [
    ("k_pages", 0),
    ("k_pages", 1),
    ("k_pages", 2),
    ("v_pages", 0),
    ("v_pages", 1),
    ("v_pages", 2),
    ("page_table", 0),
    ("page_table", 1),
]
MOVED += [("k", 0), ("k", 1), ("v", 0), ("v", 1)]


@REACH
@pytest.mark.parametrize(("name", "axis"), MOVED, ids=names(MOVED))
@pytest.mark.parametrize("move", [write_pages, read_pages], ids=["write", "read"])
def test_pages(move: Any, name: str, axis: int, reach: int, device: str) -> None:
    request = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32, device=device)
    position = torch.tensor([11, 0, 10, 5, -1], dtype=torch.int32, device=device)

    def run(x: Tensors) -> Tensors:
        move(x["k_pages"], x["v_pages"], x["page_table"], request, position, x["k"], x["v"])
        return x

    tensors = rows_of(device, k_pages=(6, 4, 2, 8), v_pages=(6, 4, 2, 16), k=(5, 2, 8), v=(5, 2, 16))
    tensors["page_table"] = torch.tensor([[5, 0, 3], [4, 1, 2]], dtype=torch.int32, device=device)
    check(run, tensors, name, axis, reach)


MERGED = [(name, axis) for name in ("acc", "acc_lse") for axis in range(2)] + [(name, axis) for name in ("out", "lse") for axis in range(3)]


@REACH
@pytest.mark.parametrize(("name", "axis"), MERGED, ids=names(MERGED))
def test_merge(name: str, axis: int, reach: int, device: str) -> None:
    def run(x: Tensors) -> Tensors:
        merge_all(x["acc"], x["acc_lse"], x["out"], x["lse"])
        return {"acc": x["acc"], "acc_lse": x["acc_lse"]}

    tensors = rows_of(device, acc=(5, 2, 16), acc_lse=(5, 2), out=(3, 5, 2, 16), lse=(3, 5, 2))
    check(run, {key: x if key == "out" else x.float() for key, x in tensors.items()}, name, axis, reach)
