"""What the CUDA driver is given of a launch, to the byte, and which compiled kernels are left to Triton."""

from __future__ import annotations

import struct
import threading
from typing import Any

import pytest
import torch
from devices.fake_cuda import DESCRIPTORS, NUM_WARPS, SHARED_BYTES, FakeCuda, Launched, compiled_kernel, descriptor_of

from cpattn.kernels import cuda_driver
from cpattn.kernels.arguments import Blocks, Words
from cpattn.kernels.cuda_driver import TiledEncoder
from cpattn.kernels.direct_launch import NotAsExpectedError, again_form, compiled_form

X = torch.zeros(4096, dtype=torch.float16)
BLOCKS = Blocks(X, [8, 96], [96, 1], (1, 96), lambda *_: None)
ARGUMENTS: dict[str, Any] = {
    "blocks": BLOCKS, "x": X, "words": Words(X, torch.int32), "number": -3, "one": 1, "wide": 2**33, "free": 1, "factor": -0.5,
    "CONSTANT": 7, "y": X,
}  # fmt: skip
ROLES = dict.fromkeys(ARGUMENTS, "number") | {"free": "free", "CONSTANT": "constant"}
# In this order: the descriptor with shape and strides; no parameter for a number that is 1; Triton's two for scratch memory.
SIZES = [128, 4, 4, 8, 8, 8, 8, 4, 8, 4, 4, 8, 8, 8]
TENSORS = {"blocks": 0, "x": 1, "words": 2}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch, SIZES)


def expected(blocks: int, x: int, words: int) -> tuple[Any, ...]:
    bits = struct.unpack("<I", struct.pack("<f", -0.5))[0]
    return descriptor_of(blocks), 8, 96, 96, 1, x, words, 2**32 - 3, 2**33, 1, bits, X.data_ptr(), 0, 0


@pytest.mark.parametrize("release", DESCRIPTORS)
def test_all_that_a_launch_is_given(cuda: FakeCuda, release: str) -> None:
    compiled = compiled_form(compiled_kernel([DESCRIPTORS[release]]), ARGUMENTS, ROLES)
    again = again_form(compiled, 0, (3, 2), ARGUMENTS, TENSORS, 3)
    for stream, base in ((0, 2**46), (2**47 + 8, 1 << 40), (5, 2**46)):
        addresses = [base, base + 16, base + 32]
        again(stream, addresses)
        assert cuda.launched[-1] == Launched((3, 2, 1), 32 * NUM_WARPS, SHARED_BYTES, stream, expected(*addresses))
    # Once for each address, the first for the argument itself; innermost axis first, strides in bytes.
    assert [each["address"] for each in cuda.encoded] == [X.data_ptr(), 2**46, 1 << 40]
    assert cuda.encoded[0] | {"address": 0} == {
        "address": 0, "data_type": 6, "shape": [96, 8], "strides": [192], "block": [64, 1], "modes": (0, 3, 2, 0),
    }  # fmt: skip


def test_threads_do_not_share_memory(cuda: FakeCuda) -> None:
    compiled = compiled_form(compiled_kernel([DESCRIPTORS["3.8"]]), ARGUMENTS, ROLES)
    again = again_form(compiled, 0, (1, 1), ARGUMENTS, TENSORS, 3)

    def run(n: int) -> None:
        for _ in range(300):
            again(n, [2**40 + n, 2**41 + n, 2**42 + n])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cuda.launched) == 1800
    for launched in cuda.launched:
        n = launched.stream
        assert launched.values == expected(2**40 + n, 2**41 + n, 2**42 + n)


def test_a_thread_without_a_context_gets_the_device_s(cuda: FakeCuda) -> None:
    compiled = compiled_form(compiled_kernel([DESCRIPTORS["3.8"]]), ARGUMENTS, ROLES)
    again = again_form(compiled, 3, (1, 1), ARGUMENTS, TENSORS, 3)
    cuda.has_context = False
    again(0, [1024, 2048, 4096])
    again(0, [1024, 2048, 4096])
    assert cuda.contexts == [1103]
    assert len(cuda.launched) == 2


@pytest.mark.parametrize("is_dependent", [False, True])
def test_a_dependent_may_begin_before_the_launch_before_it_has_ended(cuda: FakeCuda, is_dependent: bool) -> None:
    compiled = compiled_form(compiled_kernel([DESCRIPTORS["3.8"]], launch_pdl=is_dependent), ARGUMENTS, ROLES)
    again_form(compiled, 0, (1, 1), ARGUMENTS, TENSORS, 3)(0, [1024, 2048, 4096])
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert cuda.launched[0].attributes == (((6, 1),) if is_dependent else ())


