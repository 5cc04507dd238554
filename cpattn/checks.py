"""What cp_attention, shard and unshard refuse, before anything is sent."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.errors import (
    CPError,
    GroupError,
    HeadCountError,
    OptionError,
    RowCountError,
    TensorMismatchError,
    UnsupportedError,
)
from cpattn.exchange.communicator import Communicator
from cpattn.metadata.batch import is_integer
from cpattn.metadata.cp_metadata import CPMetadata

# All that ranks tell each other of a call has to fit into a small message.
_LONGEST_LABEL = 100


def check_metadata(meta: Any) -> None:
    if not isinstance(meta, CPMetadata):
        raise CPError(f"meta is a {type(meta).__name__}; pass the CPMetadata of this rank: plan.metadata(cp_rank, device)")


def check_group(meta: CPMetadata, communicator: Communicator) -> None:
    plan = meta.plan
    if communicator.size != plan.cp_size:
        raise GroupError(
            f"the group has {communicator.size} ranks, but the plan has cp_size={plan.cp_size}; "
            "pass the context-parallel group, or plan for its size"
        )
    if communicator.rank != meta.cp_rank:
        raise GroupError(
            f"this process is rank {communicator.rank} of the group, but the metadata is that of cp_rank {meta.cp_rank}; "
            "build the metadata with the rank within the context-parallel group (not the global or tensor-parallel one)"
        )


def check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or x.ndim == 0:
        what = "a tensor without an axis" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TensorMismatchError(f"{name} is {what}; pass a torch tensor [rows, ...]")


def check_rows(
    name: str, x: Tensor, meta: CPMetadata, fix: str = "shard the input with cpattn.shard(x, meta), and let meta be that of this batch"
) -> None:
    if x.shape[0] != meta.rows:
        raise RowCountError(
            f"{name} has {x.shape[0]} rows, but this rank's metadata has {meta.rows} (rank {meta.cp_rank} of {meta.plan.cp_size}); {fix}"
        )


def check_device(name: str, x: Tensor, meta: CPMetadata) -> None:
    if x.device != meta.device:
        raise TensorMismatchError(
            f"{name} is on {x.device}, but the metadata is on {meta.device}; "
            f"build it where the tensors are: plan.metadata(cp_rank, device={str(x.device)!r})"
        )


def check_no_grad(**tensors: Tensor) -> None:
    needing = [name for name, x in tensors.items() if x.requires_grad]
    if needing and torch.is_grad_enabled():
        raise UnsupportedError(
            f"{', '.join(needing)} require{'s' * (len(needing) == 1)} a gradient, but cpattn computes the forward pass only; "
            "call it under torch.no_grad()"
        )


def check_kv(k: Tensor, v: Tensor | None, meta: CPMetadata) -> None:
    """Checks new keys and values by themselves."""
    for name, x in (("k", k), ("v", v)):
        if x is not None or name != "v":
            _check_heads(name, x, meta)
    check_no_grad(**{name: x for name, x in (("k", k), ("v", v)) if x is not None})
    check_qkv(k, k, v, k.shape[2] if v is None else None, meta)


def _check_heads(name: str, x: Any, meta: CPMetadata) -> None:
    if not isinstance(x, Tensor) or x.ndim != 3:
        what = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        raise TensorMismatchError(f"{name} {what}; pass a tensor [rows, heads, head_dim], without a batch axis")
    check_rows(name, x, meta)
    check_device(name, x, meta)


def check_qkv(q: Tensor, k: Tensor, v: Tensor | None, v_dim: Any, meta: CPMetadata) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None or name != "v":
            _check_heads(name, x, meta)
    check_no_grad(**{name: x for name, x in (("q", q), ("k", k), ("v", v)) if x is not None})
    if not q.dtype.is_floating_point or q.dtype != k.dtype or (v is not None and v.dtype != k.dtype):
        raise TensorMismatchError(f"q is {q.dtype}, k is {k.dtype}, v is {v if v is None else v.dtype}; all must be of one floating dtype")
    if v is None:
        if not is_integer(v_dim) or not 0 < v_dim <= k.shape[2]:
            raise TensorMismatchError(
                f"v is None and v_dim={v_dim!r}; where V is the first columns of K (MLA), v_dim says how many: from 1 to {k.shape[2]}"
            )
    elif v_dim is not None and v_dim != v.shape[2]:
        raise TensorMismatchError(f"v_dim={v_dim!r}, but v has head_dim {v.shape[2]}; v_dim is for v=None, where V is a part of K")
    v_head_dim = v_dim if v is None else v.shape[2]
    if q.shape[2] != k.shape[2] or 0 in (q.shape[2], v_head_dim):
        raise TensorMismatchError(
            f"q has head_dim {q.shape[2]}, k has {k.shape[2]}, v has {v_head_dim}; q and k must have the same, and none may be 0"
        )
    if v is not None and k.shape[1] != v.shape[1]:
        raise HeadCountError(f"k has {k.shape[1]} heads, v has {v.shape[1]}; they must have the same")
    if 0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1]:
        raise HeadCountError(f"q has {q.shape[1]} heads, k and v have {k.shape[1]}; query heads must be a multiple of key/value heads")


def check_label(label: Any) -> None:
    if label is not None and (not isinstance(label, str) or len(label) > _LONGEST_LABEL or "\0" in label):
        raise OptionError(
            f"label={label!r}; pass a name of this call that is the same on every rank, such as 'layer 3': a str of at most "
            f"{_LONGEST_LABEL} characters, or None"
        )


def check_overlap(overlap: Any, k: Tensor) -> None:
    if overlap is not None and (not is_integer(overlap) or overlap < 1 or k.shape[1] % overlap):
        raise OptionError(f"overlap={overlap!r}; pass a divisor of the {k.shape[1]} KV heads, 1 for no overlap, or None")


def parse_options(q: Tensor, meta: CPMetadata, scale: Any, window: Any, softcap: Any, sinks: Any) -> AttentionOptions:
    """Checks the options of a call and puts them into the form that backends take."""
    if scale is not None and not _is_positive(scale):
        raise OptionError(f"scale={scale!r}; pass a positive number, or None for 1 / sqrt(head_dim)")
    if window is not None and (not is_integer(window) or int(window) < 1):
        raise OptionError(
            f"window={window!r}; pass the number of keys that a query sees, its own included: an integer of at least 1, or None"
        )
    if softcap is not None and not _is_positive(softcap):
        raise OptionError(f"softcap={softcap!r}; pass a positive number, or None")
    if sinks is not None:
        if not isinstance(sinks, Tensor):
            raise OptionError(f"sinks is a {type(sinks).__name__}; pass a tensor with one logit for each query head, or None")
        if sinks.shape != q.shape[1:2]:
            raise HeadCountError(f"sinks has shape {tuple(sinks.shape)}, q has {q.shape[1]} heads; pass one logit for each query head")
        if not sinks.dtype.is_floating_point or sinks.device != q.device:
            raise TensorMismatchError(f"sinks is {sinks.dtype} on {sinks.device}; it must be floating and on q's device, {q.device}")
        check_no_grad(sinks=sinks)
    # A window as long as the longest request changes nothing, and without it any backend can serve the call.
    longest = meta.longest_request
    return AttentionOptions(
        scale=q.shape[2] ** -0.5 if scale is None else float(scale),
        window=int(window) if window is not None and window < longest else None,
        softcap=None if softcap is None else float(softcap),
        sinks=None if sinks is None else sinks.to(torch.promote_types(q.dtype, torch.float32)),
    )


def _is_positive(value: Any) -> bool:
    """Whether it is a finite real number above 0; a bool is no number."""
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value) and float(value) > 0
