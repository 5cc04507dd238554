"""Numbers as they are stored, and back, by a Triton kernel: the bits of :mod:`cpattn.moves.torch_quantize`, in one launch."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor, uint8

from cpattn.kernels.arguments import Words
from cpattn.kernels.launch import Launcher, LaunchFunction, launch_nothing
from cpattn.kernels.ragged_attention import device_properties
from cpattn.kernels.stored_numbers import fp8_is_native, fp8_kind, stored_rows_kernel
from cpattn.moves.stored_rows import StoredRows

# Numbers that one program converts: 32 for each of its 128 threads.
_NUMBERS = 4096

_stored_rows = Launcher(stored_rows_kernel)
_TENSORS = ("plain_k", "plain_v", "stored_k", "stored_v", "k_scale", "v_scale")


def quantize(out: StoredRows, k: Tensor, v: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """See :meth:`cpattn.moves.moves.Moves.quantize`."""
    if out.k_scale is None:
        _launch(StoredRows(out.k, out.v, k_scale, v_scale), k, v, "store")
    else:
        _launch(out, k, v, "store with new scales")


def dequantize(k: Tensor, v: Tensor | None, stored: StoredRows) -> None:
    """See :meth:`cpattn.moves.moves.Moves.dequantize`."""
    _launch(stored, k, v, "read")


def _launch(stored: StoredRows, k: Tensor, v: Tensor | None, what: str) -> None:
    values, stored_values = (k, stored.k) if v is None or stored.v is None else (v, stored.v)
    # What is not there is not looked at.
    k_scale = k if stored.k_scale is None else stored.k_scale
    v_scale = k_scale if stored.v_scale is None else stored.v_scale
    tensors = k, values, stored.k, stored_values, k_scale, v_scale
    key = *[(x.shape, x.stride(), x.dtype) for x in tensors], v is None, stored.k_scale is None, what
    launch = _stored_rows.prepared.get(key) or _stored_rows.prepared.keep(
        key, _prepare(tensors, v is not None, stored.k_scale is not None, what)
    )
    launch(*tensors)


def _prepare(tensors: tuple[Tensor, ...], has_v: bool, has_scale: bool, what: str) -> LaunchFunction:
    k, v, stored_k, stored_v, k_scale, v_scale = tensors
    rows, heads, dim = k.shape
    v_dim = v.shape[2]
    if not rows:
        return launch_nothing
    d_padded, dv_padded = triton.next_power_of_2(dim), triton.next_power_of_2(v_dim)
    block = max(1, _NUMBERS // max(d_padded, dv_padded))
    kind = fp8_kind(stored_k.dtype)
    as_bytes: Callable[[Tensor], Tensor | Words] = (lambda x: Words(x, uint8)) if kind else (lambda x: x)
    interpreted = not _stored_rows.roles
    strides: dict[str, Any] = {
        f"{name}_stride_{axis}": x.stride()[-3 + i]
        for name, x in zip(_TENSORS[:4], tensors, strict=False)
        for i, axis in enumerate(("row", "head"))
    }
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        of_row, of_head = scale.stride() if scale.ndim == 2 else (0, scale.stride(-1))
        strides |= {f"{name}_stride_row": of_row, f"{name}_stride_head": of_head}
    return _stored_rows.prepare(
        (triton.cdiv(rows * heads, block), 2 if has_v else 1), {}, {name: i for i, name in enumerate(_TENSORS)},
        plain_k=k, plain_v=v, stored_k=as_bytes(stored_k), stored_v=as_bytes(stored_v), k_scale=k_scale, v_scale=v_scale,
        num_rows=rows, **strides,
        HEADS=heads, D=dim, DV=v_dim, D_PADDED=d_padded, DV_PADDED=dv_padded, BLOCK_R=block,
        FP8=kind, NATIVE=fp8_is_native(device_properties(k.device)[1], interpreted),
        SCALE=has_scale, NEW_SCALE=what == "store with new scales", STORE=what != "read",
    )  # fmt: skip
