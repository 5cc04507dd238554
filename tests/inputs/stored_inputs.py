"""Keys that are stored in other numbers, for tests of kernels that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.keys import Keys
from cpattn.moves import torch_moves
from cpattn.moves.stored_rows import StoredRows

E4M3, E5M2, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32


def stored_keys(k: Tensor, v: Tensor, stored: torch.dtype, scales: str) -> Keys:
    """Keys without pages."""
    k, v = k.nan_to_num(7.0), v.nan_to_num(7.0)
    out = StoredRows(torch.empty_like(k, dtype=stored), torch.empty_like(v, dtype=stored))
    heads = k.shape[1]
    of_heads = torch.linspace(0.01, 0.02, heads, device=k.device), torch.tensor(0.03, device=k.device).expand(heads)
    if scales == "token":
        out = out._replace(**{name: torch.empty(len(k), heads, device=k.device) for name in ("k_scale", "v_scale")})
        torch_moves.quantize(out, k, v, None, None)
    else:
        torch_moves.quantize(out, k, v, *(of_heads if scales == "head" else (None, None)))
        out = out._replace(k_scale=of_heads[0], v_scale=of_heads[1]) if scales == "head" else out
    assert out.v is not None
    return Keys(out.k, out.v, None, out.k_scale, out.v_scale)


def options_of(options: dict[str, Any], device: torch.device) -> AttentionOptions:
    moved: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    return AttentionOptions(0.2, **moved)
