"""The table of tile shapes obeys the rules by which a query's bits do not depend on its batch; no file stands in its place."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.kernels.tile_shapes import WIDE, stored_shapes, tile_shapes, warn_of_tile_file

HEAD_DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (72, 256), (24, 24), (100, 100), (576, 512)]
CAPABILITIES = [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_the_table_obeys_the_rules(head_dims: tuple[int, int], capability: tuple[int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for specialized in (False, True):
            for v_in_k in (False, True):
                check_rules(head_dims, capability, dtype, specialized, v_in_k)


def check_rules(head_dims: tuple[int, int], capability: tuple[int, int], dtype: torch.dtype, specialized: bool, v_in_k: bool) -> None:
    shapes = tile_shapes(*head_dims, dtype, capability, specialized, v_in_k)
    rows = [shape.block_m for shape in shapes]
    assert rows == sorted(set(rows), reverse=True)
    assert len({shape.block_n for shape in shapes}) == 1
    assert len({shape.specialized for shape in shapes}) == 1
    for shape in shapes:
        for size, least in ((shape.block_m, 16), (shape.block_n, 16), (shape.num_warps, 1)):
            assert size >= least
            assert size & (size - 1) == 0
        assert 1 <= shape.num_stages <= 8
        # Products of fewer rows are split over the keys.
        assert dtype == torch.float32 or shape.block_m >= 64
        assert len(shapes) == 1 or (dtype != torch.float32 and shape.num_warps * 16 <= shape.block_m)
        # The accumulator alone in half of the registers at most.
        assert shape.block_m * max(head_dims[1], 16) <= 128 * 32 * shape.num_warps
        assert not shape.tma or capability >= (9, 0)
        if shape.specialized:
            assert specialized
            assert shape.tma
            assert shape.block_m in (128, 64)
            assert max(head_dims) <= WIDE


@pytest.mark.parametrize(
    ("head_dims", "key_blocks"),
    [((64, 64), 3), ((80, 80), 3), ((128, 128), 3), ((192, 128), 3), ((72, 256), 3), ((256, 64), 3), ((192, 192), 2), ((256, 256), 2)],
    ids=str,
)
def test_the_kernel_for_hopper_keeps_as_many_key_blocks_as_fit(head_dims: tuple[int, int], key_blocks: int) -> None:
    assert {shape.key_blocks for shape in tile_shapes(*head_dims, torch.bfloat16, (9, 0), specialized=True)} == {key_blocks}
    for stored in (torch.float8_e4m3fn, torch.float16):
        # Whose bytes lie there, too.
        assert {shape.key_blocks for shape in stored_shapes(*head_dims, torch.bfloat16, stored)} == {2}


def test_a_file_of_tuned_shapes_is_named_once_as_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v = (torch.randn(3, 1, 16, device=device) for _ in range(3))

    def attend_twice() -> None:
        for _ in range(2):
            rows = cpattn.RaggedRows.build(np.array([3]), np.array([0]), np.array([3]), np.array([1]), device)
            cpattn.BACKENDS["triton"].run(q, k, v, rows, AttentionOptions(0.25), q.dtype)

    warn_of_tile_file.cache_clear()
    monkeypatch.setenv("CPATTN_TILES", "/there/tiles.json")
    with pytest.warns(UserWarning, match=r"CPATTN_TILES=/there/tiles\.json is ignored: .* unset it") as caught:
        attend_twice()
    assert len(caught) == 1
    # Empty, it used to turn the file off.
    warn_of_tile_file.cache_clear()
    monkeypatch.setenv("CPATTN_TILES", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend_twice()
