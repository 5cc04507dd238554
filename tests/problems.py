"""A plain problem and a plain workload for tests of backends, with what a test changes of them."""

from __future__ import annotations

from typing import Any

import torch

from cpattn.attention.auto import Workload
from cpattn.problem import Problem


def problem(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **changes: Any) -> Problem:
    """Eight heads of 64, one hop, and nothing else asked for."""
    plain: dict[str, Any] = {"rows": 16, "q_heads": 8, "kv_heads": 8, "head_dim": 64, "v_head_dim": 64}
    return Problem(torch.device(device), dtype, **plain | changes)


def workload(*alignments: Any, **changes: Any) -> Workload:
    """Of causal spans, if nothing else is said."""
    return Workload(frozenset(alignments or ("bottom_right",)), **changes)
