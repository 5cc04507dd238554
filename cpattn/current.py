"""What is current in this thread: the device, and whether a CUDA graph captures."""

from __future__ import annotations

import torch
from torch import Tensor


def is_on_current_device(x: Tensor) -> bool:
    """Whether kernels can be launched on the tensor as it is: it is on the current CUDA device, or on none."""
    # What torch.cuda.current_device() returns, without asking whether CUDA has been initialised.
    return not x.is_cuda or x.get_device() == torch._C._cuda_getDevice()


def is_current(device: torch.device) -> bool:
    """Whether a CUDA device that has tensors is the current one."""
    index: int = torch._C._cuda_getDevice()
    return index == device.index


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures what is launched on the current stream of a device like this."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
