"""A prepared call: the one place where a kind of call over a batch is remembered."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any, overload

import torch
from torch import Tensor

from cpattn.attention import flash_attn2, flash_attn3, flash_attn4, torch_flash, triton
from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.expanded_keys import over_latents
from cpattn.attention.merge import lse_with_nan, nothing_of_padding_
from cpattn.attention.registry import BACKENDS
from cpattn.attention.stored_keys import over_stored_keys
from cpattn.attention.verify import verified
from cpattn.call.arguments import Arguments
from cpattn.call.check_call import check_arguments, check_written
from cpattn.call.checks import check_no_grad
from cpattn.call.choose import Choice
from cpattn.call.contents import check_own_contents, check_shared_contents
from cpattn.call.graph_guard import CapturedCache, GroupCheck
from cpattn.call.page_checks import check_lines
from cpattn.call.relaunch import NO_MEMORY, Given, Recorder, Relaunch
from cpattn.current import is_on_current_device
from cpattn.errors import CPError, TensorMismatchError, UnsupportedError
from cpattn.exchange.attend import Attend, Attention
from cpattn.exchange.attend_in_ranges import AttendInRanges
from cpattn.exchange.new_rows import NewRows, scales_of_heads
from cpattn.exchange.registry import is_of_library
from cpattn.exchange.resident_shards import as_asked_for, is_resident
from cpattn.exchange.schedule import num_results
from cpattn.exchange.strategy import IO, Prepared, Setup
from cpattn.expansion import ExpandFunction
from cpattn.graphs import leaves_graph
from cpattn.keys import is_aligned
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport


class PreparedCall:
    """A kind of call over a batch: what was chosen for it, and the spans, memory and transfers that it needs. All layers whose
    tensors have the kinds and layouts of those that it was made for share it.

    :func:`cpattn.cp_attention` makes and finds them by itself; :func:`cpattn.prepare` gives one to hold and to call.

    It is valid as long as its metadata and its group: over metadata with a bucket also after :meth:`CPMetadata.copy_` has
    put another batch in their place, for which it keeps what it has chosen. Memory that :func:`cpattn.release` has freed is
    made anew by the next call.

    Attributes:
        problem: what the call asks for, in kinds and sizes.
        strategy, backend: what was chosen.
        schedule: the hops of one call as data.
        decision: with what they were compared.
        transport: over which it goes.
        waits_for_keys, reads_in_place: whether keys may come late, and some stay where they lie; a pool that no kernel can address does
            not stay.
    """

    def __init__(self, arguments: Arguments, choice: Choice, options: AttentionOptions, meta: CPMetadata, transport: Transport) -> None:
        self._key: Any = arguments.key()
        # What was last looked at beside the key.
        self._checked_plan: Layout = meta.plan
        self._checked_lines = getattr(arguments.kv_cache, "lines", None)
        self._options: dict[str, Any] = {name: getattr(arguments, name) for name in _OPTIONS}
        self._returns_lse = False
        self.problem, self.strategy, self.schedule, self.backend, self.decision = choice
        self.transport = transport
        # It is remembered with the metadata, which a reference from here would keep alive.
        self._meta = weakref.ref(meta)
        self._held: CPMetadata | None = None
        problem, backend = self.problem, self.backend
        # Further layers come with sinks of their own.
        options = AttentionOptions(options.scale, options.window, options.softcap)
        self._attention = Attention.of(backend, options, problem.v_head_dim, num_results(self.schedule) > 1, problem.dtype, problem.sinks)
        # A NaN in the result may be missing in its LSE: the kernel's, or since a value of NaN is a part of a key that some of
        # the queries in its tile do not see.
        whole_key_is_value = problem.expands or (problem.v_in_k and problem.v_head_dim == problem.head_dim)
        self._nan_in_out_alone = not backend.propagates_nan or whole_key_is_value
        self._is_stored = problem.stored_dtype != problem.dtype
        self._reads_pages, self._writes_pages_after = choice.reads_pages, choice.writes_pages_after
        cache = arguments.kv_cache
        # Packed prefixes are copied where they are not, and pools are too large for that.
        pages = (cache.k_pages, cache.v_pages) if isinstance(cache, PagedKV) else ()
        self.reads_in_place = all(x is None or is_aligned(x) for x in pages) and backend.takes_several_places(problem)
        self.waits_for_keys = not problem.expands and backend.waits_for_keys(problem)
        attended = [arguments.q, arguments.k, arguments.v, *((cache.k, cache.v) if isinstance(cache, PackedKV) else ())]
        # No function of a caller's runs in the midst of it, which may count on modes that are set, as for a default device.
        is_ours = is_of_library(self.strategy) or is_resident(self.strategy)
        self._is_ours = is_ours and backend is BACKENDS.get(backend.name) and not problem.expands
        # Backends need a contiguous last axis.
        self._copies = any(x is not None and x.stride(-1) != 1 for x in attended)
        # A kernel of a package is launched as a whole. Nobody notes what is in the place of a function that somebody has replaced.
        is_of_package = _has_functions_of(backend, _PACKAGES)
        if is_of_package:
            self._attention = self._attention._replace(in_one_step=True)
        # Where such a kernel is all that there is, to launch it again would take no less.
        is_all = transport.size == 1 and (problem.cache is None or is_resident(self.strategy))
        is_noted = _has_functions_of(backend, [triton]) or (is_of_package and not is_all)
        self._launches_alone = self._is_ours and is_noted and not self._copies
        # Calls over the batch of this plan that might have been recorded, or were.
        self._times, self._timed_plan = 0, meta.plan
        self._exchange: Prepared | None = None
        # New keys and values as they are stored, where that is in another dtype.
        self._new: NewRows | None = None
        # What of the arena's memory the exchange has views of.
        self._memory: list[Tensor] = []
        transport.arena.tell_of_changes(self)

    def __repr__(self) -> str:
        valid = "whatever batch its bucket's metadata hold" if self.problem.fixed else "for the batch of its metadata"
        return f"PreparedCall(strategy={self.strategy.name!r}, backend={self.backend.name!r}, {self.problem.rows} rows; valid {valid})"

    @leaves_graph
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        kv_cache: PackedKV | PagedKV | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
        expand: ExpandFunction | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """:func:`cpattn.cp_attention` for these tensors, as it was prepared: a collective call.

        Args:
            q, k, v, kv_cache, sinks, out: of the shapes, strides, dtypes and devices of those that it was prepared with.
            expand: of this layer, where the call was prepared with one.

        Returns:
            What cp_attention returns.

        Raises:
            TensorMismatchError: a tensor has another layout; the message says which.
            CPError: in its other subclasses, for what cp_attention looks at in every call, and what it raises in the midst of it.
        """
        meta = self._held
        if meta is None:
            raise CPError("this prepared call belongs to cp_attention; ask cpattn.prepare(q, k, v, meta, ...) for one to hold")
        arguments = Arguments(q, k, v, kv_cache=kv_cache, sinks=sinks, out=out, expand=expand, **self._options)
        self.transport.check_usable()
        with InFlight(self.transport, meta.device) as in_flight:
            self._check_same(arguments, meta)
            self.check_batch(arguments, meta)
            if isinstance(kv_cache, PagedKV) and not q.is_cuda:
                check_shared_contents(kv_cache, meta, written=True)
            result, lse = self.make(arguments, meta, in_flight)
        return (result, self.lse_of(result, lse)) if self._returns_lse else result

    def hold(self, meta: CPMetadata, *, returns_lse: bool) -> PreparedCall:
        """The same for a caller who keeps it, and with it the metadata."""
        self._held, self._returns_lse = meta, returns_lse
        return self

    def _check_same(self, arguments: Arguments, meta: CPMetadata) -> None:
        """Raises what cp_attention would, or TensorMismatchError where the arguments are fine, but others than were prepared."""
        try:
            key: Any = arguments.key()
            needs_grad = torch.is_grad_enabled() and arguments.requires_grad()
        except (TypeError, AttributeError, RuntimeError):
            key, needs_grad = None, False
        if needs_grad:
            check_no_grad(**arguments.tensors())
        if key == self._key:
            return
        if key is None or key[:-1] != self._key[:-1]:
            raise TensorMismatchError(f"{_difference(key, self._key)}; prepare a call for such tensors with cpattn.prepare")
        # Within torch.inference_mode() or outside of it, other than so far: what is written is looked at again.
        check_arguments(arguments, meta)
        check_written(arguments)
        self._key = key

    def check_batch(self, arguments: Arguments, meta: CPMetadata) -> None:
        """Looks again at what depends on the batch, where another has been put into the metadata's bucket, or at the lines of a
        pool's table, which change with each step."""
        lines = getattr(arguments.kv_cache, "lines", None)
        if meta.plan is not self._checked_plan:
            check_arguments(arguments, meta)
            reason = self.strategy.refusal(self.problem, meta.plan)
            if reason is not None:
                raise UnsupportedError(f"{as_asked_for(self.strategy)} cannot serve this batch: {reason}")
        elif lines is not self._checked_lines and isinstance(arguments.kv_cache, PagedKV):
            check_lines(arguments.kv_cache, meta)
        self._checked_plan, self._checked_lines = meta.plan, lines

    def transfers(self) -> list[Transfer]:
        """All that one call sends, in order, with memory for it; what :meth:`run` must find in flight."""
        # A plan without any row has nothing to send, on no rank.
        if not self.problem.rows:
            return []
        if self._exchange is None:
            with self._without_modes():
                self._prepare()
        assert self._exchange is not None
        return list(self._exchange.transfers)

    def _prepare(self) -> None:
        meta, arena, problem = self._meta(), self.transport.arena, self.problem
        assert meta is not None  # whoever calls has it
        # Memory made under inference_mode could not be written outside of it.
        with torch.inference_mode(False), arena.noting() as memory:
            new = NewRows.of(problem, arena) if self._is_stored and not is_resident(self.strategy) else None
            self._exchange = self.strategy.prepare(
                Setup(
                    self.problem,
                    meta,
                    self.transport,
                    self._reads_pages,
                    waits_for_keys=self.waits_for_keys,
                    reads_in_place=self.reads_in_place,
                    writes_pages_after=self._writes_pages_after,
                )
            )
        if not hasattr(self._exchange, "transfers"):
            raise CPError(f"strategy={self.strategy.name!r} prepared a {type(self._exchange).__name__}; return an object with transfers")
        # Not before: for the strategy's memory the arena may have had views forgotten, these here too.
        self._new, self._memory = new, memory

    def memory_changed(self) -> None:
        """The arena has replaced or freed memory: views of it would keep it alive."""
        self._exchange = None
        self._new = None
        self._memory = []
        kept = self.transport.kept_launches
        if kept is not None:
            kept.pop(self, None)

    def make(self, arguments: Arguments, meta: CPMetadata, in_flight: InFlight) -> tuple[Tensor, Tensor]:
        """Makes the call, whatever it sends included: ``out [rows, Hq, Dv]`` in q's dtype and ``lse [rows, Hq]``.

        Args:
            arguments: of the same key; meta: as they are checked for.
        """
        known: Relaunch | None = None
        given: Given | None = None
        if self._launches_alone and not in_flight.captures and not in_flight.is_profiled:
            with torch._C.DisableTorchFunction():
                known = self._known_launches(meta)
                if known is not None or self._may_be_recorded(meta):
                    given = self._given(arguments)
                tensors = None if known is None or given is None else known.tensors_or_none(given)
                if known is not None and tensors is not None:
                    return self._again(known, tensors, arguments, in_flight)
        in_flight.expect(self.transfers)
        if known is None and given is not None:
            self._times += 1
            # The first call over a batch makes tables, and the next may do as well.
            if self._times > 1:
                return self._recorded(arguments._replace(sinks=given.sinks), given, meta, in_flight)
        return self.run(arguments, in_flight)

    def _again(self, known: Relaunch, tensors: list[Any], arguments: Arguments, in_flight: InFlight) -> tuple[Tensor, Tensor]:
        if not known.has_transfers:
            sends = known.launches_send
            # The others wait for all messages, whatever happens to a package's kernel.
            failures: list[Exception] | None = [] if sends else None
            result = in_flight.repeat(partial(known.run, tensors, in_flight.start, failures), known.bytes_sent, sends=sends)
            if failures:
                raise failures[0]
            return result
        in_flight.expect(self.transfers)
        # Memory for messages may have been made anew.
        if known.memory is self._memory and in_flight.posts == known.posts:
            return known.run(tensors, in_flight.start)
        return self.run(arguments, in_flight)

    def _given(self, arguments: Arguments) -> Given | None:
        """What is launched over; None where launches may differ from those for other tensors of this kind."""
        sinks = arguments.sinks
        if sinks is not None:
            try:
                arguments = arguments._replace(sinks=sinks.to(self._attention.merged).contiguous())
            except NO_MEMORY:
                return None
        given = Given.of(arguments)
        # Autocast is kept from a package's kernel where a call goes the long way.
        is_as_it_was = is_on_current_device(arguments.q) and not (
            self._attention.in_one_step and torch.is_autocast_enabled(self.problem.device.type)
        )
        return given if is_as_it_was and given.are_plain() else None

    def _known_launches(self, meta: CPMetadata) -> Relaunch | None:
        kept = self.transport.kept_launches
        known: Relaunch | None = None if kept is None else kept.get(self)
        return known if known is not None and known.plan is meta.plan and known.memory is self._memory else None

    def _may_be_recorded(self, meta: CPMetadata) -> bool:
        """Whether calls over this batch have not been tried in vain."""
        if meta.plan is not self._timed_plan:
            self._times, self._timed_plan = 0, meta.plan
        return self._times < _LAST_RECORDED and self.transport.kept_launches is not None

    def _recorded(self, arguments: Arguments, given: Given, meta: CPMetadata, in_flight: InFlight) -> tuple[Tensor, Tensor]:
        transport = self.transport
        sent = transport.bytes_sent
        with Recorder(self.problem.rows * self.problem.result_bytes) as recorder:
            result = self.run(arguments, in_flight)
        kept = transport.kept_launches
        if kept is not None:
            known = recorder.relaunch(given, result, meta.plan, self._memory, in_flight.posts, transport.bytes_sent - sent)
            if known is not None:
                kept[self] = known
            elif recorder.is_too_large:
                # As the next call's would be.
                self._times = _LAST_RECORDED
        return result

    def run(self, arguments: Arguments, in_flight: InFlight, problems: list[str] | None = None) -> tuple[Tensor, Tensor]:
        """Makes the call, whose transfers are expected: ``out [rows, Hq, Dv]`` in q's dtype and ``lse [rows, Hq]``.

        Args:
            arguments: of the same key.
            problems: if given, a caller's own kernel is compared with the reference, and what is wrong becomes a line here.
        """
        if not self._is_ours:
            return self._run(arguments, in_flight, problems)
        # As _without_modes(), which a call need not ask.
        with torch._C.DisableTorchFunction():
            return self._run(arguments, in_flight, problems)

    def _without_modes(self) -> AbstractContextManager[Any]:
        """Where nobody else is asked about each operation: with torch.set_default_device each property of a tensor that is looked at costs
        microseconds otherwise, and twice as much for a call as it takes."""
        return torch._C.DisableTorchFunction() if self._is_ours else nullcontext()

    def _run(self, arguments: Arguments, in_flight: InFlight, problems: list[str] | None) -> tuple[Tensor, Tensor]:
        q, k, v, _, cache, *_, sinks, out, expand = arguments
        problem, attention = self.problem, self._attention
        if self._copies:
            q, k, v, cache = _contiguous_rows(q), _contiguous_rows(k), _contiguous_rows(v), _contiguous_cache(cache)
        if sinks is not None:
            sinks = sinks.to(attention.merged).contiguous()
        if problems is not None and self.backend.callers:
            attention = attention._replace(backend=verified(self.backend, problems))
        if expand is not None:
            attention = attention._replace(backend=over_latents(attention.backend, expand, problem))
        scales = None
        if self._is_stored:
            assert isinstance(cache, PagedKV)
            if problem.expands or not self.backend.reads_stored(problem):
                attention = attention._replace(backend=over_stored_keys(attention.backend))
            scales = scales_of_heads(cache, 1 if problem.expands else problem.kv_heads)
        if in_flight.captures:
            self._captured(arguments)
        if in_flight.is_profiled:
            attend: Attend = AttendInRanges(attention, q, sinks, scales, self.strategy.name, self.schedule)
        else:
            attend = Attend(attention, q, sinks, scales)
        if problem.rows:
            # Where nothing is new, k is None, and nobody looks at it.
            io = IO(q, k, v, cache if problem.cache is not None else None, in_flight.start)  # type: ignore[arg-type]
            if (not q.is_cuda or is_on_current_device(q)) and not torch.is_autocast_enabled(problem.device.type):
                # As a rule; entering two contexts that do nothing takes a microsecond.
                self._forward(io, attend, scales)
            else:
                with _no_autocast(problem.device.type), on_device_of(q):
                    self._forward(io, attend, scales)
        return attend.result(out)

    def _forward(self, io: IO, attend: Attend, scales: tuple[Tensor, Tensor] | None) -> None:
        if isinstance(io.cache, PagedKV) and not io.q.is_cuda:
            self._check_own(io.cache, io)
        if self._new is not None:
            k, v = self._new.put(io.k, io.v, scales)
            io = io._replace(k=k, v=v)
        self.strategy.forward(self._exchange, io, attend)

    def _check_own(self, cache: PagedKV, io: IO) -> None:
        meta = self._meta()
        assert meta is not None
        check_own_contents(cache, io.k, io.v, meta)

    def lse_of(self, out: Tensor, lse: Tensor) -> Tensor:
        """The LSE to return beside a result: NaN where that is, and nothing of padding."""
        if self.problem.sinks:
            self._pad_(lse)
        return lse_with_nan(out, lse) if self._nan_in_out_alone else lse

    def _captured(self, arguments: Arguments) -> None:
        """A CUDA graph captures the call, and will replay it over this memory, whatever batch a bucket then holds."""
        self.transport.arena.keep_for_graph(self._memory)
        meta = self._meta()
        if self.problem.fixed and meta is not None:
            meta.on_copy(CapturedCache.of(arguments.kv_cache))
            # Who only replays graphs learns here of a rank that did not come.
            meta.on_copy(GroupCheck(weakref.ref(self.transport)))

    def _pad_(self, lse: Tensor) -> None:
        """A sink is a logit of every query, but padding is none."""
        meta = self._meta()
        assert meta is not None
        nothing_of_padding_(lse, meta.num_tokens, None if meta.bucket is None else meta.token_index)


