"""check_layout: whether a layout, an engine's own included, keeps the rules, and the smallest batch for which it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeAlias

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.errors import CPError, PlanError
from cpattn.metadata.chunks import Chunks
from cpattn.metadata.plan import Plan, plan
from cpattn.testing.batches import NAMED_BATCHES
from cpattn.testing.layout_rules import broken_rules

Batch: TypeAlias = Sequence[tuple[int, int]]
_Pairs = list[tuple[int, int]]
# Of shorter lengths each is tried: what is wrong with an odd number of tokens need not be with one token fewer.
_ALL_UP_TO = 64


class LayoutError(CPError):
    """A layout breaks a rule.

    Attributes:
        batch: the smallest that was found for which it does, as (prefix_len, extend_len) of each request.
        cp_size: of that.
    """

    def __init__(self, message: str, batch: Batch, cp_size: int) -> None:
        super().__init__(message)
        self.batch = list(batch)
        self.cp_size = cp_size


def check_layout(
    layout: Plan | Callable[[Any, int], Chunks | Plan],
    *,
    batches: Iterable[Batch] | None = None,
    cp_sizes: Iterable[int] = (1, 2, 3, 8),
) -> None:
    """Raises where a layout breaks a rule, with the smallest batch for which it does. Returns None where it keeps them all.

    >>> import cpattn
    >>> from cpattn.testing import check_layout
    >>> check_layout(cpattn.plan([(0, 10), (64, 1)], cp_size=4))
    >>> check_layout(lambda batch, cp_size: cpattn.plan(batch, cp_size, owner=cpattn.Striped(16), pad_to=8))

    The rules, looked at token by token: each new token is on one rank; chunks stand in order; ranks are as even as the partition
    promises, and have as many rows; token_index, position_ids and restore_index say what rows hold; spans cover exactly the keys
    that are causal; and caches hold each token where their rule says.

    Args:
        layout: a plan, looked at as it is; or a function of a batch and cp_size. It gets the batch as int64 ``[n, 2]`` and returns
            :class:`cpattn.Chunks`, as a partition of one's own does (:func:`cpattn.plan`), or a whole plan. It is tried with
            all batches and group sizes.
        batches: for a function, (prefix_len, extend_len) of each request of each; ``NAMED_BATCHES`` if left out.
        cp_sizes: for a function, which is called with no others.

    Raises:
        LayoutError: a rule is broken; the message says which, where, and for which batch. For a plan the batch is its own, unless
            its options go with smaller ones. What the function itself raises leaves as it is, but for PlanError, which is a fault
            of its layout. A batch that it refuses while a smaller one is looked for counts as none.
        CPError: layout is neither.
    """
    if isinstance(layout, Plan):
        fault = _first_fault(layout)
        if fault is not None:
            pairs, again = [(prefix, extend) for prefix, extend in layout.batch], _planned_again(layout)
            # What was changed in this one plan is not there in another one.
            if again is not None and _fault_of(again, pairs, layout.cp_size) is not None:
                _raise(*_shrunk(again, pairs, range(1, layout.cp_size + 1), fault))
            _raise(fault, pairs, layout.cp_size)
        return
    if not callable(layout):
        raise CPError(
            f"layout is a {type(layout).__name__}; pass a cpattn.Plan, or a function of (batch, cp_size) that returns Chunks or a Plan"
        )
    sizes = sorted(cp_sizes)
    for batch in NAMED_BATCHES.values() if batches is None else batches:
        for cp_size in sizes:
            fault = _fault_of(layout, batch, cp_size)
            if fault is not None:
                _raise(*_shrunk(layout, [(int(prefix), int(extend)) for prefix, extend in batch], sizes[: sizes.index(cp_size) + 1], fault))


def _raise(fault: str, batch: Batch, cp_size: int) -> NoReturn:
    raise LayoutError(
        f"{fault}. The smallest batch found for which that is so: {[tuple(pair) for pair in batch]} over cp_size={cp_size}", batch, cp_size
    )


def _planned_again(found: Plan) -> Callable[[Any, int], Plan] | None:
    """Plans of other batches by the same options; None where these are about the one batch."""
    if found.is_callers or found.prefix_shards is not None:
        return None
    options: dict[str, Any] = {
        "partition": found.partition,
        "remainder": found.remainder,
        "pad_to": found.pad_to,
        "owner": found.owner,
        "queries": found.queries,
    }
    return lambda batch, cp_size: plan(batch, cp_size, **options)


def _fault_of(layout: Callable[[Any, int], Chunks | Plan], batch: Batch, cp_size: int) -> str | None:
    """What is wrong with the layout of one batch, in words; None where nothing is."""
    pairs = np.array(batch, dtype=np.int64).reshape(-1, 2)
    try:
        made = layout(pairs.copy(), cp_size)
        again = layout(pairs.copy(), cp_size)
        planned, other = (_planned(layout, given, pairs, cp_size) for given in (made, again))
    except PlanError as error:
        return str(error)
    if (planned.batch, planned.cp_size) != (tuple(map(tuple, pairs.tolist())), cp_size):
        return f"the plan is of {len(planned.batch)} requests over cp_size={planned.cp_size}, not of what was asked for"
    if planned != other:
        return "the same batch gives another layout the second time; ranks that each work it out would disagree"
    return _first_fault(planned)


def _planned(layout: object, given: Chunks | Plan, batch: IntArray, cp_size: int) -> Plan:
    """What the function gave for a batch, as a plan. Raises PlanError where it is none."""
    if isinstance(given, Plan):
        return given

    def partition(*_: Any) -> Chunks:
        return given

    partition.__name__ = getattr(layout, "__name__", type(layout).__name__)
    return plan(batch, cp_size, partition=partition)


def _first_fault(planned: Plan) -> str | None:
    return next(broken_rules(planned), None)


def _shrunk(layout: Callable[[Any, int], Chunks | Plan], batch: _Pairs, cp_sizes: Sequence[int], fault: str) -> tuple[str, _Pairs, int]:
    """A fault of a batch that cannot be made smaller by one step without the layout being right, or refusing it.

    Args:
        cp_sizes: that may be tried, in order; the fault is one of the last.
    """
    cp_size = cp_sizes[-1]
    # Each step makes the batch or the group smaller, so that there is a last one.
    while True:
        for smaller, size in _smaller(batch, cp_size, cp_sizes):
            try:
                found = _fault_of(layout, smaller, size)
            except Exception:  # An engine's layout may refuse what the engine never asks of it.
                continue
            if found is not None:
                fault, batch, cp_size = found, smaller, size
                break
        else:
            return fault, batch, cp_size


def _smaller(batch: _Pairs, cp_size: int, cp_sizes: Sequence[int]) -> Iterator[tuple[_Pairs, int]]:
    """Batches a step smaller, the largest step first."""
    for count in (len(batch) // 2, 1):
        for first in range(0, len(batch), max(count, 1)):
            if count:
                yield batch[:first] + batch[first + count :], cp_size
    for i, pair in enumerate(batch):
        for side in (0, 1):
            few = range(min(pair[side], _ALL_UP_TO))
            for length in dict.fromkeys((*few, pair[side] // 2, pair[side] - 1) if pair[side] else ()):
                changed = (length, pair[1]) if side == 0 else (pair[0], length)
                yield [*batch[:i], changed, *batch[i + 1 :]], cp_size
    for size in cp_sizes:
        if size < cp_size:
            yield batch, size
