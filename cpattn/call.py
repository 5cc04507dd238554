"""One call, validated and decided: what the public functions do before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from cpattn import checks
from cpattn.attention.backend import AttentionOptions, Backend, Call
from cpattn.attention.custom import AttentionCallable
from cpattn.attention.registry import choose_backend
from cpattn.attention.verify import verified
from cpattn.cache_checks import check_cache
from cpattn.current import is_capturing, is_on_current_device
from cpattn.errors import BackendError, PlanError, UnsupportedError
from cpattn.exchange.driver import Driver, Precision
from cpattn.exchange.message import KVFormat
from cpattn.exchange.registry import candidate_strategies, only_decodes
from cpattn.exchange.strategy import ExchangeInputs, ExchangeSizes, Steps, Strategy
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.page_checks import check_writable
from cpattn.page_contents import check_page_contents
from cpattn.slow_reference import warn_of_reference
from cpattn.tensor_kinds import check_no_fp8
from cpattn.transports.agreement import Account, agree, expect_verdicts
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transport import Transfer, Transport

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
        """All that a decision depends on, layouts included. Raises TypeError or AttributeError where an argument is not what
        it should be."""
        q, k, v, v_dim, cache, strategy, backend, overlap, scale, window, softcap, sinks = self
        layouts: tuple[Any, ...] = ()
        if isinstance(cache, PackedKV):
            layouts = _layout(cache.k), _layout(cache.v)
        elif isinstance(cache, PagedKV):
            k_pages, v_pages = cache.k_pages, cache.v_pages
            in_mode = k_pages.is_inference(), v_pages is not None and v_pages.is_inference()
            layouts = _layout(k_pages), _layout(v_pages), _layout(cache.page_table), in_mode, cache.lines
        return (
            q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device, _layout(v), _layout(sinks),
            # A DTensor of the same layout, say, has no memory to read; those above are compared in _layout.
            q.__class__, k.__class__,
            cache.__class__, layouts, v_dim, strategy, backend, overlap, scale, window, softcap,
            # True == 1, but only one of them is a number of groups.
            v_dim.__class__, overlap.__class__, scale.__class__, window.__class__, softcap.__class__,
            # Pages that were made in that mode may be written in that mode only.
            torch.is_inference_mode_enabled(),
        )  # fmt: skip

    def requires_grad(self) -> bool:
        """Whether any tensor does."""
        q, k, v, cache, sinks = self.q, self.k, self.v, self.kv_cache, self.sinks
        if q.requires_grad or k.requires_grad or (v is not None and v.requires_grad) or (sinks is not None and sinks.requires_grad):
            return True
        if isinstance(cache, PackedKV):
            return cache.k.requires_grad or (cache.v is not None and cache.v.requires_grad)
        return isinstance(cache, PagedKV) and (cache.k_pages.requires_grad or (cache.v_pages is not None and cache.v_pages.requires_grad))


def _layout(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.__class__)


@dataclass(frozen=True, eq=False)
class Decision:
    """What follows from the kinds and sizes of a call's arguments.

    Attributes:
        options: without the sinks themselves.
        reads_pages: whether the backend attends to pages of the cache as they are.
        copies: whether the last axis of some tensor is not contiguous, which backends need.
        nan_in_out_alone: whether a NaN in the result may be missing in its LSE: the kernel's, or since a value of NaN is a
            part of a key that some of the queries in its tile do not see.
        sizes: what the messages of the call follow from.
    """

    strategy: Strategy
    backend: Backend
    call: Call
    options: AttentionOptions
    format: KVFormat
    merges: bool
    precision: Precision
    reads_pages: bool
    copies: bool
    nan_in_out_alone: bool
    sizes: ExchangeSizes


def decide(arguments: Arguments, meta: CPMetadata, communicator: Transport | None, *, check: bool = False) -> Decision:
    """Validates a call and chooses; what it finds is kept with the metadata, so that further layers are quick.

    Without a communicator nothing is to be sent or written: the group is not looked at, and a cache may be missing. What a
    page table holds is looked at in every call, but on a GPU only with ``check``, as it means waiting for the device.
    Raises CPError in its subclasses.
    """
    cache = arguments.kv_cache
    signature: Hashable = None
    decision = None
    try:
        group = None if communicator is None else (communicator.rank, communicator.size)
        signature = group, arguments.signature()
        if not (torch.is_grad_enabled() and arguments.requires_grad()):
            decision = meta.memo.get(signature)
    # Not what a caller should pass, without strides or a hash: the checks say so.
    except (TypeError, AttributeError, RuntimeError):
        signature = None
    if decision is None:
        if communicator is not None:
            checks.check_group(meta, communicator)
        decision = _decide(arguments, meta, with_cache=communicator is not None or cache is not None)
        if communicator is not None and isinstance(cache, PagedKV):
            check_writable(cache)
        if signature is not None:
            meta.memo.keep(signature, decision)
    if isinstance(cache, PagedKV) and (check or meta.device.type == "cpu"):
        check_page_contents(cache, meta, written=communicator is not None)
    assert isinstance(decision, Decision)
    return decision


def _decide(arguments: Arguments, meta: CPMetadata, with_cache: bool) -> Decision:
    q, k, v, cache = arguments.q, arguments.k, arguments.v, arguments.kv_cache
    checks.check_qkv(q, k, v, arguments.v_dim, meta)
    check_no_fp8("q", q.dtype)
    if with_cache:
        check_cache(cache, k, v, meta)
    options = checks.parse_options(q, meta, arguments.scale, arguments.window, arguments.softcap, arguments.sinks)
    checks.check_overlap(arguments.overlap, k)
    assert v is not None or arguments.v_dim is not None  # checked above
    v_head_dim = v.shape[2] if v is not None else int(arguments.v_dim or 0)
    kv = KVFormat(k.shape[1], k.shape[2], v_head_dim, v is None, k.dtype, k.device)
    strategy, backend, call = _choose(arguments, kv, meta, options)
    if arguments.backend == "auto":
        warn_of_reference(backend, call, q.shape[1], kv.heads, meta)
    precision = Precision.of(kv.dtype, call.merges, backend, call.sinks)
    attended = [q, k, v, cache.k, cache.v] if isinstance(cache, PackedKV) else [q, k, v]
    is_paged = isinstance(cache, PagedKV)
    has_cache = is_paged or (cache is not None and meta.plan.num_prefix_tokens > 0)
    return Decision(
        strategy=strategy,
        backend=backend,
        call=call,
        # Further layers come with sinks of their own.
        options=replace(options, sinks=None),
        format=kv,
        merges=call.merges,
        precision=precision,
        reads_pages=is_paged and backend.reads_pages(call),
        copies=any(x is not None and x.stride(-1) != 1 for x in attended),
        nan_in_out_alone=not backend.propagates_nan or (kv.v_in_k and kv.v_head_dim == kv.head_dim),
        sizes=ExchangeSizes.of(q.shape, kv, has_cache, is_paged, int(arguments.overlap or 1)),
    )


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
    plan = meta.plan
    num_extended = int(np.count_nonzero(plan.extend_lens))
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
        decodes=only_decodes(plan),
        new_tokens=plan.num_tokens // (plan.cp_size * max(1, num_extended)),
        pairs=sum(plan.rank_pairs) // plan.cp_size,
    )


def describe(arguments: Arguments, decision: Decision, meta: CPMetadata) -> str:
    """What must be the same on every rank for the results to fit together. The backend is each rank's own affair."""
    kv, options = decision.format, decision.options
    return (
        f"strategy={decision.strategy.name}, {arguments.q.shape[1]}/{kv.heads} heads of {kv.head_dim}/{kv.v_head_dim}, {kv.dtype}, "
        f"scale={options.scale}, window={options.window}, softcap={options.softcap}, "
        f"sinks={'yes' if decision.call.sinks else 'no'}, overlap={decision.sizes.overlap}, v={'in k' if kv.v_in_k else 'given'}, "
        f"rows={meta.rows}, bucket={meta.bucket}, cache={type(arguments.kv_cache).__name__}"
    )