# Whose kernels are those of other packages, launched from Python that does the same for all tensors of a kind.
_PACKAGES = (flash_attn2, flash_attn3, flash_attn4, torch_flash)
# The last of these that is: the second or the third.
_LAST_RECORDED = 3
# What of the arguments is no tensor.
_OPTIONS = ("v_dim", "strategy", "backend", "overlap", "scale", "window", "softcap")
_COMPARED = ("q", "k", "v", "sinks", "out", "kv_cache")


def _difference(given: Any, prepared: Any) -> str:
    """Which of the tensors differs from what a call was prepared with, in words."""
    if given is None:
        return "the tensors are not of the kinds that this call was prepared with"
    for name, mine, theirs in zip(_COMPARED, given, prepared, strict=False):
        if mine == theirs:
            continue
        both = all(isinstance(x, tuple) and isinstance(x[0], type) for x in (mine, theirs))
        if name == "kv_cache" and both and mine[0] is theirs[0]:
            parts = zip(("k", "v", "page_table", "k_scale", "v_scale"), mine[1:], theirs[1:], strict=False)
            name, mine, theirs = next((f"kv_cache.{part}", x, y) for part, x, y in parts if x != y)
        return f"{name} is {_layout(mine)}, but this call was prepared with {_layout(theirs)}"
    if given[len(_COMPARED)] != prepared[len(_COMPARED)]:
        mine, theirs = given[len(_COMPARED)], prepared[len(_COMPARED)]
        if mine is None or theirs is None:
            return f"expand is {'not ' * (mine is None)}given, but this call was prepared {'without' if theirs is None else 'with'} one"
        return "expand is no function"
    return "an option differs from the one that this call was prepared with"


