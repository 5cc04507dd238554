"""Launching a compiled Triton kernel again without Triton's binder, which takes tens of microseconds on the host.

A kernel's wrapper prepares a launch once for each layout of its arguments, and keeps it: all layers of a batch then only
put their tensors' addresses in. Of those Triton specializes on whether they are multiples of 16, of the other arguments
on dtypes, constants, and whether integers are multiples of 16. The first launch of each such kind goes through Triton,
which compiles. Later ones go to the CUDA driver (:mod:`cpattn.kernels.direct_launch`), if that is right with this release
of Triton (:mod:`cpattn.kernels.release`), and the kernel is as expected.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton import knobs

from cpattn.kernels.arguments import Blocks, Words
from cpattn.kernels.direct_launch import Compiled, NotAsExpectedError, again_form, compiled_form
from cpattn.kernels.release import COMPILER_OPTIONS, DIRECT_LAUNCH
from cpattn.memo import Memo
from cpattn.noted import Launch, of_thread, within_step

_ALIGNMENT = 16
# Launches that a kernel's wrapper remembers: a few batches' worth.
_MOST_PREPARED = 256

# What launches a kernel, given its tensors.
LaunchFunction: TypeAlias = "Callable[..., None]"


class Launcher:
    """A kernel and the forms of it that have been compiled.

    Attributes:
        prepared: what the kernel's wrapper has prepared, by all that decides a launch beside the tensors' addresses.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.prepared: Memo[Hashable, LaunchFunction] = Memo(_MOST_PREPARED)
        # For each kind what has been compiled, or None where only Triton's own launch will do.
        self.compiled: dict[Hashable, Compiled | None] = {}
        # All that Triton has compiled. From 3.8 on it unloads what nobody holds, and threads that launch the same kind for the first
        # time side by side each compile it: one would be dropped, which others may have prepared launches of by then.
        self.kernels: dict[int, Any] = {}
        # In the interpreter kernels have no parameters to look at.
        self.roles = {
            p.name: "constant" if p.is_constexpr else "free" if p.do_not_specialize else "number" for p in getattr(kernel, "params", [])
        }
        self.may_skip_binder = bool(self.roles) and DIRECT_LAUNCH.verdict().used is not False

    def prepare(
        self,
        grid: tuple[int, int],
        options: dict[str, int],
        tensors: dict[str, int],
        *,
        of_each_launch: Callable[[], Tensor] | None = None,
        **arguments: Any,
    ) -> LaunchFunction:
        """What launches ``grid`` programs on the current device and stream, given the tensors alone.

        Args:
            options: of the compiler, such as ``num_warps``.
            tensors: for each of the kernel's parameters that change from launch to launch, which of the tensors that are
                given then it is. Parameters that it does not name stay as they are. They keep all but their addresses.
            of_each_launch: gives one more of these tensors, the last, at each launch.
            arguments: all of the kernel's parameters, as in the first of these launches.
        """
        if not grid[0] * grid[1]:
            return launch_nothing
        named = {name: i for name, i in tensors.items() if name in arguments}
        return _Prepared(self, grid, options, named, arguments, of_each_launch)


class _Prepared:
    """A launch of a kernel in which all is fixed but some tensors' addresses."""

    def __init__(
        self,
        launcher: Launcher,
        grid: tuple[int, int],
        options: dict[str, int],
        tensors: dict[str, int],
        arguments: dict[str, Any],
        of_each_launch: Callable[[], Tensor] | None,
    ) -> None:
        self._launcher = launcher
        self._may_skip_binder = launcher.may_skip_binder
        self._grid = grid
        self._options = options
        self._tensors = tensors
        self._of_each_launch = of_each_launch
        # Tensors that do not change are kept alive with it; of the others only the layout is of use.
        self._arguments = {name: _like(value) if name in tensors else value for name, value in arguments.items()}
        # By device and by which addresses are aligned.
        self._again: dict[Hashable, Callable[[int, list[int]], None]] = {}

    def __call__(self, *tensors: Tensor) -> None:
        if of_thread.steps is not None:
            of_thread.steps.note(Launch(self, tensors))
        if self._of_each_launch is not None:
            tensors = (*tensors, self._of_each_launch())
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
        with within_step():
            return self._launcher.kernel[self._grid](**arguments, **self._options, **COMPILER_OPTIONS)

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
        kind = device, *self._options.values(), *_kinds(arguments, launcher.roles)
        if kind not in launcher.compiled:
            kernel = self._ordinary(tensors)
            launcher.kernels[id(kernel)] = kernel
            if DIRECT_LAUNCH.is_open(torch.device("cuda", device)):
                launcher.compiled[kind] = _form_or_none(kernel, {name: arguments[name] for name in launcher.roles}, launcher.roles)
            elif DIRECT_LAUNCH.verdict().used is False:
                launcher.compiled[kind] = None
            # Else it is asked again later: nothing can be tried out while a graph captures.
            return
        compiled = launcher.compiled[kind]
        if compiled is None:
            # It is not asked again.
            self._may_skip_binder = False
            self._ordinary(tensors)
        else:
            again = again_form(compiled, device, self._grid, arguments, self._tensors, len(tensors))
            again(torch._C._cuda_getCurrentRawStream(device), [x.data_ptr() for x in tensors])
            self._again[key] = again


def _form_or_none(kernel: Any, arguments: dict[str, Any], roles: dict[str, str]) -> Compiled | None:
    try:
        return compiled_form(kernel, arguments, roles)
    except NotAsExpectedError:
        return None


def launch_nothing(*tensors: Tensor) -> None:
    """A grid without programs."""


def _like(value: Any) -> Any:
    """What is kept of an argument that changes: nothing of a tensor, the layout of blocks or words."""
    return None if isinstance(value, Tensor) else value._replace(source=None)


def _is_hooked() -> bool:
    """Whether somebody, such as a profiler, wants to be called at launches."""
    runtime = knobs.runtime
    enter, leave = getattr(runtime, "launch_enter_hook", None), getattr(runtime, "launch_exit_hook", None)
    return bool((enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True)))


def _kinds(arguments: dict[str, Any], roles: dict[str, str]) -> list[Any]:
    """What Triton specializes on of each argument. In one loop, as a kernel has dozens of them, of which each batch has some of its own.

    Args:
        roles: "constant", "number" (what Triton specializes on where it is an integer: whether it is 1, a multiple of 16,
            and how wide), or "free" (its width alone).
    """
    kinds: list[Any] = []
    for name, role in roles.items():
        value = arguments[name]
        if role == "constant":
            kinds.append(value)
        elif type(value) is int or not isinstance(value, (Blocks, Words, Tensor, float)):
            is_short = -(2**31) <= value < 2**31
            kinds.append(is_short if role == "free" else 1 if value == 1 else 2 + (value % _ALIGNMENT == 0) + 2 * is_short)
        elif isinstance(value, Blocks):
            kinds.append((value.source.dtype, value.block))
        elif isinstance(value, Words):
            kinds.append((value.dtype, value.source.data_ptr() % _ALIGNMENT == 0))
        elif isinstance(value, float):
            # All are fp32.
            kinds.append("float")
        else:
            kinds.append((value.dtype, value.data_ptr() % _ALIGNMENT == 0))
    return kinds


def _problem(device: torch.device) -> str | None:
    """It compiles kernels: imported only where it is needed."""
    from cpattn.kernels.self_check import problem_of_direct_launch

    return problem_of_direct_launch(device, Launcher)


DIRECT_LAUNCH.check = _problem
