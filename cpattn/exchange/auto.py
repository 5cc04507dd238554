"""Which strategies ``"auto"`` tries, the preferred first."""

from __future__ import annotations

from typing import NamedTuple

from cpattn.byte_sizes import in_words
from cpattn.errors import UnsupportedError
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.pass_q import PASS_Q, PASS_Q_RING
from cpattn.exchange.registry import STRATEGIES, able_strategies, find_strategy
from cpattn.exchange.ring import RING
from cpattn.exchange.schedule import bytes_sent
from cpattn.exchange.strategy import Strategy
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import View
from cpattn.problem import Problem

# All-gather is one launch and needs no merging, but holds all keys twice (gathered and in order). Beyond this many
# bytes of keys and values, "auto" takes the ring, which holds two messages.
AUTO_GATHER_LIMIT = 8 * 2**30
# An all-gather copies a packed prefix into order with the new keys; a ring attends to it where it lies, and has a hop for each rank. Where
# a prefix is so many times the new tokens, and so many bytes for each rank, the copy costs more: between two H100 120k + 2k tokens took
# 3,062 us with a ring as a graph and 3,242 eagerly, and 3,261 and 3,367 with an all-gather; with 4 times as many it was not so.
AUTO_COPY_RATIO = 16
AUTO_COPY_LIMIT = 128 * 2**20
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
        preferred = [strategy for strategy in _preferred(problem, plan).order if reasons[strategy.name] is None]
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


class _Preference(NamedTuple):
    """The strategies that are tried, in this order, and what decided on it."""

    order: list[Strategy]
    why: str


def explain_strategies(problem: Problem, plan: Layout, chosen: Strategy) -> dict[str, str]:
    """For each strategy ``"able"``, or why it cannot serve the call; for the chosen one ``"chosen"`` and what decided.

    They come in the order in which ``"auto"`` tries them, and those that it does not try come last.
    """
    order, why = _preferred(problem, plan)
    able = {strategy.name: "able" for strategy in order} | {
        name: "able, but not taken for such a batch" for name in STRATEGIES if STRATEGIES[name] not in order
    }
    names = list(able)
    reasons = {name: STRATEGIES[name].why_not(problem, plan) or able[name] for name in names}
    tried = names[: names.index(chosen.name)]
    # Such a one was able to bring keys and queries together, and no backend could serve it.
    no_backend = {name: "no backend can serve it" for name in tried if reasons[name] == "able"}
    return reasons | no_backend | {chosen.name: f"chosen, {why}"}


def _preferred(problem: Problem, plan: Layout) -> _Preference:
    if not plan.sharded:
        rows, copied = _rows_of_gather(problem, plan)
        gathered, copied_bytes = (rows + copied) * problem.key_bytes, copied * problem.key_bytes
        fits = gathered <= AUTO_GATHER_LIMIT
        why = f"a rank's keys and values are {in_words(gathered)}, {'within' if fits else 'above'} {in_words(AUTO_GATHER_LIMIT)}"
        has_long_prefix = copied >= AUTO_COPY_RATIO * plan.num_tokens and copied_bytes > AUTO_COPY_LIMIT * plan.cp_size
        if has_long_prefix and plan.cp_size > 1 and problem.device.type == "cuda":
            return _Preference([RING, ALL_GATHER], f"an all-gather would copy {in_words(copied_bytes)} of cached keys and values")
        return _Preference([ALL_GATHER, RING] if fits else [RING, ALL_GATHER], why)
    if problem.window is not None:
        if only_decodes(plan):
            return _Preference(
                [PASS_Q, ALL_GATHER], f"no request has more than {DECODE_TOKENS} new tokens, so that no cached key has to travel"
            )
        return _Preference([ALL_GATHER, PASS_Q], "of a striped cache it brings what a window reaches")
    gathered = plan.cp_size * problem.rows * (problem.query_bytes + problem.result_bytes)
    fits = gathered <= AUTO_GATHER_QUERIES_LIMIT
    pass_q = [PASS_Q, PASS_Q_RING] if fits else [PASS_Q_RING, PASS_Q]
    held = f"all queries and results are {in_words(gathered)}, {'within' if fits else 'above'} {in_words(AUTO_GATHER_QUERIES_LIMIT)}"
    if only_decodes(plan):
        # A ring copies each rank's shard out of its pages and sends all of them around, for a handful of queries. Between two
        # H100, 256 x (8k + 1) over pages of 64 tokens took 16.9 ms with it and 1.5 ms with pass_q. Over short contexts its bytes
        # are fewer, but it still copies, waits for each hop and merges.
        return _Preference(pass_q, f"no request has more than {DECODE_TOKENS} new tokens, and {held}")
    sent = {strategy.name: int(bytes_sent(strategy.schedule(problem, plan)).max()) for strategy in (PASS_Q, RING)}
    if sent[PASS_Q.name] <= sent[RING.name]:
        return _Preference([*pass_q, RING], f"queries and results are fewer bytes than keys, and {held}")
    return _Preference(
        [RING, *pass_q], f"a rank sends {in_words(sent[RING.name])} of keys, and would of queries {in_words(sent[PASS_Q.name])}"
    )


def _rows_of_gather(problem: Problem, plan: Layout) -> tuple[int, int]:
    """Of an all-gather the rows of new keys that a rank holds, and of cached ones that it copies, at most."""
    # Pages are not copied, at least where a backend reads them.
    if problem.cache == "paged":
        return plan.cp_size * problem.rows, 0
    view = View.of(plan)
    is_whole = traveling_keys(problem, plan).what == "all"
    return plan.cp_size * problem.rows if is_whole else int(view.new.max()), int(view.prefix.max())


def only_decodes(plan: Layout) -> bool:
    """Whether each request has a few new tokens at most, as in decoding and speculation."""
    return bool((plan.extend_lens <= DECODE_TOKENS).all())
