"""Launches past Triton's binder do what launches through it do, whatever changes between them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from devices.fake_cuda import DESCRIPTORS, FakeCuda, Launched, compiled_kernel, descriptor_of
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from cpattn.kernels import launch
from cpattn.kernels.arguments import Blocks, Words
from cpattn.kernels.launch import Launcher, _kinds
from cpattn.kernels.release import Gate


@triton.jit(do_not_specialize=["n"])
def _scale_kernel(out, x, n, stride, factor, BLOCK: tl.constexpr, NEGATE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * stride, mask=i < n) * factor
    tl.store(out + i, -value if NEGATE else value, mask=i < n)


def scale(launcher: Launcher, x: Tensor, factor: float, negate: bool = False, block: int = 64) -> Tensor:
    """As the wrapper of a kernel does it."""
    out = torch.empty(len(x), dtype=x.dtype, device=x.device)
    key = x.shape, x.stride(), x.dtype, factor, negate, block
    launch = launcher.prepared.get(key)
    if launch is None:
        launch = launcher.prepare(
            (triton.cdiv(len(x), block), 1), {"num_warps": 4}, {"out": 0, "x": 1},
            out=out, x=x, n=len(x), stride=x.stride(0), factor=factor, BLOCK=block, NEGATE=negate,
        )  # fmt: skip
        launcher.prepared.keep(key, launch)
    launch(out, x)
    return out


def test_every_change_of_arguments(device: str) -> None:
    launcher = Launcher(_scale_kernel)
    wide = torch.randn(4000, device=device)
    for _ in range(3):
        for x in (wide[:1000], wide[1:1001], wide[:3000:3], wide[:3200:16], wide[1:2], wide.half()[:700], wide[:997], wide[:0]):
            for factor in (1.0, 2.5):
                torch.testing.assert_close(scale(launcher, x, factor), x * factor)
                torch.testing.assert_close(scale(launcher, x, factor, negate=True), x * -factor)
                torch.testing.assert_close(scale(launcher, x, factor, block=128), x * factor)


def test_what_is_remembered_is_bounded(device: str) -> None:
    launcher = Launcher(_scale_kernel)
    x = torch.randn(2000, device=device)
    most = 0
    for n in range(1, 300):
        scale(launcher, x[:n], 2.0)
        most = max(most, len(launcher.prepared))
    assert 1 < most <= 256
    assert torch.equal(scale(launcher, x[:5], 2.0), x[:5] * 2.0)


def test_tensors_are_not_kept_but_those_that_stay_are(device: str) -> None:
    launcher = Launcher(_scale_kernel)
    x, out, fixed = torch.randn(64, device=device), torch.empty(64, device=device), torch.randn(64, device=device)
    arguments: dict[str, Any] = {"n": 64, "stride": 1, "factor": 2.0, "BLOCK": 64, "NEGATE": False}
    both = launcher.prepare((1, 1), {"num_warps": 4}, {"out": 0, "x": 1}, out=out, x=x, **arguments)
    references = sys.getrefcount(x), sys.getrefcount(fixed)
    one = launcher.prepare((1, 1), {"num_warps": 4}, {"out": 0}, out=out, x=fixed, **arguments)
    both(out, x)
    assert torch.equal(out, x * 2)
    one(out)
    assert torch.equal(out, fixed * 2)
    assert sys.getrefcount(x) == references[0]
    assert sys.getrefcount(fixed) > references[1]


def test_a_tensor_may_be_given_as_words(device: str) -> None:
    launcher = Launcher(_scale_kernel)
    x = torch.arange(64, dtype=torch.int32, device=device).view(torch.int16).view(16, 4, 2)
    out = torch.empty_like(x)
    launch = launcher.prepare(
        (1, 1), {"num_warps": 4}, {"out": 0, "x": 1}, out=Words(out, torch.int32), x=Words(x, torch.int32),
        n=64, stride=1, factor=3, BLOCK=64, NEGATE=False,
    )  # fmt: skip
    for source in (x, x.flip(0), x[:]):
        launch(out, source)
        assert torch.equal(out.view(torch.int32), source.contiguous().view(torch.int32) * 3)


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


def test_a_thread_that_has_not_called_into_cuda_can_launch(device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU")
    launcher = Launcher(_scale_kernel)
    x = torch.randn(64, device=device)
    arguments: dict[str, Any] = {"n": 64, "stride": 1, "factor": 2.0, "BLOCK": 64, "NEGATE": False}
    outs = [torch.zeros(64, device=device) for _ in range(6)]
    prepared = launcher.prepare((1, 1), {"num_warps": 4}, {"out": 0, "x": 1}, out=outs[0], x=x, **arguments)
    for out in outs[:2]:
        prepared(out, x)
    threads = [threading.Thread(target=prepared, args=(out, x)) for out in outs[2:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outs:
        assert torch.equal(out, x * 2)


def test_the_binder_is_skipped_where_it_was_tested(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(_scale_kernel)
    if not launcher.may_skip_binder:
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


class Recorder:
    """A launcher whose kernel is not there: what Triton would compile, and what the CUDA driver would be given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, descriptors: int = 0) -> None:
        self.device, self.stream = 0, 7
        self.compiled: list[dict[str, Any]] = []
        # Of out, x (a descriptor with one number for its shape, one for its strides), n, a stride that is not 1, and scratch memory.
        self.cuda = FakeCuda(monkeypatch, [8, *([128, 4, 8] if descriptors else [8]), 4, 4, 8, 8])
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: self.device, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: self.stream + device, raising=False)
        monkeypatch.setattr(launch, "DIRECT_LAUNCH", Gate({(1, 0): None}, lambda device: "not to be asked", release=lambda: (1, 0)))

        def run(grid: tuple[int, int]) -> Callable[..., Any]:
            def compile(**arguments: Any) -> SimpleNamespace:
                self.compiled.append(arguments)
                return compiled_kernel([DESCRIPTORS["3.6"] | {"block_size": [64]}] * descriptors or None)

            return compile

        class Kernel:
            params = [  # noqa: RUF012
                SimpleNamespace(name=name, is_constexpr=name == "BLOCK", do_not_specialize=name == "n")
                for name in ("out", "x", "n", "stride", "BLOCK")
            ]
            __getitem__ = staticmethod(run)

        self.launcher = Launcher(Kernel())

    def prepare(self, out: Any, x: Any, n: int = 5, stride: int = 3, block: int = 64, grid: int = 3) -> Callable[..., None]:
        return self.launcher.prepare((grid, 1), {"num_warps": 4}, {"out": 0, "x": 1}, out=out, x=x, n=n, stride=stride, BLOCK=block)

    @property
    def launched(self) -> list[Launched]:
        return self.cuda.launched

    def values(self) -> tuple[Any, ...]:
        """What the last launch gave the kernel."""
        launched = self.launched[-1]
        assert launched.grid == (3, 1, 1)
        assert launched.values[-2:] == (0, 0)
        return launched.values[:-2]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def test_the_driver_is_given_each_launch_s_own_tensors(recorder: Recorder) -> None:
    memory = torch.zeros(4096)
    launch = recorder.prepare(memory, memory[64:])
    launch(memory, memory[64:])
    assert (len(recorder.compiled), len(recorder.launched)) == (1, 0)
    for out, x in ((memory, memory[64:]), (memory[128:], memory), (memory, memory)):
        launch(out, x)
        assert recorder.values() == (out.data_ptr(), x.data_ptr(), 5, 3)
    # Other numbers of the same kind are not compiled anew.
    recorder.prepare(memory, memory, n=1, stride=5)(memory, memory)
    assert recorder.values() == (memory.data_ptr(), memory.data_ptr(), 1, 5)
    assert len(recorder.compiled) == 1
    recorder.prepare(memory, memory, stride=16)(memory, memory)
    assert len(recorder.compiled) == 2


