"""Whether a device can be used on this machine."""

from __future__ import annotations

from typing import Any

import torch

from cpattn.errors import CPError
from cpattn.metadata.batch import is_integer

_CPU = torch.device("cpu")


def parse_device(device: Any) -> torch.device:
    """A device on which a tensor can be made. Asked for here, as torch's own errors do not say which argument was wrong."""
    if device == "cpu" or device == _CPU:
        return _CPU
    if isinstance(device, (str, torch.device)) or is_integer(device):
        try:
            return torch.empty(0, device=device).device
        # What torch raises depends on its build and on the kind of device.
        except Exception as error:
            why = str(error).partition("\n")[0].rstrip(". ")
            raise CPError(f"device={device!r} cannot be used on this machine ({why}); pass one of {_usable_devices()}") from error
    raise CPError(f"device={device!r} is a {type(device).__name__}; pass a torch.device or its name, one of {_usable_devices()}")


def _usable_devices() -> str:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ", ".join(["'cpu'", *(f"'cuda:{index}'" for index in range(gpus))]) + ("" if gpus else " (torch finds no CUDA device)")
