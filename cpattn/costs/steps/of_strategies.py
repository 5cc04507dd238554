"""The steps of each strategy."""

from __future__ import annotations

from functools import partial

from cpattn.costs.steps.all_gather import all_gather
from cpattn.costs.steps.heads import divided_heads, helix
from cpattn.costs.steps.pass_q import pass_q, resident, resident_shards
from cpattn.costs.steps.pieces import outputs
from cpattn.costs.steps.ring import pass_q_ring, ring
from cpattn.costs.steps.tally import Choice, Steps, Tally
from cpattn.costs.steps.two_levels import two_levels
from cpattn.exchange.divided_heads import DividedHeads
from cpattn.exchange.helix import HELIX, RESIDENT_HELIX
from cpattn.exchange.resident import RESIDENT
from cpattn.exchange.resident_shards import RESIDENT_SHARDS
from cpattn.exchange.strategy import Strategy
from cpattn.exchange.two_level import TwoLevel

STEPS: dict[str, Steps] = {
    "all_gather": all_gather,
    "ring": ring,
    "pass_q": pass_q,
    "pass_q_ring": pass_q_ring,
    RESIDENT.name: resident,
    RESIDENT_SHARDS.name: resident_shards,
    HELIX.name: helix,
    RESIDENT_HELIX.name: partial(helix, writes=False),
}


def steps_of(strategy: Strategy) -> Steps:
    """What one call of it does."""
    if isinstance(strategy, DividedHeads):
        assert strategy.across is not None  # of all that divide heads
        return partial(divided_heads, strategy=strategy, across_groups=STEPS[strategy.across.name])
    if isinstance(strategy, TwoLevel):
        return partial(two_levels, strategy=strategy)
    return STEPS[strategy.name]


def tally_of(strategy: Strategy, choice: Choice) -> Tally:
    """What a call by a strategy that :func:`steps_of` knows adds up to."""
    tally, problem = steps_of(strategy)(choice), choice.problem
    if problem.sinks and not (choice.backend.native_sinks and choice.results == 1):
        # On the finished result, by eight small kernels. One passes over it, at 0.6 to 0.8 TB/s of an H100 (backends_gpu_merging.csv).
        dtype = problem.dtype if choice.results == 1 else problem.merge_dtype
        tally.move(9 * dtype.itemsize * outputs(choice), launches=8)
    return tally
