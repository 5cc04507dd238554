"""Whether another partition, or a sharded cache, would make ranks more even."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from cpattn.errors import PlanError
from cpattn.metadata.partition import PARTITIONS, REMAINDERS
from cpattn.metadata.plan import Plan
from cpattn.metadata.striped import Striped

# Closer than this is as even, as it is for a partition that leaves requests whole.
_AS_EVEN = 1.02


def more_even(plan: Plan) -> str | None:
    """One line about what would make the busiest rank's query-key pairs fewer; None where nothing would by more than 2%.

    >>> import cpattn
    >>> more_even(cpattn.plan([(0, 64)], 4, partition="contiguous"))
    'more even than contiguous: zigzag, 1.00 times the mean instead of 1.74'
    >>> more_even(cpattn.plan([(4096, 1)], 4))
    'more even than zigzag: a sharded cache with queries="all", 1.00 times the mean instead of 4.00'
    >>> more_even(cpattn.plan([(0, 64)], 4))
    """
    others = list(_others(plan))
    least = min(other.pair_imbalance for _, other in others)
    # Partitions come first: where one is as even as can be had, the cache may stay as it is.
    for what, other in others:
        if other.pair_imbalance <= _AS_EVEN * least and plan.pair_imbalance > _AS_EVEN * other.pair_imbalance:
            return f"more even than {_named(plan)}: {what}, {other.pair_imbalance:.2f} times the mean instead of {plan.pair_imbalance:.2f}"
    return None


def _others(plan: Plan) -> Iterator[tuple[str, Plan]]:
    cache = plan.owner if plan.sharded else Striped()
    changes: list[tuple[str | None, dict[str, Any]]] = [(None, {"partition": name, "remainder": REMAINDERS[0]}) for name in PARTITIONS]
    for what, change in [*changes, ('a sharded cache with queries="all"', {"queries": "all", "owner": cache})]:
        # Where a rank has most tokens, or all, its rows may be too many.
        with suppress(PlanError):
            other: Plan = replace(plan, **change)
            yield what or _named(other), other


def _named(plan: Plan) -> str:
    return str(plan.partition) + (f" with remainder {plan.remainder}" if plan.remainder != REMAINDERS[0] else "")
