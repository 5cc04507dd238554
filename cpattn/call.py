"""One call, validated and decided: what the public functions do before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from cpattn import checks
from cpattn.attention.backend import AttentionOptions, Backend, Call
from cpattn.attention.custom import AttentionCallable
from cpattn.attention.registry import choose_backend
from cpattn.errors import UnsupportedError
from cpattn.exchange.agreement import agree
from cpattn.exchange.communicator import Communicator
from cpattn.exchange.driver import Driver, Precision
from cpattn.exchange.message import KVFormat
from cpattn.exchange.registry import candidate_strategies, default_overlap
from cpattn.exchange.strategy import ExchangeInputs, Steps, Strategy
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata

BackendChoice: TypeAlias = str | Backend | AttentionCallable
T = TypeVar("T")


class Arguments(NamedTuple):
    """The arguments of a call that say what to compute, as the caller gave them."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    v_dim: int | None
    kv_cache: PackedKV | PagedKV | None
    strategy: str
    backend: BackendChoice
    overlap: int | None
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def signature(self) -> tuple[Any, ...]:
        """All that a decision depends on. Raises TypeError if an argument can not be hashed."""
        cache = self.kv_cache
        tensors = [self.q, self.k, self.v, self.sinks]
        if isinstance(cache, PackedKV):
            tensors += [cache.k, cache.v]
        elif isinstance(cache, PagedKV):
            tensors += [cache.k_pages, cache.v_pages, cache.page_table]
        described = tuple(None if x is None else (x.shape, x.dtype, x.device, x.stride(-1) if x.ndim else 0) for x in tensors)
        options = (self.v_dim, self.strategy, self.backend, self.overlap, self.scale, self.window, self.softcap)
        # True == 1, but only one of them is a number of groups.
        signature = described, type(cache), options, tuple(map(type, options))
        hash(signature)
        return signature


@dataclass(frozen=True, eq=False)
class Decision:
    """What follows from the kinds and sizes of a call's arguments."""

    strategy: Strategy
    backend: Backend
    call: Call
    options: AttentionOptions
    format: KVFormat
    overlap: int
    merges: bool
    precision: Precision


def decide(arguments: Arguments, meta: CPMetadata, communicator: Communicator | None) -> Decision:
    """Validates a call and chooses; what it finds is kept with the metadata, so that further layers are quick.

    Without a communicator nothing is to be computed: the group is not looked at, and a cache may be missing.
    Raises CPError in its subclasses.
    """
    try:
        group = None if communicator is None else (communicator.rank, communicator.size)
        signature = group, arguments.signature()
    except (TypeError, AttributeError):  # not what a caller should pass: the checks say so
        signature = None
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(arguments))
    on_cpu = isinstance(arguments.kv_cache, PagedKV) and meta.device.type == "cpu"
    decision = None if signature is None or needs_grad or on_cpu else meta.memo.get(signature)
    if decision is None:
        if communicator is not None:
            checks.check_group(meta, communicator)
        decision = _decide(arguments, meta, check_cache=communicator is not None or arguments.kv_cache is not None)
        if signature is not None:
            meta.memo[signature] = decision
    assert isinstance(decision, Decision)
    if arguments.sinks is None:
        return decision
    sinks = arguments.sinks.to(torch.promote_types(arguments.q.dtype, torch.float32))
    return replace(decision, options=replace(decision.options, sinks=sinks))


def _decide(arguments: Arguments, meta: CPMetadata, check_cache: bool) -> Decision:
    q, k, v, cache = arguments.q, arguments.k, arguments.v, arguments.kv_cache
    checks.check_qkv(q, k, v, arguments.v_dim, meta)
    if check_cache:
        checks.check_cache(cache, k, v, meta)
    options = checks.parse_options(q, meta, arguments.scale, arguments.window, arguments.softcap, arguments.sinks)
    checks.check_overlap(arguments.overlap, k)
    v_head_dim = v.shape[2] if v is not None else arguments.v_dim
    assert v_head_dim is not None  # checked above
    kv = KVFormat(k.shape[1], k.shape[2], v_head_dim, v is None, k.dtype, k.device)
    strategy, backend, call = _choose(arguments, kv, meta, options)
    overlap = arguments.overlap or default_overlap(kv, meta)
    precision = Precision.of(kv.dtype, call.merges, backend, call.sinks)
    return Decision(strategy, backend, call, options, kv, overlap, call.merges, precision)


def _choose(arguments: Arguments, kv: KVFormat, meta: CPMetadata, options: AttentionOptions) -> tuple[Strategy, Backend, Call]:
    """The first strategy that a backend, or the one asked for, can serve."""
    candidates = candidate_strategies(arguments.strategy, arguments.q, kv, meta, arguments.kv_cache, options.window)
    refusal: UnsupportedError | None = None
    for candidate in candidates:
        call = _call(arguments, kv, meta, candidate, options)
        try:
            return candidate, choose_backend(arguments.backend, call), call
        except UnsupportedError as error:
            refusal = error
    assert refusal is not None  # there is at least one candidate
    raise refusal