def expect(decision: Decision, meta: CPMetadata, in_flight: InFlight, check: bool) -> None:
    """Says which transfers a decided call will make, that of its verdict after a check included."""

    def make() -> list[Transfer]:
        # A plan without any row has nothing to send, on no rank.
        transfers = decision.strategy.transfers(decision.sizes, meta, in_flight.transport) if meta.rows else []
        return [*transfers, *expect_verdicts(in_flight.transport, meta.device)] if check else transfers

    in_flight.expect(make)


def run(
    arguments: Arguments,
    decision: Decision,
    meta: CPMetadata,
    in_flight: InFlight,
    steps: Callable[[ExchangeInputs, CPMetadata, InFlight], Steps],
    problems: list[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs steps for decided arguments: ``out [rows, Hq, Dv]`` and ``lse [rows, Hq]``.

    Args:
        problems: if given, a caller's own kernel is compared with the reference, and what is wrong becomes a line here.
    """
    q, k, v, cache, sinks = arguments.q, arguments.k, arguments.v, arguments.kv_cache, arguments.sinks
    if decision.copies:
        q, k, v = _last_axis_contiguous(q), _last_axis_contiguous(k), None if v is None else _last_axis_contiguous(v)
        cache = _packed(cache) if isinstance(cache, PackedKV) else cache
    if meta.bucket is not None and is_capturing(q.device):
        meta.on_copy(CapturedCache(cache.page_table.shape[1] * cache.page_size if isinstance(cache, PagedKV) else None))
    if not decision.sizes.has_cache:
        cache = None
    options = decision.options
    if sinks is not None:
        options = AttentionOptions(options.scale, options.window, options.softcap, sinks.to(decision.precision.merged).contiguous())
    inputs = ExchangeInputs(q, k, v, decision.format, cache, decision.reads_pages, options.window, decision.sizes)
    backend = decision.backend if problems is None or not decision.backend.callers else verified(decision.backend, problems)
    driver = Driver(q, decision.format.v_head_dim, decision.merges, backend, options, decision.precision)
    taken = steps(inputs, meta, in_flight) if meta.rows else _no_steps()
    if is_on_current_device(q) and not torch.is_autocast_enabled("cuda" if q.is_cuda else q.device.type):
        # As a rule; entering two contexts that do nothing takes a microsecond.
        out, lse = driver.run(taken)
    else:
        with _no_autocast(q.device.type), on_device_of(q):
            out, lse = driver.run(taken)
    if sinks is not None:
        _pad_lse_(lse, meta)
    return out, lse


@dataclass(frozen=True)
class CapturedCache:
    """A graph has captured a call with a page table for ``fits`` tokens of a request, or, with None, without any cache. It can
    not look again, so that a plan that does not go with it is refused."""

    fits: int | None

    def __call__(self, plan: Layout) -> None:
        if self.fits is None:
            if plan.num_prefix_tokens:
                raise PlanError(
                    f"the plan has {plan.num_prefix_tokens} prefix tokens, but a graph was captured without a kv_cache; capture with one"
                )
            return
        held = plan.shard_lens + plan.rank_extends if plan.sharded else plan.total_lens
        longest = int(held.max(initial=0))
        if longest > self.fits:
            raise PlanError(
                f"the plan has a request of {longest} tokens, but a graph was captured with a page table for {self.fits}; "
                "capture with a wider one"
            )


def validated(
    validate: Callable[[], T], describe: Callable[[T], str], meta: CPMetadata, in_flight: InFlight, check: bool, label: str | None
) -> T:
    """What ``validate`` returns; with ``check``, after all ranks have said that they got as far with the same plan."""
    if not check:
        if label is not None:
            checks.check_label(label)
        return validate()
    account = Account("", meta.plan.fingerprint, "")
    try:
        checks.check_label(label)
        account = account._replace(label=label or "")
        value = validate()
    except Exception as refusal:
        agree(in_flight, meta.device, account._replace(refusal=refusal))
        raise
    agree(in_flight, meta.device, account._replace(arguments=describe(value)))
    return value


def refusal_of(problems: list[str]) -> BackendError | None:
    """What a checked call raises where a caller's kernel is wrong."""
    if not problems:
        return None
    more = f" ({len(problems) - 1} more launches differ)" if len(problems) > 1 else ""
    return BackendError(f"{problems[0]}{more}; cpattn.testing.check_backend says in a table what holds of a kernel and what does not")


def _packed(cache: PackedKV) -> PackedKV:
    return PackedKV(_last_axis_contiguous(cache.k), None if cache.v is None else _last_axis_contiguous(cache.v))


def _last_axis_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensors'."""
    return nullcontext() if is_on_current_device(x) else torch.cuda.device(x.device)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast would send parts of a backend to half precision."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _pad_lse_(lse: Tensor, meta: CPMetadata) -> None:
    """A sink is a logit of every query, but padding is none."""
    if meta.bucket is None:
        lse[meta.num_tokens :] = -torch.inf
    else:
        lse.masked_fill_((meta.token_index < 0)[:, None], -torch.inf)


def _no_steps() -> Steps:
    yield from ()