def _layout(x: Any) -> str:
    """Of a tensor's part of a key, or of a cache's."""
    if isinstance(x, tuple) and isinstance(x[0], type):
        return f"a {x[0].__name__}"
    if not isinstance(x, tuple):
        return "None" if x is None else f"a {x.__name__}"
    shape, strides, dtype, device, *_ = x
    return f"{tuple(shape)} {dtype} on {device} with strides {strides}"


def _has_functions_of(backend: Backend, modules: Iterable[Any]) -> bool:
    """Whether a backend computes by those of one of these modules' BACKEND."""
    functions = attrgetter("attend", "accumulate", "attend_into")
    return any(functions(backend) == functions(module.BACKEND) for module in modules)


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensors'."""
    return nullcontext() if is_on_current_device(x) else torch.cuda.device(x.device)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast would send parts of a backend to half precision."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


@overload
def _contiguous_rows(x: Tensor) -> Tensor: ...


@overload
def _contiguous_rows(x: Tensor | None) -> Tensor | None: ...


def _contiguous_rows(x: Tensor | None) -> Tensor | None:
    """With a contiguous last axis."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _contiguous_cache(cache: PackedKV | PagedKV | None) -> PackedKV | PagedKV | None:
    return PackedKV(_contiguous_rows(cache.k), _contiguous_rows(cache.v)) if isinstance(cache, PackedKV) else cache