def _call(arguments: Arguments, kv: KVFormat, meta: CPMetadata, strategy: Strategy, options: AttentionOptions) -> Call:
    fixed = meta.bucket is not None
    return Call(
        device=kv.device,
        dtype=kv.dtype,
        head_dim=kv.head_dim,
        v_head_dim=kv.v_head_dim,
        window=options.window is not None,
        softcap=options.softcap is not None,
        sinks=options.sinks is not None,
        alignments=strategy.alignments(meta.plan, options.window, fixed),
        merges=strategy.num_steps(meta.plan, options.window, fixed) > 1,
        page_size=arguments.kv_cache.page_size if isinstance(arguments.kv_cache, PagedKV) else None,
        fixed=fixed,
    )


def describe(arguments: Arguments, decision: Decision, meta: CPMetadata) -> str:
    """What must be the same on every rank for the results to fit together. The backend is each rank's own affair."""
    kv, options = decision.format, decision.options
    return (
        f"strategy={decision.strategy.name}, {arguments.q.shape[1]}/{kv.heads} heads of {kv.head_dim}/{kv.v_head_dim}, {kv.dtype}, "
        f"scale={options.scale}, window={options.window}, softcap={options.softcap}, "
        f"sinks={'no' if options.sinks is None else 'yes'}, overlap={decision.overlap}, v={'in k' if kv.v_in_k else 'given'}, "
        f"rows={meta.rows}, bucket={meta.bucket}, cache={type(arguments.kv_cache).__name__}"
    )


def run(
    arguments: Arguments,
    decision: Decision,
    meta: CPMetadata,
    communicator: Communicator,
    steps: Callable[[ExchangeInputs, CPMetadata, Communicator], Steps],
) -> tuple[Tensor, Tensor]:
    """Runs steps for decided arguments: ``out [rows, Hq, Dv]`` and ``lse [rows, Hq]``."""
    q, k, v, cache = _last_axis_contiguous(arguments.q), _last_axis_contiguous(arguments.k), arguments.v, arguments.kv_cache
    if v is not None:
        v = _last_axis_contiguous(v)
    if meta.bucket is not None and _is_capturing(q.device):
        meta.remember_cache(cache.page_table.shape[1] * cache.page_size if isinstance(cache, PagedKV) else None)
    if isinstance(cache, PackedKV):
        cache = _packed(cache) if meta.plan.num_prefix_tokens else None
    reads_pages = isinstance(cache, PagedKV) and decision.backend.reads_pages(decision.call)
    inputs = ExchangeInputs(q, k, v, decision.format, cache, reads_pages, decision.options.window, decision.overlap)
    driver = Driver(q, decision.format.v_head_dim, decision.merges, decision.backend, decision.options, decision.precision)
    # A plan without any row has nothing to send, on no rank.
    with _no_autocast(q.device.type), on_device_of(q):
        out, lse = driver.run(steps(inputs, meta, communicator) if meta.rows else _nothing())
    if decision.options.sinks is not None:
        _pad_lse_(lse, meta)
    return out, lse


def validated(validate: Callable[[], T], describe: Callable[[T], str], meta: CPMetadata, communicator: Communicator, check: bool) -> T:
    """What ``validate`` returns; with ``check``, after all ranks have said that they got as far with the same plan."""
    if not check:
        return validate()
    try:
        value = validate()
    except Exception as refusal:
        agree(communicator, meta.device, meta.plan.fingerprint, "", refusal)
        raise
    agree(communicator, meta.device, meta.plan.fingerprint, describe(value), None)
    return value


def _tensors(arguments: Arguments) -> list[Tensor]:
    cache = arguments.kv_cache
    tensors = [arguments.q, arguments.k, arguments.v, arguments.sinks]
    if isinstance(cache, PackedKV):
        tensors += [cache.k, cache.v]
    elif isinstance(cache, PagedKV):
        tensors += [cache.k_pages, cache.v_pages]
    return [x for x in tensors if type(x) is not type(None) and isinstance(x, Tensor)]


def _packed(cache: PackedKV) -> PackedKV:
    return PackedKV(_last_axis_contiguous(cache.k), None if cache.v is None else _last_axis_contiguous(cache.v))


def _last_axis_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensors'."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast would send parts of a backend to half precision."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _pad_lse_(lse: Tensor, meta: CPMetadata) -> None:
    """A sink is a logit of every query, but padding is none."""
    if meta.bucket is None:
        lse[meta.num_tokens :] = -torch.inf
    else:
        lse.masked_fill_((meta.token_index < 0)[:, None], -torch.inf)


def _nothing() -> Steps:
    yield from ()
