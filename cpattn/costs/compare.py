"""Comparing ways to make a call, by what each is estimated to take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cpattn.costs.steps.tally import Tally
from cpattn.costs.ways import Call, Way
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.pass_q import PASS_Q, PASS_Q_RING
from cpattn.exchange.ring import RING
from cpattn.machine import KernelCosts

# What goes hop by hop, and how the same is gathered at once.
_GATHERS = {RING.name: ALL_GATHER.name, PASS_Q_RING.name: PASS_Q.name}


class Compared(NamedTuple):
    """A way, and the seconds that it is estimated to take; or, where ``at_least`` already was more than another takes, no less than
    that."""

    way: Way
    seconds: float
    at_least: bool


def compared(call: Call, ways: Sequence[Way]) -> tuple[Compared, ...]:
    """Ways that the model knows, the fastest first."""
    found: list[Compared] = []
    tallies: dict[tuple[str, str], Tally] = {}
    for way in ways:
        name, backend = way.strategy.name, way.backend.name
        kernel = call.kernels[backend]
        gathered = tallies.get((_GATHERS[name], backend)) if name in _GATHERS and not call.plan.sharded else None
        if gathered is not None:
            seconds = _at_least(call, way, kernel, gathered, call.beside_hops(way))
            if seconds >= min(one.seconds for one in found):
                found.append(Compared(way, seconds, at_least=True))
                continue
        tally = tallies[name, backend] = call.tally(way, kernel, call.launches)
        found.append(Compared(way, call.seconds(way, tally.seconds, tally.host), at_least=False))
    # Of equal ones the first; to a ns, so that nothing hangs on a last bit.
    return tuple(sorted(found, key=lambda one: (round(one.seconds * 1e9), one.at_least)))


def _at_least(call: Call, way: Way, kernel: KernelCosts, gathered: Tally, beside: Tally) -> float:
    """Seconds of what goes hop by hop, given the same gathered at once: its tiles are as many, and no fuller. In how many hops a rank
    launches anything hangs on who sees whose keys."""
    # All keys may lie in pages where they are gathered, and prefixes alone in a ring.
    compute = gathered.compute / max(1.0, kernel.paged) if call.problem.cache == "paged" else gathered.compute
    return call.seconds(way, compute + beside.moves + beside.exposed, beside.host + len(way.schedule) * kernel.host)
