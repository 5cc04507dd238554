"""A plain problem for tests of backends, with what a test changes of it, and the alignment of its spans."""

from __future__ import annotations

from typing import Any

import torch

from cpattn.problem import Problem
from cpattn.spans import Alignment

CAUSAL: frozenset[Alignment] = frozenset({"bottom_right"})


def problem(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **changes: Any) -> Problem:
    """Eight heads of 64, one hop, and nothing else asked for."""
    plain: dict[str, Any] = {"rows": 16, "q_heads": 8, "kv_heads": 8, "head_dim": 64, "v_head_dim": 64}
    return Problem(torch.device(device), dtype, **plain | changes)