def test_another_alignment_is_another_kind(recorder: Recorder) -> None:
    memory = torch.zeros(4096)
    launch = recorder.prepare(memory, memory)
    patterns = [(memory, memory), (memory[1:], memory), (memory, memory[1:]), (memory[1:], memory[3:])]
    for _ in range(2):
        for out, x in patterns:
            launch(out, x)
    assert [tuple(arguments[name].data_ptr() % 16 for name in ("out", "x")) for arguments in recorder.compiled] == [
        (0, 0), (4, 0), (0, 4), (4, 12),
    ]  # fmt: skip
    assert [launched.values[:2] for launched in recorder.launched] == [(out.data_ptr(), x.data_ptr()) for out, x in patterns]


def test_another_device_is_another_kind_and_each_launch_has_its_stream(recorder: Recorder) -> None:
    memory = torch.zeros(64)
    launch = recorder.prepare(memory, memory)
    for _ in range(2):
        for recorder.device in (0, 1):
            launch(memory, memory)
    assert len(recorder.compiled) == 2
    recorder.stream = 100
    for recorder.device in (0, 1):
        launch(memory, memory)
        assert recorder.launched[-1].stream == 100 + recorder.device


def test_what_threads_compile_side_by_side_is_kept(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton, from 3.8 on, unloads a kernel that nobody holds, and its function cannot be launched any more."""
    memory = torch.zeros(64)
    first, second = recorder.prepare(memory, memory), recorder.prepare(memory, memory)
    modules: list[weakref.ref[Any]] = []
    ordinary = launch._Prepared._ordinary

    def compile(prepared: Any, tensors: Any) -> Any:
        kernel = ordinary(prepared, tensors)
        kernel.module = type("Module", (), {})()
        modules.append(weakref.ref(kernel.module))
        if len(modules) == 1:
            # Meanwhile another thread compiles the same, and prepares another launch of it.
            second(memory, memory)
            second(memory, memory)
        return kernel

    monkeypatch.setattr(launch._Prepared, "_ordinary", compile)
    first(memory, memory)
    second(memory, memory)
    assert (len(recorder.compiled), len(recorder.launched)) == (2, 2)
    assert all(module() for module in modules)


def test_what_triton_alone_can_launch_goes_through_it(recorder: Recorder) -> None:
    memory = torch.zeros(64)
    recorder.cuda.sizes.append(8)
    launches = [recorder.prepare(memory, memory) for _ in range(2)]
    for _ in range(3):
        for prepared in launches:
            prepared(memory, memory)
    assert (len(recorder.compiled), len(recorder.launched)) == (6, 0)


@pytest.mark.parametrize("problem", [None, "it is wrong"])
def test_on_a_release_that_is_not_known_a_check_decides(recorder: Recorder, monkeypatch: pytest.MonkeyPatch, problem: str | None) -> None:
    checked: list[torch.device] = []

    def check(device: torch.device) -> str | None:
        checked.append(device)
        return problem

    monkeypatch.setattr(launch, "DIRECT_LAUNCH", Gate({(1, 0): None}, check, release=lambda: (1, 1)))
    memory = torch.zeros(64)
    prepared = recorder.prepare(memory, memory)
    monkeypatch.setattr("cpattn.kernels.release.is_capturing", lambda device: True)
    for _ in range(2):
        prepared(memory, memory)
    assert (checked, len(recorder.compiled), len(recorder.launched)) == ([], 2, 0)
    monkeypatch.setattr("cpattn.kernels.release.is_capturing", lambda device: False)
    for _ in range(3):
        prepared(memory, memory)
    assert checked == [torch.device("cuda", 0)]
    assert len(recorder.launched) == (0 if problem else 2)
    assert len(recorder.compiled) == (5 if problem else 3)


def test_hooks_are_called(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.zeros(64)
    launch = recorder.prepare(memory, memory)
    for _ in range(2):
        launch(memory, memory)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(triton.knobs.runtime, name, lambda metadata: None)
            launch(memory, memory)
    assert (len(recorder.compiled), len(recorder.launched)) == (3, 1)


def test_a_grid_without_programs_launches_nothing(recorder: Recorder) -> None:
    memory = torch.zeros(64)
    recorder.prepare(memory, memory, grid=0)(memory, memory)
    assert (recorder.compiled, recorder.launched) == ([], [])


def test_a_descriptor_is_encoded_once_for_each_address(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, descriptors=1)
    memory = torch.zeros(4096, dtype=torch.float16)
    blocks = Blocks(memory, [32], [1], (64,), lambda *_: "passed")
    launch = recorder.prepare(memory, blocks)
    buffers = [memory, memory[64:], memory[128:]]
    launch(memory, memory)
    assert recorder.compiled[0]["x"] == "passed"
    for _ in range(3):
        for x in buffers:
            launch(memory, x)
            assert recorder.values() == (memory.data_ptr(), descriptor_of(x.data_ptr()), 32, 1, 5, 3)
    assert [each["address"] for each in recorder.cuda.encoded] == [x.data_ptr() for x in buffers]


def test_threads_share_a_launch(recorder: Recorder) -> None:
    memory = torch.zeros(4096)
    launch = recorder.prepare(memory, memory)
    launch(memory, memory)

    def run(out: Tensor) -> None:
        for _ in range(200):
            launch(out, memory)

    outs = [memory[16 * i :] for i in range(4)]
    threads = [threading.Thread(target=run, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = Counter(launched.values[0] for launched in recorder.launched)
    assert counts == {out.data_ptr(): 200 for out in outs}


def test_kinds_are_what_triton_specializes_on() -> None:
    def kind_of(value: Any, role: str) -> Any:
        (kind,) = _kinds({"value": value}, {"value": role})
        return kind

    x = torch.zeros(64)
    blocks = Blocks(x, [64], [1], (16,), lambda *_: None)
    assert kind_of(x, "number") == kind_of(x[4:], "number")
    assert len({kind_of(each, "number") for each in (x, x[1:], x.half(), Words(x, torch.int8), Words(x[1:], torch.int8))}) == 5
    assert kind_of(Words(x, torch.int32), "number") == kind_of(x.int(), "number")
    described = [blocks, blocks._replace(block=(32,)), blocks._replace(source=x.half())]
    assert len({kind_of(each, "number") for each in described}) == 3
    assert kind_of(2, "number") == kind_of(2**31 - 1, "number")
    assert kind_of(16, "number") == kind_of(0, "number") == kind_of(2**30, "number")
    assert len({kind_of(n, "number") for n in (1, 2, 16, 2**31, 2**31 + 1)}) == 5
    assert kind_of(1, "free") == kind_of(16, "free") == kind_of(3, "free") != kind_of(2**31, "free")
    assert kind_of(0.5, "number") == kind_of(1.0, "number")
    assert kind_of(5, "constant") != kind_of(6, "constant")
