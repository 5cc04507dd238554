"""The calls that a model makes: shard the input, attend, unshard the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cpattn import checks
from cpattn.attention.backend import AttentionOptions, Backend, Call
from cpattn.attention.registry import choose_backend, explain_choice
from cpattn.errors import RowCountError, UnsupportedError
from cpattn.exchange.agreement import agree
from cpattn.exchange.communicator import Communicator, as_communicator
from cpattn.exchange.driver import run_steps
from cpattn.exchange.message import gather_rows_
from cpattn.exchange.registry import candidate_strategies, default_overlap
from cpattn.exchange.strategy import ExchangeInputs, Strategy
from cpattn.kv_cache import PackedKV
from cpattn.metadata.cp_metadata import CPMetadata

Group: TypeAlias = dist.ProcessGroup | DeviceMesh | Communicator | None
T = TypeVar("T")


def shard(x: Tensor, meta: CPMetadata) -> Tensor:
    """This rank's rows of a tensor that holds all new tokens of the batch.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 6)], cp_size=2, cp_rank=0)
    >>> cpattn.shard(torch.arange(6), meta)
    tensor([0, 1, 5])

    Args:
        x: ``[plan.num_tokens, ...]`` of any dtype, request after request; the same on every rank.
        meta: this rank's metadata.

    Returns:
        ``[meta.rows, ...]`` in local order, zeros on padding. A copy.

    Raises:
        RowCountError: x has another number of rows than the batch has new tokens.
        TensorMismatchError: x is on another device than the metadata.
    """
    checks.check_metadata(meta)
    plan = meta.plan
    checks.check_tensor("x", x)
    if len(x) != plan.num_tokens:
        raise RowCountError(
            f"x has shape {tuple(x.shape)}, but the batch has {plan.num_tokens} new tokens (prefixes not counted); "
            "shard takes the rows of the whole batch, once"
        )
    checks.check_device("x", x, meta)
    if x.requires_grad and torch.is_grad_enabled():
        tokens = x.index_select(0, meta.token_index[: meta.num_tokens])
        return torch.cat([tokens, x.new_zeros(meta.rows - meta.num_tokens, *x.shape[1:])])
    local = x.new_empty(meta.rows, *x.shape[1:])
    gather_rows_(local[: meta.num_tokens], x.contiguous(), meta.token_index[: meta.num_tokens])
    if meta.rows > meta.num_tokens:
        local[meta.num_tokens :] = 0
    return local


def unshard(x: Tensor, meta: CPMetadata, *, group: Group = None, check: bool = False) -> Tensor:
    """Brings the rows of all ranks together, in the original order, on every rank. A collective call.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 3)], cp_size=1, cp_rank=0)
    >>> cpattn.unshard(torch.tensor([5.0, 6.0, 7.0]), meta)
    tensor([5., 6., 7.])

    Args:
        x: ``[meta.rows, ...]`` of any dtype, in local order; what padding rows hold does not matter.
        meta: this rank's metadata.
        group: as in :func:`cp_attention`.
        check: as in :func:`cp_attention`.

    Returns:
        ``[plan.num_tokens, ...]``.

    Raises:
        RowCountError, TensorMismatchError, GroupError, UnsupportedError (a gradient is required), DisagreementError.
    """
    checks.check_metadata(meta)
    communicator = as_communicator(group, meta.plan.cp_size)

    def validate() -> str:
        checks.check_group(meta, communicator)
        checks.check_tensor("x", x)
        checks.check_rows("x", x, meta)
        checks.check_device("x", x, meta)
        checks.check_no_grad(x=x)
        return f"unshard, {tuple(x.shape[1:])} {x.dtype}"

    _validated(validate, str, meta, communicator, check)
    if meta.plan.cp_size == 1:
        return x[: meta.num_tokens].clone()
    gathered = communicator.buffer("unshard", (communicator.size * meta.rows, *x.shape[1:]), x.dtype, x.device)
    if gathered.numel():
        communicator.all_gather(gathered, x.contiguous()).wait()
    out = x.new_empty(meta.plan.num_tokens, *x.shape[1:])
    gather_rows_(out, gathered, meta.restore_index)
    return out


@overload
def cp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: CPMetadata,
    *,
    group: Group = ...,
    kv_cache: PackedKV | None = ...,
    strategy: str = ...,
    backend: str = ...,
    overlap: int | None = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    check: bool = ...,
) -> Tensor: ...


@overload
def cp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: CPMetadata,
    *,
    group: Group = ...,
    kv_cache: PackedKV | None = ...,
    strategy: str = ...,
    backend: str = ...,
    overlap: int | None = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    check: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def cp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: CPMetadata,
    *,
    group: Group = None,
    kv_cache: PackedKV | None = None,
    strategy: str = "auto",
    backend: str = "auto",
    overlap: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    check: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention of this rank's queries over the whole context. A collective call: every rank makes it alike.

    The query at absolute position p of a request attends to keys 0 .. p of that request, to nothing else.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 5), (0, 3)], cp_size=1, cp_rank=0)
    >>> q, k, v = torch.randn(8, 4, 64), torch.randn(8, 2, 64), torch.randn(8, 2, 64)
    >>> cpattn.cp_attention(q, k, v, meta).shape
    torch.Size([8, 4, 64])

    Args:
        q: ``[meta.rows, Hq, D]`` fp32, bf16 or fp16 (fp64 with the reference backend): this rank's rows, as
            :func:`shard` orders them. Padding rows may hold anything, here and in k and v.
        k: ``[meta.rows, Hkv, D]``, rotated by ``meta.position_ids`` where the model rotates; Hq must be a multiple of Hkv.
        v: ``[meta.rows, Hkv, Dv]``.
        meta: this rank's metadata, on the tensors' device.
        group: a ProcessGroup, one axis of a DeviceMesh, a Communicator, or None for the default group. With
            cp_size 1 none is needed.
        kv_cache: the keys and values of the prefixes, if the batch has any.
        strategy: ``"all_gather"``, ``"ring"``, or ``"auto"``.
        backend: a name from ``cpattn.BACKENDS``, or ``"auto"`` for the fastest that can serve the call.
        overlap: into how many groups of KV heads an all-gather is split, so that the attention of one group runs while the
            next is in flight; 1 turns it off. It must divide Hkv, and be the same on every rank. None leaves the choice
            to cpattn: up to 4 on a GPU where much is sent, 1 elsewhere. It changes no result.
        scale: of the scores; 1 / sqrt(D) if None.
        window: each query sees the last ``window`` keys up to and with its own; all if None.
        softcap: scores become ``softcap * tanh(scores / softcap)``, as in Gemma 2 (arXiv:2408.00118); none if None.
        sinks: floating ``[Hq]``, one more logit without a value in each query's softmax, as in gpt-oss; none if None.
        return_lse: also return the log-sum-exp of the scaled (and capped) scores, sinks included.
        check: compare plan and arguments of all ranks first, in one small collective that waits for the device, so that
            a mistake on one rank raises on all instead of hanging the others. For tests and bring-up. (A rank that passes
            another group than the others can not tell them.)

    Returns:
        ``out [meta.rows, Hq, Dv]`` in q's dtype, zeros on padding; with ``return_lse`` also ``lse [meta.rows, Hq]``,
        fp32, natural log, -inf on padding.

    Raises:
        CPError: in its subclasses (see :mod:`cpattn.errors`), before anything is sent.
    """
    checks.check_metadata(meta)
    communicator = as_communicator(group, meta.plan.cp_size)

    def validate() -> tuple[Strategy, Backend, AttentionOptions]:
        checks.check_group(meta, communicator)
        checks.check_qkv(q, k, v, meta)
        checks.check_prefix(kv_cache, k, v, meta)
        options = checks.parse_options(q, meta, scale, window, softcap, sinks)
        checks.check_overlap(overlap, k)
        return *_choose(q, k, v, meta, strategy, backend, options), options

    def describe(validated: tuple[Strategy, Backend, AttentionOptions]) -> str:
        # The backend is each rank's own affair; all else must be the same for the results to fit together.
        return (
            f"strategy={validated[0].name}, {q.shape[1]}/{k.shape[1]} heads of {k.shape[2]}/{v.shape[2]}, {q.dtype}, "
            f"scale={validated[2].scale}, window={validated[2].window}, softcap={validated[2].softcap}, "
            f"sinks={'no' if sinks is None else 'yes'}, overlap={overlap}"
        )

    chosen_strategy, chosen_backend, options = _validated(validate, describe, meta, communicator, check)
    q, k, v = map(_last_axis_contiguous, (q, k, v))
    groups = overlap or default_overlap(k.shape[1], _gathered_bytes(k, v, meta), k.device.type)
    prefix = None
    if kv_cache is not None and meta.plan.num_prefix_tokens:
        prefix = PackedKV(_last_axis_contiguous(kv_cache.k), _last_axis_contiguous(kv_cache.v))
    inputs = ExchangeInputs(k, v, prefix, q.shape[1], options.window, groups)
    # A plan without any row has nothing to send, on no rank.
    steps = chosen_strategy.steps(inputs, meta, communicator) if meta.rows else iter(())
    merges = chosen_strategy.num_steps(meta.plan, options.window) > 1
    # Autocast would send parts of a backend to half precision.
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        out, lse = run_steps(q, meta.num_tokens, v.shape[2], steps, merges, chosen_backend, options)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: CPMetadata,
    *,
    strategy: str = "auto",
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> dict[str, str]:
    """What ``backend="auto"`` would do with such a call: for each backend in the order that it is tried, ``"chosen"``,
    ``"able"``, or the reason why it was passed over. Needs no group and computes nothing.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 4)], cp_size=1, cp_rank=0)
    >>> q = torch.randn(4, 2, 64)
    >>> cpattn.explain(q, q, q, meta, softcap=30.0)["reference"]
    'chosen'

    The arguments mean what they mean to :func:`cp_attention`; of its errors those about them are raised.
    """
    checks.check_metadata(meta)
    checks.check_qkv(q, k, v, meta)
    options = checks.parse_options(q, meta, None, window, softcap, sinks)
    chosen, _ = _choose(q, k, v, meta, strategy, "auto", options)
    return explain_choice(_call(q, v, meta, chosen, options))


