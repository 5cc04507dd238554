"""The few functions of the CUDA driver that a launch takes, through ctypes: an interface that does not change with Triton.

``cuLaunchKernelEx`` (CUDA 11.8) launches, ``cuFuncGetParamInfo`` (12.4) says which parameters a compiled kernel has, and
``cuTensorMapEncodeTiled`` (12.0) makes what the tensor memory accelerator takes for a tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

# CUtensorMap: 128 bytes, at a multiple of 64.
DESCRIPTOR_WORDS = 16
_ALIGNMENT = 64
# Of the driver's enumerations.
INVALID_VALUE = 1
INVALID_CONTEXT = 201
_NO_INTERLEAVING = 0
# CUdevice_P2PAttribute.
_ACCESS_SUPPORTED = 2
_ATOMICS_SUPPORTED = 3
_PROMOTE_TO_128_BYTES = 2
_FILL_WITH_ZEROS = 0
# Up to this driver, descriptors of tensors smaller than this must not have this bit (CUTLASS, since 4.3).
_LAST_DRIVER_WITH_FAULT = 13010
_LEAST_BYTES_WITHOUT_FAULT = 128 * 1024
_FAULTY_BIT = 1 << 21


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of a number."""

    _fields_ = [("id", c_uint32), ("padding", c_uint32), ("value", c_uint32), ("rest", c_uint32 * 15)]


# Every launch that may begin before the one before it has ended has this one.
_AS_DEPENDENT = _Attribute(id=6, value=1)
AS_DEPENDENT = ctypes.addressof(_AS_DEPENDENT)


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig; of attributes :data:`AS_DEPENDENT` is the only one."""

    _fields_ = [
        ("grid_x", c_uint32), ("grid_y", c_uint32), ("grid_z", c_uint32),
        ("block_x", c_uint32), ("block_y", c_uint32), ("block_z", c_uint32),
        ("shared_bytes", c_uint32), ("stream", c_uint64), ("attributes", c_uint64), ("num_attributes", c_uint32),
    ]  # fmt: skip


@cache
def driver() -> Any:
    """The driver's library. Raises OSError where there is none, AttributeError where it is too old."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [c_void_p] * 4
    library.cuFuncGetParamInfo.argtypes = [c_void_p, c_size_t, c_void_p, c_void_p]
    library.cuTensorMapEncodeTiled.argtypes = [
        c_void_p, c_int, c_uint32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int,
    ]  # fmt: skip
    return library


@cache
def why_missing() -> str | None:
    """Why launches cannot go to the driver, or None if they can."""
    try:
        driver()
    except OSError:
        return "libcuda.so.1 cannot be loaded"
    except AttributeError as error:
        return f"the CUDA driver is older than 12.4 ({error}); update it"
    return None


def check(result: int, doing: str) -> None:
    """Raises RuntimeError if a function of the driver has failed."""
    if result:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"CUDA error {result} {doing}: {(text.value or b'unknown error').decode()}")


def parameter_sizes(function: int) -> list[int]:
    """How many bytes each parameter of a compiled kernel has."""
    sizes: list[int] = []
    offset, size = c_size_t(), c_size_t()
    while True:
        result = driver().cuFuncGetParamInfo(function, len(sizes), ctypes.byref(offset), ctypes.byref(size))
        if result == INVALID_VALUE:
            # There is no further one.
            return sizes
        check(result, "asking for a kernel's parameters")
        sizes.append(size.value)


def use_context_of(device: int) -> None:
    """Makes a device's primary context this thread's, as torch does at a thread's first call into CUDA."""
    handle, context = c_int(), c_void_p()
    check(driver().cuDeviceGet(ctypes.byref(handle), device), "finding a device")
    check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "taking a device's context")
    check(driver().cuCtxSetCurrent(context), "setting a thread's context")


def has_peer_atomics(device: int, other: int) -> bool:
    """Whether kernels on one device can read and write the other's memory, with atomic operations: as over NVLink."""
    for attribute in (_ACCESS_SUPPORTED, _ATOMICS_SUPPORTED):
        value = c_int()
        check(driver().cuDeviceGetP2PAttribute(ctypes.byref(value), attribute, device, other), "asking for access between devices")
        if not value.value:
            return False
    return True


@cache
def _has_fault() -> bool:
    version = c_int()
    check(driver().cuDriverGetVersion(ctypes.byref(version)), "asking for the driver's version")
    return version.value <= _LAST_DRIVER_WITH_FAULT


class TiledEncoder:
    """Makes descriptors of tensors for the tensor memory accelerator, which differ in their address alone; outside of a tensor
    are zeros.

    Args:
        data_type, swizzle: of the driver's CUtensorMapDataType and CUtensorMapSwizzle.
        shape, strides, block: outermost axis first, in elements; the last stride is 1.
    """

    def __init__(
        self, data_type: int, element_size: int, swizzle: int, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]
    ) -> None:
        rank = len(shape)
        # The innermost axis has no stride.
        stride_bytes = [stride * element_size for stride in reversed(strides[:-1])]
        self._before = data_type, rank
        self._after = (
            (c_uint64 * rank)(*reversed(shape)), (c_uint64 * max(1, rank - 1))(*stride_bytes),
            (c_uint32 * rank)(*reversed(block)), (c_uint32 * rank)(*[1] * rank),
            _NO_INTERLEAVING, swizzle, _PROMOTE_TO_128_BYTES, _FILL_WITH_ZEROS,
        )  # fmt: skip
        self._what = f"shape {list(shape)}, strides {list(strides)}, in blocks {list(block)}"
        last_byte = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) * element_size
        self._may_have_fault = last_byte + 1 < _LEAST_BYTES_WITHOUT_FAULT and _has_fault()

    def __call__(self, address: int) -> memoryview:
        """The descriptor, as :data:`DESCRIPTOR_WORDS` words."""
        # More than it takes, as it has to be aligned.
        memory = (c_uint64 * (DESCRIPTOR_WORDS + _ALIGNMENT // 8))()
        skipped = -ctypes.addressof(memory) // 8 % (_ALIGNMENT // 8)
        result = driver().cuTensorMapEncodeTiled(ctypes.addressof(memory) + 8 * skipped, *self._before, address, *self._after)
        if result:
            check(result, f"describing a tensor of {self._what}")
        words = memoryview(memory).cast("B").cast("Q")[skipped : skipped + DESCRIPTOR_WORDS]
        if self._may_have_fault:
            words[1] &= ~_FAULTY_BIT
        return words
