"""Launching a compiled Triton kernel again without Triton's binder, which takes tens of microseconds on the host.

A kernel's wrapper prepares a launch once for each layout of its arguments, and keeps it: all layers of a batch then only
put their tensors' addresses in. Of those Triton specializes on whether they are multiples of 16, of the other arguments
on dtypes, constants, and whether integers are multiples of 16. The first launch of each such kind goes through Triton,
which compiles; later ones call the C function that Triton has generated. That is an internal of Triton: it is used on
releases where it has been tested, and if it is as expected.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor
from triton import knobs

from cpattn.memo import Memo

# Releases of Triton with which tests/kernels has passed on a GPU.
_TESTED_ON = {(3, 6)}
_ALIGNMENT = 16
# Launches that a kernel's wrapper remembers: a few batches' worth. Buffers whose descriptors a launch remembers: the pages of
# as many layers.
_MOST_PREPARED = 256
_MOST_ENCODED = 1024

# What launches a kernel, given its tensors.
LaunchFunction: TypeAlias = "Callable[..., None]"


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

    def passed(self) -> Any:
        """What Triton takes."""
        return self.descriptor(self.source, self.shape, self.strides, list(self.block))


class Words(NamedTuple):
    """A tensor that a kernel takes as a pointer to another dtype: what is moved is memory.

    Attributes:
        source: any strides where the dtype is as wide as its own, else ``[rows, ...]``, each row contiguous.
        dtype: of the words, of which a row is a whole number.
    """

    source: Tensor
    dtype: torch.dtype

    def passed(self) -> Tensor:
        """What Triton takes; of its shape it looks at nothing."""
        if self.source.element_size() == self.dtype.itemsize:
            return self.source.view(self.dtype)
        rows = self.source.unsqueeze(1) if self.source.ndim == 1 else self.source.flatten(1)
        return rows.view(self.dtype)


class _Compiled(NamedTuple):
    """What Triton has compiled, and the arguments of its C function that lie between the stream and those of the kernel.

    Attributes:
        launch: ``launch(grid_x, grid_y, grid_z, stream, *fixed, *arguments)``.
        encode: makes what is passed for a descriptor; encodings: its arguments for each of them, in order.
    """

    launch: Callable[..., None]
    fixed: tuple[Any, ...]
    encode: Callable[..., Any] | None
    encodings: list[tuple[Any, ...]]


class Launcher:
    """A kernel and the forms of it that have been compiled.

    Attributes:
        prepared: what the kernel's wrapper has prepared, by all that decides a launch beside the tensors' addresses.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.prepared: Memo[Hashable, LaunchFunction] = Memo(_MOST_PREPARED)
        # For each kind what has been compiled, or None where only Triton's own launch will do.
        self.compiled: dict[Hashable, _Compiled | None] = {}
        version = tuple(int(n) for n in triton.__version__.split(".")[:2])
        self.may_skip_binder = version in _TESTED_ON and not knobs.runtime.interpret
        if self.may_skip_binder:
            self.roles = {p.name: "constant" if p.is_constexpr else "free" if p.do_not_specialize else "number" for p in kernel.params}

    def prepare(self, grid: tuple[int, int], options: dict[str, int], tensors: dict[str, int], **arguments: Any) -> LaunchFunction:
        """What launches ``grid`` programs on the current device and stream, given the tensors alone.

        Args:
            options: of the compiler, such as ``num_warps``.
            tensors: for each of the kernel's parameters that change from launch to launch, which of the tensors that are
                given then it is; what it does not name among the parameters stays as it is. They keep all but their addresses.
            arguments: all of the kernel's parameters, as in the first of these launches.
        """
        if not grid[0] * grid[1]:
            return launch_nothing
        return _Prepared(self, grid, options, {name: i for name, i in tensors.items() if name in arguments}, arguments)


class _Prepared:
    """A launch of a kernel in which all is fixed but some tensors' addresses."""

    def __init__(
        self, launcher: Launcher, grid: tuple[int, int], options: dict[str, int], tensors: dict[str, int], arguments: dict[str, Any]
    ) -> None:
        self._launcher = launcher
        self._may_skip_binder = launcher.may_skip_binder
        self._grid = grid
        self._options = options
        self._tensors = tensors
        # Tensors that do not change are kept alive with it; of the others only the layout is of use.
        self._arguments = {name: _like(value) if name in tensors else value for name, value in arguments.items()}
        # By device and by which addresses are aligned.
        self._again: dict[Hashable, Callable[[int, list[int]], None]] = {}

    def __call__(self, *tensors: Tensor) -> None:
        if not self._may_skip_binder or _is_hooked():
            self._ordinary(tensors)
            return
        addresses = [x.data_ptr() for x in tensors]
        any_address = 0
        for address in addresses:
            any_address |= address
        # What torch.cuda.current_device() returns, without asking whether CUDA has been initialised.
        device = torch._C._cuda_getDevice()
        # Mostly all are aligned.
        key = (device, *(address % _ALIGNMENT == 0 for address in addresses)) if any_address % _ALIGNMENT else device
        again = self._again.get(key)
        if again is None:
            self._first(key, device, tensors)
        else:
            again(torch._C._cuda_getCurrentRawStream(device), addresses)

    def _ordinary(self, tensors: Sequence[Tensor]) -> Any:
        """A launch by Triton; returns what it has compiled."""
        arguments = {name: value.passed() if type(value) in (Blocks, Words) else value for name, value in self._filled(tensors).items()}
        return self._launcher.kernel[self._grid](**arguments, **self._options)

    def _filled(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments with these tensors, in the order of the arguments."""
        filled = dict(self._arguments)
        for name, i in self._tensors.items():
            layout = filled[name]
            filled[name] = tensors[i] if layout is None else layout._replace(source=tensors[i])
        return filled

    def _first(self, key: Hashable, device: int, tensors: Sequence[Tensor]) -> None:
        """Launches where there is nothing yet to launch again, and remembers how."""
        launcher = self._launcher
        arguments = self._filled(tensors)
        ordered = {name: arguments[name] for name in launcher.roles}
        kind = device, *self._options.values(), *(_kind(ordered[name], role) for name, role in launcher.roles.items())
        if kind not in launcher.compiled:
            launcher.compiled[kind] = _compiled_form(self._ordinary(tensors))
            return
        compiled = launcher.compiled[kind]
        if compiled is None:
            self._ordinary(tensors)
        else:
            again = _again(compiled, self._grid, ordered, self._tensors)
            again(torch._C._cuda_getCurrentRawStream(device), [x.data_ptr() for x in tensors])
            self._again[key] = again


def launch_nothing(*tensors: Tensor) -> None:
    """A grid without programs."""


def _like(value: Any) -> Any:
    """What is kept of an argument that changes: nothing of a tensor, the layout of blocks or words."""
    return None if isinstance(value, Tensor) else value._replace(source=None)


def _is_hooked() -> bool:
    """Whether somebody, such as a profiler, wants to be called at launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool((enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True)))