def _choose(
    q: Tensor, k: Tensor, v: Tensor, meta: CPMetadata, strategy: str, backend: str, options: AttentionOptions
) -> tuple[Strategy, Backend]:
    """The strategy and backend of a call: the first strategy that a backend, or the one asked for, can serve."""
    candidates = candidate_strategies(strategy, _gathered_bytes(k, v, meta))
    for candidate in candidates[:-1]:
        try:
            return candidate, choose_backend(backend, _call(q, v, meta, candidate, options))
        except UnsupportedError:  # noqa: PERF203
            continue
    return candidates[-1], choose_backend(backend, _call(q, v, meta, candidates[-1], options))


def _last_axis_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _gathered_bytes(k: Tensor, v: Tensor, meta: CPMetadata) -> int:
    """The keys and values that an all-gather holds in one place on each rank: everyone's new ones, and the prefix."""
    keys = meta.plan.cp_size * meta.rows + meta.plan.num_prefix_tokens
    return keys * k.shape[1] * (k.shape[2] + v.shape[2]) * k.element_size()


def _call(q: Tensor, v: Tensor, meta: CPMetadata, strategy: Strategy, options: AttentionOptions) -> Call:
    return Call(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[2],
        v_head_dim=v.shape[2],
        window=options.window is not None,
        softcap=options.softcap is not None,
        sinks=options.sinks is not None,
        alignments=strategy.alignments(meta.plan, options.window),
        merges=strategy.num_steps(meta.plan, options.window) > 1,
    )


def _validated(validate: Callable[[], T], describe: Callable[[T], str], meta: CPMetadata, communicator: Communicator, check: bool) -> T:
    """What ``validate`` returns; with ``check``, after all ranks have said that they got as far with the same plan."""
    try:
        value = validate()
    except Exception as refusal:
        if check:
            agree(communicator, meta.device, meta.plan.fingerprint, "", refusal)
        raise
    if check:
        agree(communicator, meta.device, meta.plan.fingerprint, describe(value), None)
    return value
