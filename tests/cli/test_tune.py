"""``cpattn tune``: what it refuses, how it chooses, and what it prints and stores; the times are given, there being no GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cpattn
from cpattn.cli import tune
from cpattn.cli.main import main
from cpattn.cli.traffic import Shape
from cpattn.cli.tune import batches, exactness
from cpattn.cli.tune.choice import Outcome, choose_fastest
from cpattn.cli.tune.exactness import Exactness
from cpattn.cli.tune.target import Target, check_v_in_k
from cpattn.kernels.tile_candidates import ShapeSet
from cpattn.kernels.tile_entry import TileKey
from cpattn.kernels.tile_shapes import TileShape
from cpattn.kernels.tile_table import read_table, store

DEFAULT: ShapeSet
FAST: ShapeSet
FASTER: ShapeSet
SLOW: ShapeSet
DEFAULT, FAST, FASTER, SLOW = ((TileShape(64, block_n, 4, 2),) for block_n in (16, 32, 64, 128))


class FakeTimer:
    """Each set takes what is written down for it; ``later`` holds from the second measurement on."""

    def __init__(self, times: dict[ShapeSet, list[float]], later: dict[ShapeSet, list[float]] | None = None) -> None:
        self.times, self.later, self.asked = times, later or {}, list[list[ShapeSet]]()

    def __call__(self, variants: Mapping[ShapeSet, Callable[[], Any]], seconds: float) -> dict[ShapeSet, float]:
        batch, again = len(self.asked) % 2, len(self.asked) >= 2
        self.asked.append(list(variants))
        assert seconds == 2.5
        for run in variants.values():
            run()
        now = self.times | self.later if again else self.times
        return {shapes: now[shapes][batch] for shapes in variants}


def choose(
    timer: FakeTimer, failing: Mapping[ShapeSet, Exception] | None = None, wrong: Mapping[ShapeSet, str] | None = None, **options: Any
) -> Outcome:
    def run(shapes: ShapeSet) -> None:
        if failing and shapes in failing:
            raise failing[shapes]

    runs = {"long": run, "decode": run}
    return choose_fastest(list(timer.times), runs, 10.0, timer, options.get("wait", lambda: None), (wrong or {}).get)


# Choosing.


def test_the_fastest_by_geometric_mean_wins() -> None:
    timer = FakeTimer({DEFAULT: [1.0, 4.0], FAST: [0.5, 7.0], FASTER: [0.9, 3.0], SLOW: [0.9, 8.0]})
    outcome = choose(timer)
    assert outcome.winner == FASTER
    assert outcome.relative(FAST) == pytest.approx((2 * 4 / 7) ** 0.5)
    assert outcome.gain == pytest.approx((1 / 0.9 * 4 / 3) ** 0.5 - 1)
    assert outcome.failures == {}


def test_what_was_only_lucky_does_not_win() -> None:
    """The second measurement counts."""
    times = {DEFAULT: [1.0, 1.0], FAST: [0.9, 0.9], FASTER: [0.5, 0.5]}
    timer = FakeTimer(times, later={DEFAULT: [1.0, 1.0], FAST: [0.9, 0.9], FASTER: [1.1, 1.1]})
    assert choose(timer).winner == FAST


def test_only_the_best_are_timed_again() -> None:
    sets: list[ShapeSet] = [(TileShape(64, 64, 4, stages),) for stages in range(1, 9)]
    timer = FakeTimer({shapes: [1 - 0.01 * i] * 2 for i, shapes in enumerate(sets)})
    assert choose(timer).winner == sets[-1]
    assert timer.asked == [sets, sets, [sets[0], *sets[:-5:-1]], [sets[0], *sets[:-5:-1]]]


@pytest.mark.parametrize(("time", "wins"), [(1.0, False), (0.981, False), (0.979, True)])
def test_less_than_two_percent_is_noise(time: float, wins: bool) -> None:
    outcome = choose(FakeTimer({DEFAULT: [1.0, 1.0], FAST: [time, time]}))
    assert outcome.winner == (FAST if wins else DEFAULT)
    assert outcome.best_other == FAST
    assert (outcome.gain > 0) == wins


def test_what_fails_is_left_out_with_its_reason() -> None:
    timer = FakeTimer({DEFAULT: [1.0, 1.0], FAST: [0.9, 0.9], FASTER: [0.5, 0.5]})
    outcome = choose(timer, failing={FASTER: RuntimeError("out of resource:\n  shared memory" + "." * 500)})
    assert outcome.winner == FAST
    assert outcome.failures[FASTER].startswith("RuntimeError: out of resource: shared memory...")
    assert len(outcome.failures[FASTER]) == 160
    assert all(FASTER not in asked for asked in timer.asked)


def test_what_is_fast_but_wrong_does_not_win() -> None:
    timer = FakeTimer({DEFAULT: [1.0, 1.0], FAST: [0.9, 0.9], FASTER: [0.5, 0.5]})
    outcome = choose(timer, wrong={FASTER: "its bits depend on the batch"})
    assert outcome.winner == outcome.best_other == FAST
    assert outcome.failures == {FASTER: "its bits depend on the batch"}
    assert choose(FakeTimer(timer.times), wrong={FASTER: "wrong", FAST: "wrong"}).winner == DEFAULT


def test_without_the_default_nothing_is_compared() -> None:
    timer = FakeTimer({DEFAULT: [1.0, 1.0], FAST: [0.9, 0.9]})
    with pytest.raises(cpattn.CPError, match="the default shapes do not run here: RuntimeError: no kernel image"):
        choose(timer, failing={DEFAULT: RuntimeError("no kernel image")})


def test_a_broken_device_ends_it() -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    timer = FakeTimer({DEFAULT: [1.0, 1.0]})
    with pytest.raises(cpattn.CPError, match=r"64x16 w4 s2 has broken the device, .*: RuntimeError: CUDA error: an illegal memory access"):
        choose(timer, wait=broken)


# What is refused.


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("cpattn tune: ")
    return error


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There seems to be a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("cpattn.attention.triton.capability", lambda device: (9, 0))


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "tuning needs a CUDA device, as it times kernels on it; torch finds none here" in refusal(capsys)


@pytest.mark.usefixtures("with_gpu")
def test_without_triton(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpattn.attention.triton.missing", lambda module, fix: f"{module} is not installed; {fix}")
    assert "triton is not installed; pip install 'cpattn[triton]'" in refusal(capsys)


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head-dim", "512"], "backend triton can not serve this: it has head dims up to 256, not 512, but for half precision"),
        (["--head-dim", "600"], "it has head dims up to 576"),
        (["--head-dim", "512", "--dtype", "float32"], "it has head dims up to 256, not 512"),
        (["--head-dim", "0"], "--head-dim 0: it must be at least 1"),
        (["--heads", "6", "--kv-heads", "4"], "query heads must be a multiple of key/value heads"),
        (["--seconds", "0"], "--seconds 0.0: it must be above 0"),
        (["--seconds", "nan"], "--seconds nan: it must be above 0"),
        (["--head-dim", "192", "--v-head-dim", "128", "--v-in-k"], "--v-in-k with head dims 192 and 128: V is read from K's blocks only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_tuned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    if arguments == ["--head-dim", "512"]:
        monkeypatch.setattr("cpattn.attention.triton.capability", lambda device: (8, 0))
    assert message in refusal(capsys, *arguments)


@pytest.mark.usefixtures("with_gpu")
def test_the_interpreter_is_not_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert "unset TRITON_INTERPRET" in refusal(capsys)


def test_there_must_be_a_place_for_the_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "find_target", lambda *_: target())
    assert "nowhere to store what is found, as CPATTN_TILES is empty" in refusal(capsys)
    (tmp_path / "tiles.json").write_text("{")
    monkeypatch.setenv("CPATTN_TILES", str(tmp_path / "tiles.json"))
    assert "is not JSON" in refusal(capsys)


def test_v_in_k_is_for_dims_of_one_size() -> None:
    check_v_in_k(Shape(16, 1, 576, 512, "bfloat16", 2), True)
    check_v_in_k(Shape(16, 1, 192, 128, "bfloat16", 2), False)
    with pytest.raises(cpattn.CPError, match="--v-in-k with head dims 64 and 128"):
        check_v_in_k(Shape(16, 1, 64, 128, "bfloat16", 2), True)


# The whole command, in Triton's interpreter.


def target(v_in_k: bool = False) -> Target:
    dims = (32, 32) if v_in_k else (32, 16)
    key = TileKey((9, 0), *dims, torch.float32, False, v_in_k, "3.6")
    return Target(torch.device("cpu"), Shape(2, 1, *dims, "float32", 4), key)


SETS: list[ShapeSet] = [(TileShape(64, 32, 8, 2),), (TileShape(64, 64, 8, 2),), (TileShape(32, 64, 4, 1),)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little enough for the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    pytest.importorskip("triton")
    # A BLAS product of a row depends on where in the matrix it lies, which tensor cores' does not.
    monkeypatch.setattr("triton.runtime.interpreter.np.matmul", lambda a, b, dtype: np.einsum("mk,kn->mn", a, b, dtype=dtype))
    monkeypatch.setattr(tune, "tile_candidates", lambda *_: SETS)
    monkeypatch.setattr(batches, "BATCHES", {"long": ("a long one", [(0, 40)]), "decode": ("one token", [(70, 1), (3, 1)])})
    monkeypatch.setattr(exactness, "_BATCH", np.array([(20, 13), (0, 30), (77, 1), (6, 3)]))
    monkeypatch.setattr(exactness, "_WINDOW", 20)


@pytest.mark.usefixtures("small")
def test_the_winner_is_stored(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    timer = FakeTimer({SETS[0]: [1e-3, 2e-3], SETS[1]: [1.01e-3, 2.1e-3], SETS[2]: [0.9e-3, 1.8e-3]})
    outcome = tune.tune(target(), path, 10.0, timer)
    assert outcome.failures == {}
    assert outcome.winner == SETS[2]
    entry = read_table(path)[target().key]
    assert entry.shapes == SETS[2]
    assert entry.gain == pytest.approx(1 / 0.9 - 1, abs=1e-4)
    assert entry.device == "cpu"
    text = capsys.readouterr().out
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100 + len(str(path))
    for word in (
        "32x64 w4 s1",
        "0.900",
        "1.111",
        "default",
        "a long one",
        "11.1% faster than the default",
        f"stored in {path}",
        "all ranks",
    ):
        assert word in text


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("time", "message"),
    [(0.99, "the default shapes stay: 64x64 w8 s2 is 1.0% faster, and below 2%"), (1.1, "the default shapes are the fastest")],
)
def test_where_the_default_wins_nothing_is_stored(capsys: pytest.CaptureFixture[str], tmp_path: Path, time: float, message: str) -> None:
    path = tmp_path / "tiles.json"
    timer = FakeTimer({SETS[0]: [1.0, 1.0], SETS[1]: [time, time], SETS[2]: [1.2, 1.2]})
    tune.tune(target(), path, 10.0, timer)
    assert not path.exists()
    assert message in capsys.readouterr().out
    # What an earlier run has found is taken out.
    store(path, target().key, target().entry(SETS[2], 0.1))
    tune.tune(target(), path, 10.0, FakeTimer(timer.times))
    assert read_table(path) == {}
    assert f"what {path} had for this is taken out" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("v_in_k", [False, True])
def test_the_check_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, v_in_k: bool) -> None:
    from cpattn.kernels import ragged_attention as kernel

    honest = kernel.ragged_attention
    check = Exactness(target(v_in_k))
    shapes = (TileShape(64, 64, 4, 2), TileShape(32, 64, 4, 2))
    assert check.why_wrong(shapes) is None

    def off(*tensors: Any, **options: Any) -> Any:
        out, lse = honest(*tensors, **options)
        if options["shapes"][0].block_m == 32:
            out[3] = out[4]
        return out, lse

    def off_in_pages(q: Any, k: Any, *tensors: Any, **options: Any) -> Any:
        out, lse = honest(q, k, *tensors, **options)
        if k.ndim == 4:
            out[3, 0, 0] += 1e-6
        return out, lse

    def too_large(*tensors: Any, **options: Any) -> Any:
        if "window" in options:
            raise RuntimeError("out of resource: shared memory")
        return honest(*tensors, **options)

    for wrong, reason in (
        (off, "its relative RMSE is "),
        (off_in_pages, "its bits depend on the batch: they differ with 64 rows, 1 heads a tile, pages of 16"),
        (too_large, "it can not serve all calls: RuntimeError: out of resource: shared memory"),
    ):
        monkeypatch.setattr(kernel, "ragged_attention", wrong)
        found = check.why_wrong(shapes)
        assert found is not None
        assert found.startswith(reason)
