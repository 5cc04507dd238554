"""What a kernel returns, checked on the host: a pair, its shapes, dtypes and device. Nothing waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpattn.errors import BackendError
from cpattn.stored import result_dtype

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_returned(name: str, returned: Any, q: Tensor, v: Tensor, lse_heads_first: bool = False) -> tuple[Tensor, Tensor]:
    """``(out [T, Hq, Dv], lse [T, Hq])`` of what a kernel returned for q ``[T, Hq, D]`` and v ``[..., Dv]``.

    Args:
        name: of the backend, for messages.
        lse_heads_first: whether the LSE is to be ``[Hq, T]``; it is turned.

    Raises:
        BackendError: it is something else. Where T == Hq, shapes cannot tell which axis of the LSE is which.
    """
    if not isinstance(returned, (tuple, list)) or len(returned) != 2 or not all(isinstance(x, Tensor) for x in returned):
        raise BackendError(
            f"backend={name!r} returned {_described(returned)}; a kernel returns a pair of tensors: return (out, lse) and nothing else"
        )
    out, lse = returned
    _check_out(name, out, q, v)
    _check_lse(name, lse, q, lse_heads_first)
    for what, x in (("out", out), ("lse", lse)):
        if x.device != q.device:
            raise BackendError(f"backend={name!r} returned {what} on {x.device}, but q is on {q.device}; return it on q's device")
    return out, lse.transpose(0, 1) if lse_heads_first else lse


def _check_out(name: str, out: Tensor, q: Tensor, v: Tensor) -> None:
    expected = (*q.shape[:2], v.shape[-1])
    if out.shape != expected:
        raise BackendError(
            f"backend={name!r} returned out of shape {tuple(out.shape)}, but it must be [rows, Hq, Dv] = {expected}; return one output "
            "for each row and head of q, padding included, as wide as v"
        )
    if out.dtype not in _FLOATING:
        raise BackendError(f"backend={name!r} returned out in {out.dtype}; it must be float64, float32, bfloat16 or float16: convert it")


def _check_lse(name: str, lse: Tensor, q: Tensor, heads_first: bool) -> None:
    rows, heads = q.shape[:2]
    expected, turned = ((heads, rows), (rows, heads)) if heads_first else ((rows, heads), (heads, rows))
    axes = "[Hq, rows]" if heads_first else "[rows, Hq]"
    if lse.shape != expected:
        fix = "return one LSE for each row and head of q, padding included"
        if lse.shape == turned:
            fix = "make the backend without lse_heads_first" if heads_first else "make it with custom_backend(..., lse_heads_first=True)"
        raise BackendError(f"backend={name!r} returned lse of shape {tuple(lse.shape)}, but it must be {axes} = {expected}; {fix}")
    precise = torch.promote_types(result_dtype(q.dtype), torch.float32)
    if lse.dtype != precise:
        raise BackendError(
            f"backend={name!r} returned lse in {lse.dtype} for q in {q.dtype}, but it must be {precise}; return it as the kernel sums it, "
            "since rounding it would cost merged results their precision"
        )


def _described(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {len(x)}: {', '.join(type(part).__name__ for part in x) or 'nothing'}"
    return "None" if x is None else f"a {type(x).__name__}"
