"""Launching a compiled Triton kernel again without Triton's binder, which takes tens of microseconds on the host.

The first launch of each kind goes through Triton, which compiles. Its arguments' kind is what Triton specializes on:
dtypes, whether pointers are aligned, the values of integers and constants. Later launches of that kind call the C function that
Triton has generated. That is an internal of Triton: it is used on releases where it has been tested, and if it is as expected.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

# Releases of Triton with which tests/kernels has passed on a GPU.
_TESTED_ON = {(3, 6)}
_ALIGNMENT = 16


class Blocks(NamedTuple):
    """What a kernel takes as a tensor descriptor: blocks of a tensor.

    Attributes:
        source: the tensor; shape, strides: as which it is looked at, the last stride 1.
        block: the shape of a block.
        descriptor: makes Triton's descriptor, ``(source, shape, strides, block) -> descriptor``.
    """

    source: Tensor
    shape: list[int]
    strides: list[int]
    block: tuple[int, ...]
    descriptor: Callable[[Tensor, list[int], list[int], list[int]], Any]


class Launcher:
    """A kernel and the forms of it that have been compiled."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        # For each kind the launch of what has been compiled, or None where only Triton's own will do.
        self._again: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
        version = tuple(int(n) for n in triton.__version__.split(".")[:2])
        self._may_skip_binder = version in _TESTED_ON and not knobs.runtime.interpret
        if self._may_skip_binder:
            self._params = [(param.name, bool(param.do_not_specialize)) for param in kernel.params]

    def __call__(self, grid: tuple[int, int], options: dict[str, int], **arguments: Any) -> None:
        """Launches ``grid`` programs on the current device and stream.

        Args:
            options: of the compiler, such as ``num_warps``.
            arguments: all of the kernel's parameters. Integers that it specializes on are strides and the like: every
                value of theirs is a kind of its own here.
        """
        if not self._may_skip_binder or _is_hooked():
            self._ordinary(grid, options, arguments)
            return
        device = torch.cuda.current_device()
        kind: list[Any] = [device, *options.values()]
        values: list[Any] = []
        for name, is_free in self._params:
            value = arguments[name]
            cls = type(value)
            if cls is float:
                # All are fp32.
                values.append(value)
                kind.append(cls)
            elif cls is Blocks:
                values.append(value)
                kind.append(value.source.dtype)
                kind.append(value.block)
            elif cls is Tensor or isinstance(value, Tensor):
                pointer = value.data_ptr()
                values.append(pointer)
                kind.append(value.dtype)
                kind.append(pointer % _ALIGNMENT == 0)
            else:
                values.append(value)
                # Of integers that the kernel does not specialize on, the width matters.
                kind.append(-(2**31) <= value < 2**31 if is_free else value)
        key = tuple(kind)
        again = self._again.get(key, _launch_again)
        if again is None:
            self._ordinary(grid, options, arguments)
        elif again is _launch_again:
            self._again[key] = _launch_again(self._ordinary(grid, options, arguments))
        else:
            again(grid, torch._C._cuda_getCurrentRawStream(device), values)

    def _ordinary(self, grid: tuple[int, int], options: dict[str, int], arguments: dict[str, Any]) -> Any:
        described = {
            name: value.descriptor(value.source, value.shape, value.strides, list(value.block)) if type(value) is Blocks else value
            for name, value in arguments.items()
        }
        return self.kernel[grid](**described, **options)


def _is_hooked() -> bool:
    """Whether somebody, such as a profiler, wants to be called at launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _launch_again(compiled: Any) -> Callable[..., None] | None:
    """``launch(grid, stream, values)`` for what Triton has compiled, or None if it is not as expected."""
    try:
        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return None
        function = compiled.function
        fixed = (launcher.launch_cooperative_grid, launcher.launch_pdl, None, None, compiled.packed_metadata, None, None, None)
        descriptors = compiled.metadata.tensordesc_meta or []
        launch = launcher.launch
        if descriptors:
            # The C function lies within one that takes descriptors apart.
            launch = inspect.getclosurevars(launch).nonlocals["launcher"]
        encode: Any = None
        encodings: list[tuple[Any, ...]] = []
        if descriptors:
            from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

            encode = triton.runtime.driver.active.utils.fill_tma_descriptor
            for m in descriptors:
                if m["fp4_padded"]:
                    return None
                encodings.append((m["swizzle"], m["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[m["elem_type"]], m["block_size"]))
    except (AttributeError, ImportError, KeyError, TypeError):
        return None

    def again(grid: tuple[int, int], stream: int, values: list[Any]) -> None:
        if not encodings:
            launch(grid[0], grid[1], 1, stream, function, *fixed, *values)
            return
        expanded: list[Any] = []
        remaining = iter(encodings)
        for value in values:
            if type(value) is Blocks:
                source, shape, strides, _, _ = value
                # Values outside of the tensor are 0.
                expanded.append(encode(source.data_ptr(), *next(remaining), shape, strides, 0))
                expanded += shape
                expanded += strides
            else:
                expanded.append(value)
        launch(grid[0], grid[1], 1, stream, function, *fixed, *expanded)

    return again
