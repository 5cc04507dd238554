"""Tensors whose elements lie up to 2**31 and more elements apart, in memory of which only what is touched exists."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from torch import Tensor

# What a signed number of 32 bits cannot hold.
LIMIT = 2**31
# Not in Python's mmap before 3.13.
_MAP_NORESERVE = 0x4000


def _memory(count: int, dtype: torch.dtype, device: str) -> Tensor:
    if device != "cpu":
        if torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < count * dtype.itemsize + 2**30:
            pytest.skip("needs more memory")
        return torch.full((count,), torch.nan if dtype.is_floating_point else 2**30, dtype=dtype, device=device)
    if sys.platform != "linux":
        pytest.skip("needs memory that is there once it is touched")
    try:
        mapped = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError:
        pytest.skip("this machine does not lend so many addresses")
    return torch.frombuffer(mapped, dtype=dtype)


def far(x: Tensor, axis: int, reach: int) -> Tensor:
    """The same numbers in another layout: the last along ``axis`` is at most ``reach`` elements after the first, and nearly so.
    An offset that wraps around in 32 bits is in memory of the test's own as well."""
    n = x.shape[axis]
    # At multiples of 16 bytes, which descriptors need.
    unit = 16 // x.element_size() if x.element_size() < 16 else 1
    stride = reach // (n - 1) // unit * unit
    strides = list(x.contiguous().stride())
    strides[axis] = stride
    # The other axes are packed into the space between.
    inner = [i for i in range(x.ndim) if i != axis]
    step = 1
    for i in reversed(inner):
        strides[i] = step
        step *= x.shape[i] if i != inner[-1] else -(-x.shape[i] // unit) * unit
    assert step <= stride
    memory = _memory(LIMIT + reach + step, x.dtype, str(x.device.type))
    view = memory[LIMIT:].as_strided(x.shape, strides)
    return view.copy_(x)
