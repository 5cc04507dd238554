"""What a call has done on its device, done again for the tensors of another layer.

That follows from a call's kind and its batch, as a CUDA graph of it shows: only addresses differ from layer to layer. So the second call of
a kind over a batch is recorded, and later ones make memory for the result, launch the same kernels, and start the same transfers. The
record is of every operation of torch as well. Where a call does more than make memory, copy and fill it, all calls of its kind go the
long way.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _python_dispatch as dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from cpattn.call.arguments import Arguments
from cpattn.call.found_tensors import FoundTensors, View, add_views, address_range
from cpattn.kv_cache import PagedKV
from cpattn.metadata.layout import Layout
from cpattn.noted import Launch, Start, Steps, Wait, made_by, noting, tuple_of
from cpattn.transports.transfer import Work

# What is made beside the result is freed after the last launch, and not in the midst of the call: only where it is little.
_MOST_BESIDE_BYTES = 32 * 2**20
# Some kernels are chosen by whether tensors begin at a multiple of 16 bytes.
_ALIGNMENT = 16
# An allocator that is not torch's own for CUDA says it in its own words.
NO_MEMORY = RuntimeError, MemoryError
# No promise of torch.
_CAN_PUSH = hasattr(dispatch, "_push_mode") and hasattr(dispatch, "_pop_mode")
_MAKE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}


class Given(NamedTuple):
    """The tensors among a call's arguments, with sinks as they are attended with."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    sinks: Tensor | None
    out: Tensor | None
    cached_k: Tensor | None = None
    cached_v: Tensor | None = None
    page_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @classmethod
    def of(cls, arguments: Arguments) -> Given:
        """Those of a call."""
        q, k, v, _, cache, *_, sinks, out, _ = arguments
        if cache is None:
            return cls(q, k, v, sinks, out)
        if isinstance(cache, PagedKV):
            return cls(q, k, v, sinks, out, cache.k_pages, cache.v_pages, cache.page_table, cache.k_scale, cache.v_scale)
        return cls(q, k, v, sinks, out, cache.k, cache.v)

    def are_plain(self) -> bool:
        """Whether none begins where another does, and all at a multiple of 16 bytes: else which kernels are launched may depend on it."""
        # An empty one has none.
        addresses = [address for x in self if x is not None and (address := x.data_ptr())]
        bits = 0
        for address in addresses:
            bits |= address
        return bits % _ALIGNMENT == 0 and len(set(addresses)) == len(addresses)


