"""What a ring of keys does, and a ring of queries."""

from __future__ import annotations

import numpy as np

from cpattn.costs.hop_spans import sample
from cpattn.costs.steps.pieces import attend_and_merge, copy_pages, finished, put, write_own, write_passing
from cpattn.costs.steps.tally import Choice, Tally
from cpattn.exchange.ring_keys import ring_keys
from cpattn.exchange.traveling_queries import traveling_queries


def ring(choice: Choice) -> Tally:
    """Keys go around, or come from their owners: each message travels beside the attention to the one before it, the first also beside
    prefixes."""
    plan, problem, _, schedule, *_ = choice
    own = next(number for number, hop in enumerate(schedule) if hop.keys == 0)
    first, hops = schedule[: own + 1], schedule[own:]
    tally, message = Tally(choice), problem.rows * problem.key_bytes if len(hops) > 1 else 0
    is_straight = ring_keys(problem, plan).straight
    if plan.sharded and problem.cache == "paged":
        tally.move(2 * plan.largest_shard * problem.key_bytes)
    elif message:
        tally.move(2 * message)
    if len(first) > 1 and problem.cache == "paged":
        copy_pages(tally, plan.num_prefix_tokens)
    choice.attention.look_at([hops[0], *(hops[number] for number, _ in sample(1, len(hops)))])
    before = [
        seconds
        for number, hop in enumerate(first)
        for seconds in attend_and_merge(tally, [hop], merges=number > 0, over_pages=hop.keys == "prefix" and problem.cache == "paged")
    ]
    write_passing(tally)
    for number, count in sample(1, len(hops)):
        one = Tally(choice)
        launches, sent = attend_and_merge(one, [hops[number]], merges=True), int(hops[number - 1].sent.max())
        if is_straight:
            # Taken out of the shard.
            one.move(2 * sent)
        one.shift(sent, tally.cover(before if number == 1 else launches))
        write_passing(one)
        tally.add(one, count)
    return finished(tally)


def pass_q_ring(choice: Choice) -> Tally:
    """Queries go around as keys do in a ring, and the results of each hop go back beside the next one."""
    plan, problem, _, schedule, *_ = choice
    own = next(number for number, hop in enumerate(schedule) if hop.queries == hop.keys == 0)
    first, hops = schedule[: own + 1], schedule[own:]
    tally = Tally(choice)
    queries, results = problem.rows * problem.query_bytes, problem.rows * problem.result_bytes
    # Of the rank with the most, in each hop.
    shares = [1.0] * len(hops)
    if plan.owner is None and problem.rows:
        between, ranks = traveling_queries(problem, plan).between, np.arange(plan.cp_size)
        turns = [hop.queries for hop in hops if isinstance(hop.queries, int)]
        shares = [float(between[ranks, (ranks + turn) % plan.cp_size].max()) / problem.rows for turn in turns]
    over_pages = problem.cache == "paged" and plan.owner is None
    if plan.owner is None:
        write_own(tally)
    else:
        # A copy of the shard is attended to, and new keys travel with the queries past those who write them.
        tally.move(2 * plan.largest_shard * problem.key_bytes, launches=2)
        queries += problem.rows * problem.key_bytes
    if len(hops) > 1:
        tally.move(2 * queries)
    before = [
        seconds for number, hop in enumerate(first) for seconds in attend_and_merge(tally, [hop], merges=number > 0, over_pages=over_pages)
    ]
    for number, count in sample(1, len(hops)):
        one, share = Tally(choice), shares[number]
        write_passing(one)
        launches = attend_and_merge(one, [hops[number]], merges=False, over_pages=over_pages)
        one.shift(int(share * queries), tally.cover(before if number == 1 else launches))
        put(one, int(share * results))
        one.shift(int(share * results), 0.0 if number + 1 == len(hops) else tally.cover(launches))
        one.move(3 * results)
        tally.add(one, count)
    return finished(tally)
