"""What strategies do that divide heads: among all ranks, in groups, or of queries alone."""

from __future__ import annotations

from cpattn.costs.steps.links_of_groups import link_across, link_within
from cpattn.costs.steps.pieces import attend_and_merge, copy_pages, finished, put
from cpattn.costs.steps.tally import Choice, Steps, Tally
from cpattn.exchange.divided_heads import DividedHeads, busiest_share, shares_of
from cpattn.exchange.heads_message import Widths
from cpattn.exchange.schedule import num_results
from cpattn.metadata.united import united_layout

# Bytes a second that are read and written where some of a row's heads go into a message, and out of it: half of what a copy within an H200
# does (between two of them, from 2k to 64k tokens: peers_2_gpus.csv), and seven tenths of one within an H100, whose memory is slower. So
# it is not memory that bounds it.
_MOVED = 2.13e12
# By how much longer than keys it takes to read heads of peers (the same table).
_READ_OF_PEERS = 1.4


def helix(choice: Choice, writes: bool = True) -> Tally:
    """Gather the queries of all heads, attend with them to one's own keys, send each head's results to its rank, merge them."""
    plan, problem = choice.plan, choice.problem
    tally, size = Tally(choice), plan.cp_size
    queries, results = problem.rows * problem.query_bytes, problem.rows * problem.result_bytes
    if writes:
        tally.move(2 * problem.rows * problem.key_bytes // size)
    copy_pages(tally, int(plan.held_lens.sum(axis=0).max()))
    if size > 1 and problem.rows:
        tally.move(2 * queries // size)
        tally.gather((size - 1) * queries // size)
        tally.move(2 * queries)
    attend_and_merge(tally, choice.schedule, merges=False, over_pages=problem.cache == "paged")
    if size > 1 and problem.rows:
        put(tally, results)
        tally.gather_parts((size - 1) * results // size)
        tally.move((size + 2) * results // size)
    return finished(tally)


def divided_heads(choice: Choice, strategy: DividedHeads, across_groups: Steps) -> Tally:
    """Rows are exchanged for heads within a group, put in order, and attended to with another strategy across groups; results go back."""
    plan, problem, machine = choice.plan, choice.problem, choice.machine
    size, across = strategy.group_size(plan), strategy.across
    assert across is not None  # of all that divide heads
    if size == 1:
        return across_groups(choice)
    united, busiest = united_layout(plan, size), busiest_share(problem, plan, size)
    transport = choice.transport if size == plan.cp_size else "collectives"
    link, outer = link_within(machine, transport, size), link_across(machine, size, plan.cp_size)
    schedule = across.schedule(busiest, united)
    of_groups = choice._replace(
        plan=united,
        problem=busiest,
        schedule=schedule,
        results=num_results(schedule),
        transport=transport,
        link=outer,
        attention=choice.attention.of(united, busiest),
    )
    tally = across_groups(of_groups)
    tally.add(exchange_of_heads(choice._replace(link=link, transport=transport), size), 1)
    return tally


def exchange_of_heads(choice: Choice, size: int) -> Tally:
    """Rows go to those of a group who have their heads, and results come back."""
    tally, rows = Tally(choice), choice.problem.rows
    widths = Widths.of(choice.problem, shares_of(choice.problem, size))
    slower = max(1.0, choice.machine.copy / _MOVED)
    read = _READ_OF_PEERS if choice.transport == "peer_memory" else 1.0
    for width, into, out_of in ((widths.there, 3, 1), (widths.back, 2, 2)):
        # All of a group's rows: into the message, and out of it.
        tally.move(int(slower * 2 * size * rows * width), launches=into)
        tally.gather_parts(int(read * (size - 1) * rows * width))
        tally.move(int(slower * 2 * size * rows * width), launches=out_of)
    return tally