def test_errors_say_what_cuda_says(cuda: FakeCuda) -> None:
    compiled = compiled_form(compiled_kernel([DESCRIPTORS["3.8"]]), ARGUMENTS, ROLES)
    again = again_form(compiled, 0, (1, 1), ARGUMENTS, TENSORS, 3)
    again(0, [1024, 2048, 4096])
    cuda.result = 2
    with pytest.raises(RuntimeError, match="CUDA error 2 launching a kernel: out of everything"):
        again(0, [1024, 2048, 4096])
    with pytest.raises(RuntimeError, match=r"describing a tensor of shape \[8, 96\], strides \[96, 1\], in blocks \[1, 64\]"):
        again(0, [64, 2048, 4096])
    cuda.result = 0
    again(0, [1024, 2048, 4096])
    assert len(cuda.launched) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_ctas": 2}, "launch attributes"),
        ({"launch_cooperative_grid": True}, "launch attributes"),
        ({"shared": 229 * 1024}, "launch attributes"),
        ({"global_scratch_size": 64}, "scratch memory"),
        ({"profile_scratch_size": 64}, "scratch memory"),
        ({"tensordesc_meta": [DESCRIPTORS["3.6"] | {"fp4_padded": True}]}, "another kind"),
        ({"tensordesc_meta": [DESCRIPTORS["3.8"] | {"is_im2col": True}]}, "another kind"),
        ({"tensordesc_meta": [{"layout": 3}]}, "KeyError"),
        ({"tensordesc_meta": []}, "0 descriptors, not 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_not_as_expected_is_left_to_triton(cuda: FakeCuda, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotAsExpectedError, match=reason):
        compiled_form(compiled_kernel([DESCRIPTORS["3.8"]], **changes), ARGUMENTS, ROLES)


@pytest.mark.parametrize("missing", ["num_warps", "num_ctas", "shared", "launch_pdl", "global_scratch_size", "profile_scratch_size"])
def test_what_triton_does_not_say(cuda: FakeCuda, missing: str) -> None:
    kernel = compiled_kernel([DESCRIPTORS["3.8"]])
    delattr(kernel.metadata, missing)
    with pytest.raises(NotAsExpectedError, match=missing):
        compiled_form(kernel, ARGUMENTS, ROLES)


@pytest.mark.parametrize(
    "sizes",
    [SIZES[:-1], [*SIZES, 8], [*SIZES[:7], 8, *SIZES[8:]], [64, *SIZES[1:]], [8, *SIZES[1:]]],
    ids=["one kind of scratch", "three kinds", "wider number", "smaller descriptor", "pointer for a descriptor"],
)
def test_other_parameters_than_expected_are_left_to_triton(cuda: FakeCuda, sizes: list[int]) -> None:
    cuda.sizes = sizes
    with pytest.raises(NotAsExpectedError, match="its parameters have"):
        compiled_form(compiled_kernel([DESCRIPTORS["3.8"]]), ARGUMENTS, ROLES)


@pytest.mark.parametrize("value", [True, None, "text", 2**63, X.double], ids=lambda value: type(value).__name__)
def test_arguments_of_another_kind_are_left_to_triton(cuda: FakeCuda, value: Any) -> None:
    with pytest.raises(NotAsExpectedError, match="an argument is"):
        compiled_form(compiled_kernel([DESCRIPTORS["3.8"]]), ARGUMENTS | {"number": value}, ROLES)


@pytest.mark.parametrize(("version", "rows", "is_cleared"), [(13010, 4, True), (13010, 4096, False), (13020, 4, False)])
def test_small_descriptors_of_older_drivers_lack_a_bit(monkeypatch: pytest.MonkeyPatch, version: int, rows: int, is_cleared: bool) -> None:
    cuda = FakeCuda(monkeypatch, [])
    cuda.version = version
    all_bits = 2**64 - 1
    words = TiledEncoder(9, 2, 3, [rows, 64], [64, 1], [1, 64])(all_bits)
    assert list(words) == [all_bits, all_bits ^ (1 << 21 if is_cleared else 0)] + [all_bits] * 14


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    cuda_driver.driver.cache_clear()
    assert cuda_driver.why_missing.__wrapped__() == "libcuda.so.1 cannot be loaded"
