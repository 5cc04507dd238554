"""Which machine a device is taken to be, where nobody says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cpattn.attention.auto import able_backends
from cpattn.attention.backend import Backend
from cpattn.attention.flash_varlen import capability
from cpattn.attention.registry import BACKENDS
from cpattn.machine import A100, H100, H200, KernelCosts, Machine
from cpattn.metadata.problem_checks import check_is_problem, check_problem
from cpattn.problem import Problem

# How strategies compare there is taken from a machine that was measured; how long they take will differ.
UNKNOWN = replace(H100, name="h100-nvlink, as this machine is unknown", measured=False)


def machine_of(device: torch.device) -> Machine:
    """By compute capability and name, so that all ranks with GPUs of one kind find the same; for a CPU, and for GPUs that are none of
    :data:`cpattn.MACHINES`, a stated one.

    >>> machine_of(torch.device("cpu")).name
    'h100-nvlink, as this machine is unknown'
    """
    major = capability(device)[0] if device.type == "cuda" else 0
    if major == 9:
        # As words: GH200 has other memory and links than either.
        words = torch.cuda.get_device_name(device).split() if torch.cuda.is_available() else []
        return H200 if "H200" in words else UNKNOWN if "GH200" in words else H100
    return A100 if major == 8 else UNKNOWN


def knows_backends(machine: Machine, device: torch.device) -> bool:
    """Whether a machine's constants for backends hold for such a device."""
    return device.type == "cuda" and capability(device)[0] == machine.capability[0]


def constants_of(backend: Backend, machine: Machine, device: torch.device) -> KernelCosts | None:
    """Of one of the library's backends; None where the machine has none of it for such a device."""
    if BACKENDS.get(backend.name) is not backend or not knows_backends(machine, device):
        return None
    return next((kernel for kernel in machine.kernels if kernel.backend == backend.name), None)


def machine_for(problem: Problem) -> Machine:
    """The machine that a problem's device is taken to be, with the backends that can serve the problem here: what ``cpattn.plan`` takes
    as ``machine=`` for ``partition="auto"``.

    >>> import cpattn, torch
    >>> problem = cpattn.Problem(torch.device("cpu"), torch.float32, rows=0, q_heads=8, kv_heads=2, head_dim=64, v_head_dim=64)
    >>> machine = cpattn.machine_for(problem)
    >>> machine.name, [kernel.backend for kernel in machine.kernels]
    ('h100-nvlink, as this machine is unknown', ['triton'])
    >>> cpattn.plan([(0, 900)] * 8, cp_size=2, partition="auto", problem=problem, machine=machine).partition
    'whole'

    It is the same on every rank where ranks have GPUs of one kind and the same packages, as calls with ``"auto"`` need as well; else choose
    one machine for all. It asks for the packages that are installed, which takes long the first time.

    Args:
        problem: what the calls ask for; ``rows`` does not count.

    Returns:
        H100, H200 or A100 of :data:`cpattn.MACHINES` with the constants of those backends. For any other device, or where it has constants
        of none of them, an H100 with its first backend, by which ``"auto"`` compares there too.

    Raises:
        OptionError: problem is something else, or asks for what no call could. HeadCountError: query heads are no multiple of key/value
            heads. UnsupportedError: no backend can serve it here.
    """
    given: Any = problem
    check_is_problem(given)
    check_problem(problem)
    machine = machine_of(problem.device)
    names = []
    if knows_backends(machine, problem.device):
        able = {backend.name for backend in able_backends("auto", problem, frozenset({"bottom_right"}))}
        names = [kernel.backend for kernel in machine.kernels if kernel.backend in able]
    return machine.only(*names or [machine.kernels[0].backend])