class _Made(NamedTuple):
    """Memory that a call makes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Again(NamedTuple):
    """A launch.

    Attributes:
        launch: what launches it, given its tensors; pick: what picks these of all. What it returns are more of them.
        views: of what it returns, which are more of them as well.
        made: what it returns.
    """

    launch: Callable[..., Any]
    pick: Callable[[Sequence[Any]], tuple[Tensor, ...]]
    views: tuple[View, ...]
    made: tuple[_Made, ...]


class Relaunch(NamedTuple):
    """What one call has done.

    Attributes:
        plan: of the batch that it was over.
        memory: the list of what it used of the arena, which is another one once messages lie elsewhere.
        posts: of each of its transfers whether launches send it. Either all do, and none has to be expected, or none does.
        bytes_sent: by it.
        steps: in order, with tensors of those that are given, made, views of these, constant, and of each step its results and views of
            these, in this order.
        made: the memory that it makes; made_by_steps: what steps make.
        views: of what is given or made.
        constants: tensors that are the same in every call.
        result: picks ``out`` and ``lse``.
    """

    plan: Layout
    memory: list[Tensor]
    posts: list[bool]
    bytes_sent: int
    steps: tuple[_Again | Start | Wait, ...]
    made: tuple[_Made, ...]
    made_by_steps: tuple[_Made, ...]
    views: tuple[View, ...]
    constants: tuple[Tensor, ...]
    result: Callable[[Sequence[Any]], tuple[Tensor, Tensor]]

    @property
    def launches_send(self) -> bool:
        """Whether it has any that launches send."""
        return self.posts[:1] == [True]

    @property
    def has_transfers(self) -> bool:
        """Whether it has any that have to be started by others than launches."""
        return self.posts[:1] == [False]

    def tensors_or_none(self, given: Given) -> list[Any] | None:
        """All that a call needs; None where there is no memory for it."""
        empty = torch.empty_strided
        try:
            tensors: list[Any] = [
                *given,
                *[empty(size, stride, dtype=dtype, device=device) for size, stride, dtype, device in self.made],
            ]
            if self.made_by_steps and self.launches_send:
                # Freed at once: so it is there when the steps ask for it, and what is sent before is not sent in vain.
                [empty(size, stride, dtype=dtype, device=device) for size, stride, dtype, device in self.made_by_steps]
            add_views(tensors, self.views)
        except NO_MEMORY:
            # Nothing was sent: the call goes the long way, on which messages are sent whatever happens.
            return None
        tensors += self.constants
        return tensors

    def run(self, tensors: list[Any], start: Callable[[], Work], failures: list[Exception] | None = None) -> tuple[Tensor, Tensor]:
        """Does it all; returns ``out`` and ``lse``.

        Args:
            tensors: all that it needs; what steps make is put there as well.
            start: starts the call's next transfer.
            failures: if given, of steps that make something: with NaN in its place the others are done all the same, as they send.
        """
        works: list[Work] = []
        for step in self.steps:
            if isinstance(step, _Again):
                launch, pick, views, made = step
                try:
                    results = launch(*pick(tensors))
                except Exception as failure:
                    if failures is None or not made:
                        raise
                    failures.append(failure)
                    results = tuple(_nothing(kind) for kind in made)
                if results is not None:
                    tensors += tuple_of(results)
                    add_views(tensors, views)
            elif isinstance(step, Wait):
                works[step.number].wait()
            else:
                works.append(start())
        return self.result(tensors)


class Recorder(TorchDispatchMode):
    """Records what a call does while this is entered.

    >>> with Recorder() as recorder:
    ...     x = torch.empty(3)
    >>> recorder.other, len(recorder.made)
    (None, 1)
    >>> with recorder:
    ...     x = x + 1
    >>> recorder.other
    'add'

    Args:
        result_bytes: of what the call returns. All that is made is kept alive until the call ends: where that is much more than this, what
            was recorded is let go of.

    Attributes:
        made: memory.
        other: the operations that are not done again, in order; None where there were none.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler, which takes a second, and puts 20 us around each operation."""
        return False

    def __init__(self, result_bytes: int = 0) -> None:
        super().__init__()
        self._most_bytes = result_bytes + _MOST_BESIDE_BYTES
        self.made: list[Tensor] = []
        self.other: str | None = None
        self._steps = Steps()
        self._noting: AbstractContextManager[Steps] = nullcontext(self._steps)

    # Where it can, without what super() says to the whole process: that torch.compile is to leave everything alone meanwhile. Where two
    # threads do so at once, it stays said (torch 2.13).
    def __enter__(self) -> Recorder:
        self._noting = noting()
        self._steps = self._noting.__enter__()
        self._steps.room = self._most_bytes
        if _CAN_PUSH:
            dispatch._push_mode(self)
        else:
            super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if _CAN_PUSH:
            dispatch._pop_mode()
        else:
            super().__exit__(*raised)
        self._noting.__exit__(*raised)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._steps.is_within:
            return result
        name = function.overloadpacket.__name__
        if name in _MAKE:
            if self._steps.has_room_for(result):
                self.made.append(result)
            else:
                self.made.clear()
        elif name == "copy_" and len(args) == 2 and not kwargs and args[0].device == args[1].device:
            self._steps.note(Launch(_copy, args))
        elif name == "fill_" and len(args) == 2 and not kwargs and not isinstance(args[1], Tensor):
            self._steps.note(Launch(partial(_fill, args[1]), args[:1]))
        elif not (function.is_view and _are_views(result, args)):
            self.other = name if self.other is None else f"{self.other}, {name}"
        return result

    @property
    def is_too_large(self) -> bool:
        """Whether more was made than may be kept."""
        return self._steps.room < 0

    def relaunch(
        self, given: Given, result: tuple[Tensor, Tensor], plan: Layout, memory: list[Tensor], posts: list[bool], bytes_sent: int
    ) -> Relaunch | None:
        """How it is done again; None where that cannot be.

        Args:
            given: to the call; result: of it. The others as in :class:`Relaunch`.
        """
        starts = sum(isinstance(step, Start) for step in self._steps)
        if self.is_too_large or self.other is not None or starts + sum(posts) != len(posts) or (starts and any(posts)):
            return None
        of_steps = [made_by(step) for step in self._steps]
        made = [*self.made, *chain(*of_steps)]
        if not all(x.numel() for x in made):
            return None
        found = FoundTensors([[*given, *self.made], *of_steps])
        steps = [(step, [found.find(x) for x in step.tensors] if isinstance(step, Launch) else []) for step in self._steps]
        results = [found.find(x) for x in result]
        if any(None in places for _, places in steps) or any(place is None or not place.is_whole for place in results):
            return None
        if sum(x.nbytes for x in made if found.find(x) not in results) > _MOST_BESIDE_BYTES:
            return None
        found.put_in_order()
        again = tuple(
            _Again(step.launch, found.picker(places), found.views(number), _kinds(by_step)) if isinstance(step, Launch) else step
            for number, ((step, places), by_step) in enumerate(zip(steps, of_steps, strict=True), 1)
        )
        before, by_steps = _kinds(self.made), _kinds(chain(*of_steps))
        pick, constants = found.picker(results), tuple(found.constants)
        return Relaunch(plan, memory, posts, bytes_sent, again, before, by_steps, found.views(0), constants, pick)


def _are_views(result: Any, args: Sequence[Any]) -> bool:
    """Whether it has copied nothing: under inference_mode ``x.to``, ``x.contiguous`` and ``x.reshape`` are one operation each, and may."""
    begin, end = address_range(args[0]) if args and isinstance(args[0], Tensor) else (0, 0)
    return all(not x.numel() or begin <= x.data_ptr() < end for x in (result if isinstance(result, (list, tuple)) else [result]))


def _kinds(made: Iterable[Tensor]) -> tuple[_Made, ...]:
    return tuple(_Made(tuple(x.shape), x.stride(), x.dtype, x.device) for x in made)


def _nothing(kind: _Made) -> Tensor:
    """What stands for what could not be made."""
    return torch.empty_strided(kind.size, kind.stride, dtype=kind.dtype, device=kind.device).fill_(torch.nan)


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)


def _fill(number: float, x: Tensor) -> None:
    x.fill_(number)
