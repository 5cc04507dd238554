"""What ``auto`` has chosen, and why, in words."""

from __future__ import annotations

from dataclasses import replace

from cpattn.attention.auto import explain_backends, how_served
from cpattn.attention.registry import BACKENDS
from cpattn.byte_sizes import in_words
from cpattn.call.choose import Choice
from cpattn.costs.compare import Compared, compared
from cpattn.costs.decide import Decision
from cpattn.costs.steps.tally import latents_of
from cpattn.exchange.auto import auto_candidates
from cpattn.exchange.registry import strategies_for
from cpattn.exchange.schedule import alignments
from cpattn.expansion import bytes_of_head, head_groups
from cpattn.machine import Machine
from cpattn.metadata.layout import Layout

# Of the ways that were compared so many are named.
_NAMED = 2
# Of the most GPUs that tables in benchmarks/results have.
_MEASURED_RANKS = 4
# What differs by less is as fast.
_NEAR = 1.02


def explain_backend(choice: Choice) -> dict[str, str]:
    """For each backend ``"chosen"`` or ``"able"``, with the microseconds that a call is estimated to take with it, or the reason why it
    cannot serve the call. What can comes first, the fastest of it at the beginning."""
    problem, decision = choice.problem, choice.decision
    reasons = explain_backends(problem, alignments(choice.schedule))
    reasons |= {name: f"able{how_served(BACKENDS[name], problem)}" for name, reason in reasons.items() if reason == "able"}
    chosen = choice.backend.name
    if chosen in reasons:
        reasons[chosen] = f"chosen{how_served(choice.backend, problem)}"
    times = {one.way.backend.name: _estimated(one) for one in decision.compared if one.way.strategy is choice.strategy}
    if len(times) > 1:
        others = {name: "its time is not estimated" for name, reason in reasons.items() if reason.startswith("able")}
        reasons |= {name: f"{reasons[name]}, {time}" for name, time in (others | times).items()}
        return {name: reasons[name] for name in times} | reasons
    return reasons


def explain_strategy(choice: Choice, plan: Layout) -> dict[str, str]:
    """For each strategy ``"able"``, or why it cannot serve the call; for the chosen one ``"chosen"``, and what decided. The chosen one
    comes first, but for those that no backend could serve."""
    problem, decision = choice.problem, choice.decision
    groups, why = auto_candidates(problem, plan)
    tried = [strategy.name for group in groups for strategy in group]
    known = strategies_for(plan)
    names = [*tried, *(name for name in known if name not in tried)]
    reasons = {
        name: known[name].refusal(problem, plan) or ("able" if name in tried else "able, but not taken for such a batch") for name in names
    }
    chosen = choice.strategy.name
    for group in groups:
        if choice.strategy in group:
            break
        reasons |= {strategy.name: "no backend can serve it" for strategy in group if reasons[strategy.name] == "able"}
    compared = {one.way.strategy.name: one for one in reversed(decision.compared)}
    reasons |= {name: f"able, {_estimated(one)}" for name, one in compared.items() if len(compared) > 1}
    first = {name: reasons[name] for name in tried if reasons[name] == "no backend can serve it"}
    return (
        first | {chosen: f"chosen, {comparison(choice) or why}"} | {name: reasons[name] for name in names if name not in (chosen, *first)}
    )


def explain_expansion(choice: Choice, plan: Layout) -> str:
    """How a latent is expanded where a launch attends to the most keys, in words."""
    problem = choice.problem
    num_keys = max((latents_of(plan, problem, hop) for hop in choice.schedule), default=0)
    groups = head_groups(problem, num_keys)
    most = max(heads.stop - heads.start for heads in groups)
    at_a_time = in_words(most * bytes_of_head(problem, num_keys))
    many = f"{len(groups)} groups of up to {most} heads" if len(groups) > 1 else f"all {most} heads at once"
    return (
        f"{problem.latent_dim} numbers a token are expanded to {problem.head_dim} and {problem.v_head_dim} a head, {many}, {at_a_time} each"
    )


def compared_on(choice: Choice) -> Machine | None:
    """By what a partition is compared for such calls: their machine, with the backends that serve them; None on a CPU, which has none."""
    call = choice.decision.call
    if choice.problem.device.type != "cuda":
        return None
    kernels = list(call.kernels.values()) or [kernel for kernel in call.machine.kernels if kernel.backend == choice.backend.name]
    return call.machine.only(*(kernel.backend for kernel in kernels or call.machine.kernels[:1]))


def comparison(choice: Choice) -> str:
    """The fastest two ways, and for what they were estimated; empty where nothing was compared."""
    decision = choice.decision
    ways = [f"{one.way.strategy.name} with {one.way.backend.name} {_estimated(one)}" for one in decision.compared[:_NAMED]]
    if not ways:
        return ""
    how = "as a CUDA graph" if choice.problem.fixed else "eagerly"
    return f"{', '.join(ways)}: {how} over {decision.call.transport} on {decision.call.machine.name}{_over_collectives(decision)}"


def _over_collectives(decision: Decision) -> str:
    """Where the memory of peers is taken though collectives are estimated to be faster, that this is so, and why."""
    call = decision.call
    if call.transport == "collectives" or call.plan.cp_size == 1:
        return ""
    mine = decision.compared[0].seconds
    theirs = compared(replace(call, transport="collectives", beside={}), [decision.way])[0].seconds
    if theirs * _NEAR >= mine:
        return ""
    guess = f": more than {_MEASURED_RANKS} GPUs were not measured, and how they crowd at one of them is a guess"
    return (
        f". Over collectives it is estimated at {theirs * 1e6:,.0f} us, and the memory of peers is taken wherever ranks share it"
        f"{guess if call.plan.cp_size > _MEASURED_RANKS else ''}"
    )


def _estimated(one: Compared) -> str:
    return f"{'at least' if one.at_least else 'estimated'} {one.seconds * 1e6:,.0f} us"
