"""Launches past Triton's binder do what launches through it do, whatever changes between them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from cpattn.kernels.launch import Blocks, Launcher, _launch_again, _sorter


@triton.jit(do_not_specialize=["n"])
def _scale_kernel(out, x, n, stride, factor, BLOCK: tl.constexpr, NEGATE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * stride, mask=i < n) * factor
    tl.store(out + i, -value if NEGATE else value, mask=i < n)


def scale(launcher: Launcher, x: Tensor, factor: float, negate: bool = False, block: int = 64) -> Tensor:
    out = torch.empty(len(x), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(len(x), block), 1)
    launcher(grid, {"num_warps": 4}, out=out, x=x, n=len(x), stride=x.stride(0), factor=factor, BLOCK=block, NEGATE=negate)
    return out


def test_every_change_of_arguments(device: str) -> None:
    launcher = Launcher(_scale_kernel)
    wide = torch.randn(4000, device=device)
    for _ in range(3):
        for x in (wide[:1000], wide[1:1001], wide[:3000:3], wide[:3200:16], wide[1:2], wide.half()[:700], wide[:997]):
            for factor in (1.0, 2.5):
                torch.testing.assert_close(scale(launcher, x, factor), x * factor)
                torch.testing.assert_close(scale(launcher, x, factor, negate=True), x * -factor)
                torch.testing.assert_close(scale(launcher, x, factor, block=128), x * factor)


def test_launches_on_the_current_stream_and_in_graphs(device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU")
    launcher = Launcher(_scale_kernel)
    x = torch.randn(1000, device=device)
    for _ in range(2):
        scale(launcher, x, 2.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scale(launcher, x, 2.0)
    x.fill_(3.0)
    graph.replay()
    assert (out == 6.0).all()


def test_the_binder_is_skipped_where_it_was_tested(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(_scale_kernel)
    if not launcher._may_skip_binder:
        pytest.skip("this Triton's launches go through its binder")
    x = torch.randn(100, device=device)
    scale(launcher, x, 2.0)
    # A hook of a profiler must not be passed by.
    called = []
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: called.append(metadata))
    scale(launcher, x, 2.0)
    assert len(called) == 1
    monkeypatch.undo()
    monkeypatch.setattr(launcher, "kernel", None)
    assert torch.equal(scale(launcher, x, 2.0), x * 2.0)


@pytest.mark.parametrize("compiled", [SimpleNamespace(), SimpleNamespace(run=None), None], ids=str)
def test_unexpected_internals_are_left_alone(compiled: Any) -> None:
    assert _launch_again(compiled) is None


def test_kinds_are_what_triton_specializes_on() -> None:
    x = torch.zeros(64)
    blocks = Blocks(x, [64], [1], (16,), lambda *_: None)
    types = (Tensor, Blocks, int, int, int, float)
    sort = _sorter(types, ["number", "number", "constant", "number", "free", "number"])

    def kind(tensor: Tensor = x, described: Blocks = blocks, constant: int = 5, number: int = 3, free: int = 3, real: float = 0.5) -> Any:
        kind, values = sort(tensor, described, constant, number, free, real)
        assert values == (tensor.data_ptr(), described, constant, number, free, real)
        return kind

    assert kind(x[4:]) == kind()
    assert kind(number=2) == kind(number=2**31 - 1) == kind(free=1) == kind(free=16) == kind(real=1.0) == kind()
    assert kind(number=16) == kind(number=0) == kind(number=2**30)
    different = [
        kind(),
        kind(x[1:]),
        kind(x.half()),
        kind(described=blocks._replace(block=(32,))),
        kind(described=blocks._replace(source=x.half())),
        kind(constant=6),
        kind(number=1),
        kind(number=16),
        kind(number=2**31),
        kind(number=2**31 + 1),
        kind(free=2**31),
    ]
    assert len(set(different)) == len(different)
