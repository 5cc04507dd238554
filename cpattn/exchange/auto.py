"""Which strategies ``"auto"`` tries, the preferred first."""

from __future__ import annotations

from cpattn.errors import UnsupportedError
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.pass_q import PASS_Q, PASS_Q_RING
from cpattn.exchange.registry import STRATEGIES, able_strategies, find_strategy
from cpattn.exchange.ring import RING
from cpattn.exchange.schedule import bytes_sent
from cpattn.exchange.strategy import Strategy
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem

# All-gather is one launch and needs no merging, but holds all keys twice (gathered and in order). Beyond this many
# bytes of keys and values, "auto" takes the ring, which holds two messages.
AUTO_GATHER_LIMIT = 8 * 2**30
# Gathered queries and their results are held for all ranks at once; beyond this many bytes "auto" sends them around.
AUTO_GATHER_QUERIES_LIMIT = 256 * 2**20
# A batch whose requests have no more new tokens than this is decoded: one token each, or some that are speculated.
DECODE_TOKENS = 16


def candidate_strategies(given: str | Strategy, problem: Problem, plan: Layout) -> list[Strategy]:
    """The strategy of that name, or that is given; for ``"auto"`` those that can serve the plan, the preferred first.

    Raises UnknownNameError, or UnsupportedError where the one that is asked for, or any, cannot serve the plan.
    """
    if isinstance(given, str) and given == "auto":
        reasons = {strategy.name: strategy.why_not(problem, plan) for strategy in STRATEGIES.values()}
        preferred = [strategy for strategy in _preferred(problem, plan) if reasons[strategy.name] is None]
        if not preferred:
            said = "; ".join(f"{other}: {reason}" for other, reason in reasons.items())
            raise UnsupportedError(f"no strategy can serve this call: {said}")
        return preferred
    strategy = find_strategy(given)
    reason = strategy.why_not(problem, plan)
    if reason is not None:
        able = ", ".join(repr(other.name) for other in able_strategies(problem, plan))
        raise UnsupportedError(f"strategy={strategy.name!r} cannot serve this call: {reason}; {able or 'none'} could")
    return [strategy]


def _preferred(problem: Problem, plan: Layout) -> list[Strategy]:
    if not plan.sharded:
        # Pages are not copied, at least where a backend reads them.
        copied = 0 if problem.cache == "paged" else plan.num_prefix_tokens
        gathered = (plan.cp_size * problem.rows + copied) * problem.key_bytes
        return [ALL_GATHER, RING] if gathered <= AUTO_GATHER_LIMIT else [RING, ALL_GATHER]
    gathered = plan.cp_size * problem.rows * (problem.query_bytes + problem.result_bytes)
    pass_q = [PASS_Q, PASS_Q_RING] if gathered <= AUTO_GATHER_QUERIES_LIMIT else [PASS_Q_RING, PASS_Q]
    if only_decodes(plan):
        # A ring copies each rank's shard out of its pages and sends all of them around, for a handful of queries: between two
        # H100, 256 x (8k + 1) over pages of 64 tokens took 16.9 ms with it and 1.5 ms with pass_q. Over short contexts its bytes
        # are fewer, but it still copies, waits for each hop and merges.
        return pass_q
    sent = {strategy.name: int(bytes_sent(strategy.schedule(problem, plan)).max()) for strategy in (PASS_Q, RING)}
    return [*pass_q, RING] if sent[PASS_Q.name] <= sent[RING.name] else [RING, *pass_q]


def only_decodes(plan: Layout) -> bool:
    """Whether each request has a few new tokens at most, as in decoding and speculation."""
    return bool((plan.extend_lens <= DECODE_TOKENS).all())
