"""Whether tensors are moved and merged by the Triton kernels; each of those has a twin in plain torch, which defines it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

from cpattn.installed import is_installed


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device."""
    return device.type == "cuda" and is_installed("triton")


@cache
def kernel_module(name: str) -> Any:
    """A module of this package, imported when it is first used, as Triton need not be there; an import statement takes half a
    microsecond at every call."""
    return import_module(f"cpattn.kernels.{name}")
