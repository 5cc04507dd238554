"""Every candidate obeys the rules for what a batch's shape is chosen from, and fits by estimate."""

from __future__ import annotations

import pytest
import torch

from cpattn.kernels.tile_candidates import ShapeSet, _needed_bytes, _shared_bytes, tile_candidates
from cpattn.kernels.tile_entry import TileKey, why_not_shapes
from cpattn.kernels.tile_shapes import TileShape, padded_dims, tile_shapes

HEAD_DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (72, 256), (24, 24), (100, 100)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CAPABILITIES = [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_candidates_obey_the_rules(head_dims: tuple[int, int], capability: tuple[int, int], dtype: torch.dtype) -> None:
    for specialized in (False, True):
        key = TileKey(capability, *head_dims, dtype, specialized, False, "3.6")
        sets = tile_candidates(*head_dims, dtype, capability, specialized)
        assert sets[0] == tile_shapes(*head_dims, dtype, capability, specialized)
        assert len(set(sets)) == len(sets) <= 56
        for shapes in sets:
            assert why_not_shapes(shapes, key) is None, shapes
            assert len({shape.specialized for shape in shapes}) == 1
        for shapes in sets[1:]:
            check_fits(shapes, head_dims, capability, dtype)


def check_fits(shapes: ShapeSet, head_dims: tuple[int, int], capability: tuple[int, int], dtype: torch.dtype, v_in_k: bool = False) -> None:
    dims = padded_dims(*head_dims)
    for shape in shapes:
        assert _needed_bytes(shape, dims, dtype.itemsize, v_in_k) <= _shared_bytes(capability)
        # The accumulator alone in half of the registers at most.
        assert shape.block_m * dims.dv <= 128 * 32 * shape.num_warps


@pytest.mark.parametrize("v_in_k", [False, True])
def test_latent_dims_have_candidates_of_one_shape(v_in_k: bool) -> None:
    sets = tile_candidates(576, 512, torch.bfloat16, (9, 0), True, v_in_k)
    assert len(sets) > 1
    for shapes in sets:
        check_fits(shapes, (576, 512), (9, 0), torch.bfloat16, v_in_k)
        assert [shape.block_m for shape in shapes] == [64]
        # K's tail is not read through a descriptor.
        assert not shapes[0].tma
        assert why_not_shapes(shapes, TileKey((9, 0), 576, 512, torch.bfloat16, True, v_in_k, "3.6")) is None


def test_what_a_hopper_gpu_times() -> None:
    """128 rows of q take 32 KiB, and a stage of 128 keys 64: three stages fit 227. The plain kernel has its default alone."""
    sets = tile_candidates(128, 128, torch.bfloat16, (9, 0), specialized=True)
    specialized = {(shapes[0].block_n, shapes[0].num_stages) for shapes in sets if shapes[0].specialized}
    assert specialized == {(128, 2), (128, 3), (64, 2), (64, 3)}
    assert [shapes for shapes in sets if not shapes[0].specialized] == [tile_shapes(128, 128, torch.bfloat16, (9, 0))]
    assert {shapes[0].block_n for shapes in tile_candidates(64, 64, torch.bfloat16, (9, 0), True) if shapes[0].specialized} == {
        64,
        128,
        256,
    }
    # The specialized kernel copies blocks of at least 64 dims, 8 at a time.
    for head_dim in (24, 100):
        assert not any(
            shape.specialized for shapes in tile_candidates(head_dim, head_dim, torch.bfloat16, (9, 0), True) for shape in shapes
        )


def test_what_other_gpus_time() -> None:
    def values(capability: tuple[int, int], name: str) -> set[object]:
        return {getattr(shape, name) for shapes in tile_candidates(128, 128, torch.bfloat16, capability) for shape in shapes}

    for capability in ((8, 0), (9, 0), (10, 0)):
        assert values(capability, "block_n") == {32, 64, 128}
        assert values(capability, "num_warps") == {4, 8}
        assert values(capability, "num_stages") == {1, 2, 3}
    assert values((8, 0), "tma") == {False}
    assert values((9, 0), "tma") == values((10, 0), "tma") == {False, True}
    # A descriptor's rows are multiples of 16 bytes.
    assert not any(shape.tma for shapes in tile_candidates(100, 100, torch.bfloat16, (9, 0))[1:] for shape in shapes)


def test_full_precision_has_small_single_shapes() -> None:
    sets = tile_candidates(128, 128, torch.float32, (9, 0), specialized=True)
    assert sets[0] == (TileShape(32, 32, 8, 2),)
    assert all(len(shapes) == 1 and not shapes[0].tma for shapes in sets)
