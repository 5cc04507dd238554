"""What carries messages within a group of ranks, and across such groups."""

from __future__ import annotations

from dataclasses import replace

from cpattn.machine import LinkCosts, Machine


def link_within(machine: Machine, transport: str, size: int) -> LinkCosts:
    """Of an all-to-all. Over several hosts each rank sends to each other one by the adapter that is its own."""
    link = machine.link(transport, size)
    assert link is not None  # of such a transport there are no estimates
    return link if size <= machine.ranks_per_host else replace(link, gather=link.shift)


def link_across(machine: Machine, size: int, cp_size: int) -> LinkCosts:
    """Across groups of so many ranks. A gather comes over the adapters of those ranks of a host that gather the same."""
    link = machine.link("collectives", cp_size)
    assert link is not None  # collectives are always there
    if cp_size <= machine.ranks_per_host:
        return link
    return replace(link, gather=min(link.gather, link.shift * max(1, machine.ranks_per_host // size)))
