"""A stand-in for the CUDA driver's library: it reads the memory that a launch is given, as the driver would."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from cpattn.kernels import cuda_driver, direct_launch
from cpattn.kernels.cuda_driver import INVALID_CONTEXT, INVALID_VALUE, LaunchConfig

NUM_WARPS = 4
SHARED_BYTES = 1000
FUNCTION = 0x7F00_0000_1230


class Launched(NamedTuple):
    """What the driver was given: unsigned numbers, and the bytes of descriptors; and each attribute as its id and value."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    stream: int
    values: tuple[Any, ...]
    attributes: tuple[tuple[int, int], ...] = ()


class FakeCuda:
    """The driver's functions. Descriptors that it makes hold their address, over and over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
        self.sizes = sizes
        self.launched: list[Launched] = []
        self.encoded: list[dict[str, Any]] = []
        self.version = 13020
        self.has_context = True
        self.contexts: list[int] = []
        self.result = 0
        cuda_driver._has_fault.cache_clear()
        direct_launch._encoders.clear()
        for module in (cuda_driver, direct_launch):
            monkeypatch.setattr(module, "driver", lambda: self)

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: Any, extra: None) -> int:
        if not self.has_context:
            return INVALID_CONTEXT
        if self.result:
            return self.result
        assert function.value == FUNCTION
        c = LaunchConfig.from_address(config.value)
        assert (c.block_y, c.block_z) == (1, 1)
        attributes = []
        for i in range(c.num_attributes):
            words = (ctypes.c_uint32 * 18).from_address(c.attributes + 72 * i)
            attributes.append((words[0], words[2]))
        at = (ctypes.c_uint64 * len(self.sizes)).from_address(pointers.value)
        values = []
        for address, size in zip(at, self.sizes, strict=True):
            memory = ctypes.string_at(address, size)
            assert address % min(size, 64) == 0
            values.append(memory if size == 128 else int.from_bytes(memory, "little"))
        grid = c.grid_x, c.grid_y, c.grid_z
        self.launched.append(Launched(grid, c.block_x, c.shared_bytes, c.stream, tuple(values), tuple(attributes)))
        return 0

    def cuFuncGetParamInfo(self, function: int, i: int, offset: Any, size: Any) -> int:
        if i >= len(self.sizes):
            return INVALID_VALUE
        offset._obj.value, size._obj.value = 8 * i, self.sizes[i]
        return 0

    def cuTensorMapEncodeTiled(
        self, out: int, data_type: int, rank: int, address: int, shape: Any, strides: Any, block: Any, steps: Any, *modes: int
    ) -> int:
        assert out % 64 == 0
        assert list(steps) == [1] * rank
        self.encoded.append({
            "address": address, "data_type": data_type, "shape": list(shape), "strides": list(strides), "block": list(block),
            "modes": modes,
        })  # fmt: skip
        ctypes.memmove(out, descriptor_of(address), 128)
        return self.result

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuGetErrorString(self, result: int, text: Any) -> int:
        text._obj.value = b"out of everything"
        return 0

    def cuDeviceGet(self, handle: Any, device: int) -> int:
        handle._obj.value = 100 + device
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, handle: Any) -> int:
        context._obj.value = 1000 + handle.value
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.contexts.append(context.value)
        self.has_context = True
        return 0


def descriptor_of(address: int) -> bytes:
    return (address.to_bytes(8, "little") * 16)[:128]


def compiled_kernel(descriptors: list[dict[str, Any]] | None = None, **metadata: Any) -> SimpleNamespace:
    """What Triton, 3.6 and later, returns of a launch, as far as it is looked at."""
    fields = {
        "num_warps": NUM_WARPS, "num_ctas": 1, "shared": SHARED_BYTES, "launch_cooperative_grid": False, "launch_pdl": False,
        "global_scratch_size": 0, "profile_scratch_size": 0, "tensordesc_meta": descriptors,
    }  # fmt: skip
    return SimpleNamespace(function=FUNCTION, metadata=SimpleNamespace(**fields | metadata))


# What releases of Triton say of a descriptor.
DESCRIPTORS = {
    "3.6": {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 64], "fp4_padded": False},
    "3.8": {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 64], "fp4_padded": False, "is_im2col": False},
}
