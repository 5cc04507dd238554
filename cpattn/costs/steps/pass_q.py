"""What queries that travel do, and calls that attend to what lies in caches already."""

from __future__ import annotations

from cpattn.costs.steps.all_gather import new_keys_in_order
from cpattn.costs.steps.pieces import attend_and_merge, copy_pages, finished, merge, put, write_own
from cpattn.costs.steps.tally import Choice, Most, Tally
from cpattn.exchange.new_keys_alone import nothing_is_cached
from cpattn.exchange.pass_q_with_new_keys import brings_new_keys


def pass_q(choice: Choice) -> Tally:
    """Gather queries beside the attention to one's own, attend with those of others, send results back, merge them."""
    if brings_new_keys(choice.problem, choice.plan):
        return (new_keys_in_order if nothing_is_cached(choice.problem, choice.plan) else _pass_q_with_new_keys)(choice)
    tally = Tally(choice)
    write_own(tally)
    return over_own_keys(tally)


def resident(choice: Choice) -> Tally:
    """Attend to pages that have everything already."""
    tally, plan = Tally(choice), choice.plan
    copy_pages(tally, Most.of(plan).both)
    tally.attend(*choice.schedule, over_pages=True)
    return tally


def resident_shards(choice: Choice) -> Tally:
    """As pass_q, over shards in which new tokens lie already."""
    tally = Tally(choice)
    copy_pages(tally, int(choice.plan.held_lens.sum(axis=0).max()))
    return over_own_keys(tally)


def over_own_keys(tally: Tally) -> Tally:
    """This rank's queries and those of others over the keys that it holds, and the results back."""
    choice = tally.choice
    plan, problem, _, schedule, *_ = choice
    # Who has few queries of its own goes on to those of others.
    launches = attend_and_merge(tally, schedule, merges=False, over_pages=problem.cache == "paged")
    if schedule[-1].queries == "others" and problem.rows:
        *own, others = schedule
        results, sent = problem.rows * problem.result_bytes, int(others.sent.max())
        goes_to_all = sent == (plan.cp_size - 1) * results
        if len(own) > 1:
            merge(tally)
        tally.move(2 * problem.rows * problem.query_bytes)
        if not goes_to_all:
            # Taken out of this rank's queries.
            tally.move(2 * int(own[-1].sent.max()))
        tally.gather(int(own[-1].sent.max()), tally.cover(launches[:-1]))
        put(tally, plan.cp_size * results if goes_to_all else sent)
        tally.gather_parts(sent)
        tally.move((plan.cp_size + 2) * results if goes_to_all else 2 * sent + 3 * results)
    return finished(tally)


def _pass_q_with_new_keys(choice: Choice) -> Tally:
    """New keys and values are gathered with the queries, and put in order for one's own, while results go back."""
    plan, problem, _, schedule, *_ = choice
    tally = Tally(choice)
    over_pages = problem.cache == "paged"
    *cached, new = schedule
    rows, results = plan.cp_size * problem.rows, problem.rows * problem.result_bytes
    tally.move(2 * problem.rows * (problem.query_bytes + problem.key_bytes), launches=2)
    copy_pages(tally, int(plan.shard_lens.sum(axis=0).max()))
    launches = attend_and_merge(tally, cached, merges=False, over_pages=over_pages)
    tally.gather(int(cached[0].sent.max()), tally.cover(launches[:-1]) if plan.cp_size > 1 else 0.0)
    tally.move(2 * rows * problem.key_bytes // plan.cp_size)
    tally.move(2 * rows * problem.key_bytes)
    own = attend_and_merge(tally, [new], merges=True)
    if plan.cp_size > 1 and problem.rows:
        put(tally, plan.cp_size * results)
        tally.gather_parts(int(new.sent.max()), tally.cover(own))
        tally.move((plan.cp_size + 2) * results)
    return finished(tally)
