"""``cpattn tune`` on a real GPU: it measures, what it stores is used, and that is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import AttentionCase

import cpattn
from cpattn.cli import tune
from cpattn.cli.main import main
from cpattn.cli.traffic import Shape
from cpattn.cli.tune.target import find_target
from cpattn.cli.tune.timing import gpu_median_seconds
from cpattn.kernels.tile_candidates import ShapeSet, tile_candidates
from cpattn.kernels.tile_shapes import tile_shapes
from cpattn.kernels.tile_table import forget, read_table, shapes_for
from cpattn.kernels.tiles import launch_for

BATCH = [(0, 777), (640, 300), (0, 3), (997, 1), (131, 89)]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the file would be; two candidates, so that little is compiled."""
    reason = cpattn.BACKENDS["triton"].unavailable()
    if reason:
        pytest.skip(reason)
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("CPATTN_TILES", str(path))
    monkeypatch.setattr(tune, "tile_candidates", lambda *arguments: tile_candidates(*arguments)[:2])
    forget()
    yield path
    forget()


def test_the_command_measures(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--head-dim", "64", "--heads", "8", "--kv-heads", "2", "--seconds", "0.1"]) == 0
    text = capsys.readouterr().out
    for word in (torch.cuda.get_device_name(), "long", "decode", "speed", "default"):
        assert word in text
    # One or the other, depending on the GPU.
    assert ("is stored in" in text) == table.exists() == bool(read_table(table))


def test_what_is_stored_is_used_and_exact(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = find_target(Shape(8, 2, 64, 64, "bfloat16", 2), v_in_k=False)
    default, other = tile_candidates(*target.of_kernel)[:2]

    def default_is_slow(variants: Mapping[ShapeSet, Callable[[], Any]], seconds: float) -> dict[ShapeSet, float]:
        times = gpu_median_seconds(variants, seconds)
        return times | {default: 100 * times[default]}

    outcome = tune.tune(target, table, 0.1, default_is_slow)
    assert outcome.failures == {}
    assert read_table(table)[target.key].shapes == outcome.winner == other
    forget()
    assert shapes_for(*target.of_kernel) == other != tile_shapes(*target.of_kernel)

    launched = set()

    def spy(rows: Any, shapes: ShapeSet, *arguments: Any) -> Any:
        launched.add(shapes)
        return launch_for(rows, shapes, *arguments)

    monkeypatch.setattr("cpattn.kernels.ragged_attention.launch_for", spy)
    case = AttentionCase(BATCH, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda")
    for strategy in ("all_gather", "ring"):
        case.check_loopback(cpattn.plan(BATCH, 3, pad_to=16), strategy, "triton")
    assert launched == {other}


def test_longer_work_takes_longer() -> None:
    small, large = (torch.randn(n, n, device="cuda") for n in (512, 4096))
    times = gpu_median_seconds({"small": lambda: small @ small, "large": lambda: large @ large}, seconds=0.05)
    assert 0 < 2 * times["small"] < times["large"] < 1
