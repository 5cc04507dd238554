"""Which machine a device is taken to be, where nobody says."""

from __future__ import annotations

from dataclasses import replace

import torch

from cpattn.attention.flash_varlen import capability
from cpattn.machine import A100, H100, H200, Machine

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
