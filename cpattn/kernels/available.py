"""Whether tensors are moved and merged by the Triton kernels; each of those has its definition in plain torch."""

from __future__ import annotations

from functools import cache

import torch

from cpattn.installed import is_installed


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device."""
    return device.type == "cuda" and is_installed("triton")