def _kind(value: Any, role: str) -> Any:
    """What Triton specializes on of an argument.

    Args:
        role: "constant", "number" (what Triton specializes on where it is an integer: whether it is 1, a multiple of 16,
            and how wide), or "free" (its width alone).
    """
    if type(value) is Blocks:
        return value.source.dtype, value.block
    if type(value) is Words:
        return value.dtype, value.source.data_ptr() % _ALIGNMENT == 0
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % _ALIGNMENT == 0
    if role == "constant":
        return value
    if isinstance(value, float):
        # All are fp32.
        return "float"
    is_short = -(2**31) <= value < 2**31
    if role == "free":
        return is_short
    return 1 if value == 1 else 2 + (value % _ALIGNMENT == 0) + 2 * is_short


def _compiled_form(compiled: Any) -> _Compiled | None:
    """How to launch what Triton has compiled, or None if it is not as expected."""
    try:
        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return None
        no_hooks = None, None, None
        fixed = (
            compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None, compiled.packed_metadata, *no_hooks,
        )  # fmt: skip
        descriptors = compiled.metadata.tensordesc_meta or []
        launch = launcher.launch
        if not descriptors:
            return _Compiled(launch, fixed, None, [])
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        # The C function lies within one that takes descriptors apart.
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
        encode = triton.runtime.driver.active.utils.fill_tma_descriptor
        if any(m["fp4_padded"] for m in descriptors):
            return None
        encodings = [(m["swizzle"], m["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[m["elem_type"]], m["block_size"]) for m in descriptors]
        return _Compiled(launch, fixed, encode, encodings)
    except (AttributeError, ImportError, KeyError, TypeError):
        return None


def _again(
    compiled: _Compiled, grid: tuple[int, int], arguments: dict[str, Any], tensors: dict[str, int]
) -> Callable[[int, list[int]], None]:
    """``again(stream, addresses)``, which puts the addresses among the arguments and calls the C function.

    Args:
        arguments: all of the kernel's, in its order, of some launch of this kind.
        tensors: which address belongs to which of them; the others stay.
    """
    values: list[Any] = []
    pointers: list[tuple[int, int]] = []
    descriptors: list[tuple[int, int, Callable[[int], Any]]] = []
    encodings = iter(compiled.encodings)
    for name, value in arguments.items():
        place = len(values)
        if type(value) is Blocks:
            encoded = _encoder(compiled.encode, next(encodings), value)
            values += [encoded(value.source.data_ptr()), *value.shape, *value.strides]
            if name in tensors:
                descriptors.append((place, tensors[name], encoded))
            continue
        source = value.source if type(value) is Words else value
        values.append(source.data_ptr() if isinstance(source, Tensor) else source)
        if name in tensors:
            pointers.append((place, tensors[name]))
    grid_x, grid_y = grid
    launch, fixed = compiled.launch, compiled.fixed

    def again(stream: int, addresses: list[int]) -> None:
        # A list of its own, as several threads may launch at once.
        now = values.copy()
        for place, i in pointers:
            now[place] = addresses[i]
        for place, i, encoded in descriptors:
            now[place] = encoded(addresses[i])
        launch(grid_x, grid_y, 1, stream, *fixed, *now)

    return again


def _encoder(encode: Callable[..., Any] | None, encoding: tuple[Any, ...], blocks: Blocks) -> Callable[[int], Any]:
    """What is passed for a descriptor, of the address; it is made once for each buffer, which layers use again."""
    assert encode is not None  # there are encodings
    known: Memo[int, Any] = Memo(_MOST_ENCODED)
    shape, strides = blocks.shape, blocks.strides

    def encoded(address: int) -> Any:
        descriptor = known.get(address)
        # Values outside of the tensor are 0.
        return known.keep(address, encode(address, *encoding, shape, strides, 0)) if descriptor is None else descriptor

    return encoded
