"""Which strategies ``"auto"`` compares: what can serve a plan, and what of that fits."""

from __future__ import annotations

from typing import NamedTuple

from cpattn.byte_sizes import in_words
from cpattn.errors import UnsupportedError
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.decodes import DECODE_TOKENS, only_decodes
from cpattn.exchange.divided_heads import shares_of
from cpattn.exchange.heads_message import Widths
from cpattn.exchange.helix import HELIX
from cpattn.exchange.new_keys_alone import nothing_is_cached
from cpattn.exchange.pass_q import PASS_Q, PASS_Q_RING
from cpattn.exchange.pass_q_with_new_keys import brings_new_keys
from cpattn.exchange.registry import able_strategies, find_strategy, strategies_for
from cpattn.exchange.resident_shards import as_asked_for, is_resident
from cpattn.exchange.ring import RING
from cpattn.exchange.strategy import Strategy
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.exchange.ulysses import ULYSSES
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import View
from cpattn.problem import Problem

# All-gather is one launch and needs no merging, but holds all keys twice (gathered and in order). Beyond this many
# bytes of keys and values, "auto" takes the ring, which holds two messages.
AUTO_GATHER_LIMIT = 8 * 2**30
# Gathered queries and their results are held for all ranks at once; beyond this many bytes "auto" sends them around.
AUTO_GATHER_QUERIES_LIMIT = 256 * 2**20


class Candidates(NamedTuple):
    """Strategies in groups: those of a later group are looked at where no backend can serve one of an earlier group. Within a group the
    fastest is taken.

    Attributes:
        why: what the groups follow from, in words.
    """

    groups: list[list[Strategy]]
    why: str


def candidate_strategies(given: str | Strategy, problem: Problem, plan: Layout) -> list[list[Strategy]]:
    """The strategy of that name, or that is given; for ``"auto"`` those that can serve the plan, as :class:`Candidates` has them.

    Raises UnknownNameError, or UnsupportedError where the one that is asked for, or any, cannot serve the plan.
    """
    if isinstance(given, str) and given == "auto":
        groups = [[one for one in group if one.refusal(problem, plan) is None] for group in auto_candidates(problem, plan).groups]
        if not any(groups):
            said = "; ".join(f"{other.name}: {other.refusal(problem, plan)}" for other in strategies_for(plan).values())
            raise UnsupportedError(f"no strategy can serve this call: {said}")
        return [group for group in groups if group]
    strategy = find_strategy(given)
    reason = strategy.refusal(problem, plan)
    if reason is not None:
        # Of what attends to pages as they are there is no other.
        able = "" if is_resident(strategy) else ", ".join(repr(other.name) for other in able_strategies(problem, plan))
        others = f"; {able} could" if able else ""
        raise UnsupportedError(f"{as_asked_for(strategy)} cannot serve this call: {reason}{others}")
    return [[strategy]]


def auto_candidates(problem: Problem, plan: Layout) -> Candidates:
    """For ``"auto"``, whether they can serve the plan or not."""
    if plan.all_queries:
        return Candidates([[HELIX]], "queries are split by heads")
    if not plan.sharded:
        if plan.cp_size == 1:
            return Candidates([[ALL_GATHER], [RING]], "there is one rank")
        gathered = _rows_of_gather(problem, plan) * problem.key_bytes
        if gathered > AUTO_GATHER_LIMIT:
            return Candidates(
                [[RING], [ALL_GATHER]], f"a rank's keys and values are {in_words(gathered)}, above {in_words(AUTO_GATHER_LIMIT)}"
            )
        held = f"a rank's keys and values are {in_words(gathered)}, within {in_words(AUTO_GATHER_LIMIT)}"
        return Candidates([[ALL_GATHER, RING, *_by_heads(problem, plan)]], held)
    if problem.window is not None:
        # The model does not know what a window leaves of pass_q. Where no cached key has to travel, none does.
        if only_decodes(plan):
            return Candidates(
                [[PASS_Q], [ALL_GATHER]], f"no request has more than {DECODE_TOKENS} new tokens, so that no cached key has to travel"
            )
        return Candidates([[ALL_GATHER], [PASS_Q]], "of a sharded cache it brings what a window reaches")
    what, row, limit = "all queries and results", problem.query_bytes + problem.result_bytes, AUTO_GATHER_QUERIES_LIMIT
    if brings_new_keys(problem, plan) and nothing_is_cached(problem, plan):
        what, row, limit = "nothing is cached, and all keys and values", problem.key_bytes, AUTO_GATHER_LIMIT
    gathered = plan.cp_size * problem.rows * row
    fits = gathered <= limit
    held = f"{what} are {in_words(gathered)}, {'within' if fits else 'above'} {in_words(limit)}"
    # A ring copies each rank's shard out of its pages and sends all of them around, for a handful of queries. Between two H100,
    # 256 x (8k + 1) over pages of 64 tokens took 16.9 ms with it and 1.5 ms with pass_q. Contexts grow, and a bucket's choice stays.
    rings = [] if only_decodes(plan) else [RING]
    if only_decodes(plan):
        held = f"no request has more than {DECODE_TOKENS} new tokens, and {held}"
    if fits:
        return Candidates([[PASS_Q, PASS_Q_RING, *rings]], held)
    return Candidates([[PASS_Q_RING, *rings], [PASS_Q]], held)


def _by_heads(problem: Problem, plan: Layout) -> list[Strategy]:
    """What divides heads, where its messages fit. A cache in pages has all heads of its tokens, so that a rank would want all of those; and
    who asks for groups of heads asks for an all-gather."""
    if problem.q_heads < plan.cp_size or problem.cache == "paged" or problem.expands or problem.overlap > 1:
        return []
    widths = Widths.of(problem, shares_of(problem, plan.cp_size))
    return [ULYSSES] if plan.cp_size * problem.rows * (widths.there + widths.back) <= AUTO_GATHER_LIMIT else []


def _rows_of_gather(problem: Problem, plan: Layout) -> int:
    """Of an all-gather the keys that a rank holds in order, at most."""
    # Pages are not copied, at least where a backend reads them.
    if problem.cache == "paged":
        return plan.cp_size * problem.rows
    view = View.of(plan)
    is_whole = traveling_keys(problem, plan).what == "all"
    return int(view.prefix.max()) + (plan.cp_size * problem.rows if is_whole else int(view.new.max()))
