"""Launching a compiled Triton kernel again without Triton's binder, which takes tens of microseconds on the host.

The first launch of each kind goes through Triton, which compiles. Its arguments' kind is what Triton specializes on:
dtypes, whether pointers and integers are multiples of 16, constants. Later launches of that kind call the C function that
Triton has generated. That is an internal of Triton: it is used on releases where it has been tested, and if it is as expected.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import itemgetter
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
            self._roles = ["constant" if p.is_constexpr else "free" if p.do_not_specialize else "number" for p in kernel.params]
            self._in_order = itemgetter(*(param.name for param in kernel.params))
            self._sort: dict[tuple[type, ...], Callable[..., Any]] = {}

    def __call__(self, grid: tuple[int, int], options: dict[str, int], **arguments: Any) -> None:
        """Launches ``grid`` programs on the current device and stream.

        Args:
            options: of the compiler, such as ``num_warps``.
            arguments: all of the kernel's parameters.
        """
        if not self._may_skip_binder or _is_hooked():
            self._ordinary(grid, options, arguments)
            return
        device = torch.cuda.current_device()
        ordered = self._in_order(arguments)
        types = tuple(map(type, ordered))
        sort = self._sort.get(types) or self._sort.setdefault(types, _sorter(types, self._roles))
        kind, values = sort(*ordered)
        key = (device, *options.values(), kind)
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


def _sorter(types: tuple[type, ...], roles: list[str]) -> Callable[..., Any]:
    """A function of arguments of these types that returns what Triton specializes on, and what is passed to the kernel.

    Its code is written out, as Triton does for its binder: a loop over forty arguments takes longer than the launch.

    Args:
        roles: of each parameter: "constant", "number" (what Triton specializes on where it is an integer: whether it is 1,
            a multiple of 16, and how wide), or "free" (its width alone).
    """
    kind, values = [], []
    for i, (cls, role) in enumerate(zip(types, roles, strict=True)):
        values.append(f"a{i}")
        if cls is Blocks:
            kind.append(f"a{i}.source.dtype, a{i}.block")
        elif issubclass(cls, Tensor):
            kind.append(f"a{i}.dtype, (p{i} := a{i}.data_ptr()) % {_ALIGNMENT} == 0")
            values[-1] = f"p{i}"
        elif cls is float:
            # All are fp32.
            kind.append("float")
        elif role == "constant":
            kind.append(f"a{i}")
        elif role == "free":
            kind.append(f"-{2**31} <= a{i} < {2**31}")
        else:
            kind.append(f"1 if a{i} == 1 else 2 + (a{i} % {_ALIGNMENT} == 0) + 2 * (-{2**31} <= a{i} < {2**31})")
    arguments = ", ".join(f"a{i}" for i in range(len(types)))
    namespace: dict[str, Any] = {}
    exec(f"def sort({arguments}):\n    return ({', '.join(kind)},), ({', '.join(values)},)", namespace)
    sort: Callable[..., Any] = namespace["sort"]
    return sort


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

    def again(grid: tuple[int, int], stream: int, values: tuple[Any, ...]) -> None:
        if encodings:
            expanded: list[Any] = []
            remaining = iter(encodings)
            done = 0
            for i, value in enumerate(values):
                if type(value) is Blocks:
                    # Values outside of the tensor are 0.
                    encoded = encode(value.source.data_ptr(), *next(remaining), value.shape, value.strides, 0)
                    expanded += values[done:i]
                    expanded += [encoded, *value.shape, *value.strides]
                    done = i + 1
            values = (*expanded, *values[done:])
        launch(grid[0], grid[1], 1, stream, function, *fixed, *values)

    return again
