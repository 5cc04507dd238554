"""What steps of several strategies have in common: launches whose results are merged, results in messages, and pages."""

from __future__ import annotations

from collections.abc import Sequence

from cpattn.costs.order_or_pages import reads_pages
from cpattn.costs.steps.tally import Choice, Tally
from cpattn.exchange.schedule import Hop


def outputs(choice: Choice) -> int:
    return choice.problem.rows * choice.problem.q_heads * choice.problem.v_head_dim


def attend_and_merge(tally: Tally, hops: Sequence[Hop], *, merges: bool, over_pages: bool = False) -> list[float]:
    """Launches of hops; with ``merges`` into what there was before. Returns the seconds of each."""
    choice = tally.choice
    launches = tally.attend(*hops, over_pages=over_pages)
    if choice.results > 1 and not choice.backend.propagates_nan:
        # Finding NaN in a column of each result: three small kernels, which overlap.
        tally.move(0, launches=len(hops))
    if merges:
        merge(tally)
    elif choice.results > 1 and not choice.backend.fp32_out:
        tally.move((choice.problem.dtype.itemsize + choice.problem.merge_dtype.itemsize) * outputs(choice))
    return launches


def merge(tally: Tally) -> None:
    """One result more. A kernel that merges it itself hides most of the reading and writing behind its other tiles."""
    choice = tally.choice
    merged = 2 * choice.problem.merge_dtype.itemsize * outputs(choice)
    if choice.backend.accumulate is None:
        tally.move(choice.problem.dtype.itemsize * outputs(choice) + merged)
    else:
        tally.move(merged // 4, launches=0)


def put(tally: Tally, nbytes: int) -> None:
    """Results and their LSE into a message, whose rows are not aligned: at half the speed."""
    tally.move(4 * nbytes, launches=2)


def finished(tally: Tally) -> Tally:
    """What was merged, in the dtype of q."""
    problem = tally.choice.problem
    if tally.choice.results > 1:
        tally.move((problem.dtype.itemsize + problem.merge_dtype.itemsize) * outputs(tally.choice))
    return tally


def write_passing(tally: Tally) -> None:
    """One rank's new keys go into pages that every rank has whole, or as many of them as striped ones hold."""
    plan, problem = tally.choice.plan, tally.choice.problem
    if problem.cache == "paged" and (not plan.sharded or plan.owner is not None):
        tally.move(2 * problem.rows * problem.key_bytes // (1 if plan.owner is None else plan.cp_size))


def write_own(tally: Tally) -> None:
    """A rank's new keys go into its own pages, of which some kernels are given a copy."""
    plan, problem = tally.choice.plan, tally.choice.problem
    if problem.cache == "paged":
        tally.move(2 * problem.rows * problem.key_bytes)
        copy_pages(tally, plan.largest_shard)


def copy_pages(tally: Tally, num_tokens: int) -> None:
    """Keys of so many tokens out of their pages, unless the kernel reads them as they are; and stored ones once more, into q's dtype."""
    choice = tally.choice
    if not reads_pages(choice.problem, choice.kernel, choice.backend):
        tally.move(2 * num_tokens * choice.problem.key_bytes)
    copy_stored(tally, num_tokens)


def copy_stored(tally: Tally, num_tokens: int) -> None:
    """Keys of so many tokens into q's dtype, where they are stored in another one that the kernel does not read."""
    problem = tally.choice.problem
    if problem.stored_dtype != problem.dtype and not tally.choice.backend.reads_stored(problem):
        tally.move(num_tokens * (problem.key_bytes + problem.copied_key_bytes))
