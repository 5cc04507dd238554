"""The dtype of attention under autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def as_under_autocast(x: Tensor) -> Tensor:
    """In autocast's dtype, as torch's own attention takes it: models rotate q and k in fp32 even then."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))
