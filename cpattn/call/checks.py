"""What cp_attention, shard and unshard refuse, before anything is sent."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.call.layout_hints import hint_heads
from cpattn.call.memory_overlap import overlaps_itself
from cpattn.call.tensor_kinds import check_kind, in_words
from cpattn.errors import (
    CPError,
    GroupError,
    HeadCountError,
    OptionError,
    RowCountError,
    TensorMismatchError,
    UnsupportedError,
    shown,
)
from cpattn.metadata.batch import is_integer
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.stored import result_dtype
from cpattn.transports.transport import Transport

# All that ranks tell each other of a call has to fit into a small message.
_LONGEST_LABEL = 100
_SHARD_FIRST = "shard the input with cpattn.shard(x, meta), and let meta be that of this batch"
# Kernels compute in fp32. Its range, with some room for what they multiply these numbers by.
_LEAST_FACTOR, _LARGEST_FACTOR = 1e-30, 1e30


def check_metadata(meta: Any) -> None:
    if not isinstance(meta, CPMetadata):
        raise CPError(f"meta is a {type(meta).__name__}; pass the CPMetadata of this rank: plan.metadata(cp_rank, device)")


def check_group(meta: CPMetadata, transport: Transport) -> None:
    plan = meta.plan
    if transport.size != plan.cp_size:
        raise GroupError(
            f"the group has {transport.size} ranks, but the plan has cp_size={plan.cp_size}; "
            "pass the context-parallel group, or plan for its size"
        )
    if transport.rank != meta.cp_rank:
        raise GroupError(
            f"this process is rank {transport.rank} of the group, but the metadata is that of cp_rank {meta.cp_rank}; "
            "build the metadata with the rank within the context-parallel group (not the global or tensor-parallel one)"
        )


def check_tensor(name: str, x: Any) -> None:
    check_kind(name, x)
    if not isinstance(x, Tensor) or x.ndim == 0:
        what = "a tensor without an axis" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TensorMismatchError(f"{name} is {what}; pass a torch tensor [rows, ...]")


def check_rows(name: str, x: Tensor, meta: CPMetadata, fix: str) -> None:
    if x.shape[0] != meta.rows:
        raise RowCountError(
            f"{name} has {x.shape[0]} rows, but this rank's metadata has {meta.rows} (rank {meta.cp_rank} of {meta.plan.cp_size}); {fix}"
        )


def check_whole(name: str, x: Tensor, dim: int, meta: CPMetadata) -> None:
    """That an axis holds all new tokens of the batch, once, and as much padding as engines may add."""
    plan, length = meta.plan, x.shape[dim]
    # Engines round their token count up; what all ranks' rows can hold is as far as that can go without being a mistake.
    most = max(plan.num_tokens, plan.cp_size * meta.rows)
    if plan.num_tokens <= length <= most:
        return
    others = [other for other in range(x.ndim) if other != dim and plan.num_tokens <= x.shape[other] <= most]
    if length == meta.rows and not others:
        fix = " (it has as many rows as this rank: sharded already, or an output that cpattn.unshard has yet to make whole?)"
    elif others:
        fix = f"; if its tokens lie along axis {others[0]}: cpattn.shard({name}, meta, dim={others[0]})"
    elif length > most:
        cut = f"{name}.narrow({dim}, 0, {plan.num_tokens})" if dim else f"{name}[:{plan.num_tokens}]"
        fix = (
            f", and padding up to {most} rows in all; cut the padding off: {cut}, or, where the engine rounds its "
            "token count up to a multiple of n, plan with pad_to=n"
        )
    else:
        fix = ""
    raise RowCountError(
        f"{name} has shape {tuple(x.shape)}, but the batch has {plan.num_tokens} new tokens (prefixes not counted); "
        f"shard takes the rows of the whole batch, once{f' along axis {dim}' if dim else ''}{fix}"
    )


def parse_dim(dim: Any, x: Tensor) -> int:
    """An axis of the tensor, counted from the front."""
    if not is_integer(dim) or not -x.ndim <= dim < x.ndim:
        raise OptionError(
            f"dim={shown(dim)}, but x has shape {tuple(x.shape)}; pass the axis along which its tokens lie, an integer from {-x.ndim} "
            f"to {x.ndim - 1}"
        )
    return int(dim) % x.ndim


def check_device(name: str, x: Tensor, meta: CPMetadata) -> None:
    if x.device != meta.device:
        fix = f"build it where the tensors are: plan.metadata(cp_rank, device={str(x.device)!r})"
        raise TensorMismatchError(
            f"{name} is on {x.device}, but the metadata is on {meta.device}; "
            f"{'a meta tensor has a shape but no data: pass one with data' if x.is_meta else fix}"
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
    _check_each({"k": k, "v": v}, meta)
    check_together(k, k, v, k.shape[2] if v is None else None)


def check_heads(name: str, x: Any, meta: CPMetadata) -> None:
    """The kind, shape and device of q, k or v."""
    check_kind(name, x)
    if not isinstance(x, Tensor) or x.ndim != 3:
        hint = hint_heads(name, x, meta.rows) if isinstance(x, Tensor) else ""
        raise TensorMismatchError(f"{name} {in_words(x)}; pass a tensor [rows, heads, head_dim], without a batch axis{hint}")
    check_rows(name, x, meta, f"{_SHARD_FIRST}{hint_heads(name, x, meta.rows)}")
    check_device(name, x, meta)


def check_qkv(q: Tensor, k: Tensor | None, v: Tensor | None, v_dim: Any, meta: CPMetadata) -> None:
    _check_each({"q": q, "k": k, "v": v}, meta)
    assert k is not None  # checked
    check_together(q, k, v, v_dim, head_shares(meta))


def _check_each(tensors: dict[str, Tensor | None], meta: CPMetadata) -> None:
    """Each by itself; V may be a part of K, and so None."""
    for name, x in tensors.items():
        if x is not None or name != "v":
            check_heads(name, x, meta)
    check_no_grad(**{name: x for name, x in tensors.items() if x is not None})


def head_shares(meta: CPMetadata) -> int:
    """How many ranks share the query heads."""
    plan = meta.plan
    return plan.cp_size if plan.all_queries else 1


def check_together(q: Tensor, k: Tensor, v: Tensor | None, v_dim: Any, shares: int = 1, *, in_one_dtype: bool = True) -> None:
    """That the dtypes, heads and head dims of q, k and v go together; k and v may be pages, too: their last axes count, and they may be
    in another dtype than q.

    Args:
        shares: of the query heads, of which q has one.
    """
    if not q.dtype.is_floating_point or (in_one_dtype and q.dtype != k.dtype) or (v is not None and v.dtype != k.dtype):
        raise TensorMismatchError(f"q is {q.dtype}, k is {k.dtype}, v is {v if v is None else v.dtype}; all must be of one floating dtype")
    if v is None:
        if not is_integer(v_dim) or not 0 < v_dim <= k.shape[-1]:
            raise TensorMismatchError(
                f"v is None and v_dim={shown(v_dim)}; where V is the first columns of K (MLA), v_dim says how many: from 1 to {k.shape[-1]}"
            )
    elif v_dim is not None and v_dim != v.shape[-1]:
        raise TensorMismatchError(f"v_dim={shown(v_dim)}, but v has head_dim {v.shape[-1]}; v_dim is for v=None, where V is a part of K")
    v_head_dim = v_dim if v is None else v.shape[-1]
    if q.shape[2] != k.shape[-1] or 0 in (q.shape[2], v_head_dim):
        raise TensorMismatchError(
            f"q has head_dim {q.shape[2]}, k has {k.shape[-1]}, v has {v_head_dim}; q and k must have the same, and none may be 0"
        )
    if v is not None and k.shape[-2] != v.shape[-2]:
        raise HeadCountError(f"k has {k.shape[-2]} heads, v has {v.shape[-2]}; they must have the same")
    if 0 in (q.shape[1], k.shape[-2]) or q.shape[1] * shares % k.shape[-2]:
        of_all = f" on each of {shares} ranks, {q.shape[1] * shares} in all" if shares > 1 else ""
        raise HeadCountError(
            f"q has {q.shape[1]} heads{of_all}, k and v have {k.shape[-2]}; query heads must be a multiple of key/value heads"
        )


def check_label(label: Any) -> None:
    if label is not None and (not isinstance(label, str) or len(label) > _LONGEST_LABEL or "\0" in label):
        raise OptionError(
            f"label={shown(label)}; pass a name of this call that is the same on every rank, such as 'layer 3': a str of at most "
            f"{_LONGEST_LABEL} characters, or None"
        )


def check_overlap(overlap: Any, k: Tensor) -> None:
    if overlap is not None and (not is_integer(overlap) or overlap < 1 or k.shape[1] % overlap):
        raise OptionError(f"overlap={shown(overlap)}; pass a divisor of the {k.shape[1]} KV heads, 1 for no overlap, or None")


def check_out(out: Any, q: Tensor, v_head_dim: int) -> None:
    """Memory for a result ``[rows, Hq, Dv]``."""
    shape = (*q.shape[:2], v_head_dim)
    if not isinstance(out, Tensor):
        raise TensorMismatchError(f"out is a {type(out).__name__}; pass a tensor {shape} that the result is written to, or None")
    check_kind("out", out)
    dtype = result_dtype(q.dtype)
    if out.shape != shape or out.dtype != dtype or out.device != q.device:
        raise TensorMismatchError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}; the result is {shape} {dtype} on {q.device}: pass memory for that"
        )
    check_no_grad(out=out)
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise TensorMismatchError(
            "out was made under torch.inference_mode(), and cannot be written outside of it; make it before entering that mode, or "
            "make this call within it"
        )
    if overlaps_itself(out):
        raise TensorMismatchError(
            f"out has shape {tuple(out.shape)} and strides {out.stride()}, so that several results lie in the same memory; pass a "
            "tensor with an element of memory for each"
        )


def parse_options(
    q: Tensor, meta: CPMetadata, scale: Any, window: Any, softcap: Any, sinks: Any, wants_window: bool = False
) -> AttentionOptions:
    """Checks the options of a call and puts them into the form that backends take.

    Args:
        wants_window: whether a window that reaches all keys is kept, as one of the longest request.
    """
    if scale is not None and not _is_factor(scale):
        raise OptionError(f"scale={shown(scale)}; {_FACTOR_RULE}, or None for 1 / sqrt(head_dim)")
    if window is not None and (not is_integer(window) or int(window) < 1):
        of_pair = " (of flash-attn's pair (left, right): left + 1, or None where left is -1)" if isinstance(window, (tuple, list)) else ""
        raise OptionError(
            f"window={shown(window)}; pass the number of keys that a query sees, its own included: an integer of at least 1, or None"
            f"{of_pair}"
        )
    if softcap is not None and not _is_factor(softcap):
        raise OptionError(f"softcap={shown(softcap)}; {_FACTOR_RULE}, or None for no cap")
    if sinks is not None:
        if not isinstance(sinks, Tensor):
            raise OptionError(f"sinks is a {type(sinks).__name__}; pass a tensor with one logit for each query head, or None")
        check_kind("sinks", sinks)
        if sinks.shape != q.shape[1:2]:
            raise HeadCountError(f"sinks has shape {tuple(sinks.shape)}, q has {q.shape[1]} heads; pass one logit for each query head")
        if not sinks.dtype.is_floating_point or sinks.device != q.device:
            raise TensorMismatchError(f"sinks is {sinks.dtype} on {sinks.device}; it must be floating and on q's device, {q.device}")
        check_no_grad(sinks=sinks)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    # Kernels multiply by it before they take the tanh.
    if softcap is not None and not _LEAST_FACTOR <= scale / softcap <= _LARGEST_FACTOR:
        raise OptionError(
            f"scale={scale!r} and softcap={softcap!r}; their ratio must be from {_LEAST_FACTOR:g} to {_LARGEST_FACTOR:g} as kernels "
            "compute in fp32: pass the model's own"
        )
    # A window as long as the longest request changes nothing, and without it any backend can serve the call.
    longest = meta.longest_request
    if window is not None and window >= longest:
        window = max(1, longest) if wants_window else None
    return AttentionOptions(
        scale=scale,
        window=None if window is None else int(window),
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(torch.promote_types(result_dtype(q.dtype), torch.float32)),
    )


_FACTOR_RULE = f"pass a positive number, from {_LEAST_FACTOR:g} to {_LARGEST_FACTOR:g} as kernels compute in fp32"


def _is_factor(value: Any) -> bool:
    """Whether it is a real number that scores can be multiplied by in fp32; a bool is no number, and NaN is in no range."""
    is_number = type(value) is not bool and isinstance(value, Real)
    # Compared as it is: an integer may be too large for a float.
    return is_number and bool(_LEAST_FACTOR <= value <= _LARGEST_FACTOR)
