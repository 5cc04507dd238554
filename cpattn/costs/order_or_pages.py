"""Whether an all-gather over pages that every rank holds whole has the attention see new keys in order, and writes them to pages after it:
where that is faster than to attend to them there."""

from __future__ import annotations

from cpattn.attention.backend import Backend
from cpattn.exchange.order_into_pages import are_first_chunks, lie_in_order
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.machine import KernelCosts, Machine
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem


def is_order_faster(problem: Problem, plan: Layout, machine: Machine, kernel: KernelCosts | None, reads_pages: bool) -> bool:
    """The same for a problem and a plan on every rank.

    Args:
        kernel: the backend's constants, or None where there are none; reads_pages: whether it attends to pages as they are.
    """
    if problem.cache != "paged" or plan.sharded or not are_first_chunks(problem, plan):
        return False
    if not reads_pages:
        # A copy of all out of the pages takes no less than to put keys in order. One of what a rank needs may take less: over the memory
        # of peers all new keys would be put in order, and over collectives the rank that needs the most gains nothing.
        return traveling_keys(problem, plan).what != "needed"
    if kernel is None or kernel.paged <= 1:
        return False
    if lie_in_order(problem, plan):
        return True
    pairs = max(plan.rank_pairs) if problem.window is None else min(max(plan.rank_pairs), problem.rows * problem.window)
    spared = (kernel.paged - 1) * 2 * problem.q_heads * (problem.head_dim + problem.v_head_dim) * pairs / kernel.flops
    return spared > machine.launch + 2 * plan.num_tokens * problem.key_bytes / machine.copy


def attends_over_pages(problem: Problem, plan: Layout, machine: Machine, kernel: KernelCosts, backend: Backend) -> bool:
    """Whether an all-gather's launch is over what lies in pages, or was copied out of them."""
    return problem.cache == "paged" and not is_order_faster(problem, plan, machine, kernel, reads_pages(problem, kernel, backend))


def reads_pages(problem: Problem, kernel: KernelCosts, backend: Backend) -> bool:
    """Whether a backend attends to the pages of a call as they are, by its constants, whatever is installed here."""
    reads_stored = problem.stored_dtype == problem.dtype or backend.reads_stored(problem)
    return not problem.expands and reads_stored and kernel.reads_pages(problem.page_size)
