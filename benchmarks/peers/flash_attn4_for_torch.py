"""FlashAttention-4 as torch wants it where it takes the place of torch's own flash kernel: a module with these two names."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def _flash_attn_fwd(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """torch expects two results, and newer releases return more."""
    from flash_attn.cute.interface import _flash_attn_fwd as forward

    out, lse, *_ = forward(*arguments, **named)
    return out, lse


def _flash_attn_bwd(*arguments: Any, **named: Any) -> Any:
    raise NotImplementedError("only forward calls are timed")
