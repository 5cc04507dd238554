"""What an all-gather in two levels does."""

from __future__ import annotations

from cpattn.costs.order_or_pages import attends_over_pages
from cpattn.costs.steps.all_gather import all_gather
from cpattn.costs.steps.links_of_groups import link_across, link_within
from cpattn.costs.steps.pieces import copy_pages, copy_stored
from cpattn.costs.steps.tally import Choice, Tally
from cpattn.exchange.two_level import TwoLevel, needed_on_hosts
from cpattn.metadata.needed_keys import View


def two_levels(choice: Choice, strategy: TwoLevel) -> Tally:
    """Pack, gather across hosts and then within each, put in order, attend."""
    plan, problem, machine, (hop,), *_ = choice
    within = strategy.within
    if not hop.sent.any() or within in (1, plan.cp_size):
        return all_gather(choice)
    view, row, is_paged = View.of(plan), problem.rows * problem.key_bytes, problem.cache == "paged"
    over_pages = attends_over_pages(problem, plan, machine, choice.kernel, choice.backend)
    tally = Tally(choice._replace(link=link_within(machine, "collectives", within)))
    first = Tally(choice._replace(link=link_across(machine, within, plan.cp_size)))
    hosts = plan.cp_size // within
    needed = needed_on_hosts(within, problem, plan)
    if needed is None:
        first.gather((hosts - 1) * row)
        tally.gather((plan.cp_size - hosts) * row)
    else:
        for one, sent, received in (
            (first, needed.sent_across, needed.received_across),
            (tally, needed.sent_within, needed.received_within),
        ):
            # Taken out of what is at hand.
            one.move_rows(int(sent.max()), 1)
            one.gather(max(int(sent.max()), int(received.max())) * problem.key_bytes)
    tally.add(first, 1)
    tally.move_rows(problem.rows, 1)
    if problem.cache == "packed":
        tally.move_rows(int(view.prefix.max()), 1)
    if is_paged:
        tally.move_rows(plan.num_tokens, 1)
    if over_pages:
        copy_pages(tally, plan.num_tokens + plan.num_prefix_tokens)
    else:
        tally.move_rows(int(view.new.max()), 1)
        copy_stored(tally, int(view.new.max()))
    tally.attend(hop, over_pages=over_pages)
    return tally
