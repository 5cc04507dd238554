"""Each rank's work as bars of text."""

from __future__ import annotations

from collections.abc import Sequence

from cpattn.metadata.draw import describe_busiest, describe_partition
from cpattn.metadata.plan import Plan


def work_as_text(plans: Sequence[Plan], width: int = 40) -> str:
    """A bar of ``#`` a rank, plan after plan, all to one scale; beside it the rank's query-key pairs over the plan's mean.

    >>> import cpattn
    >>> print(work_as_text([cpattn.plan([(0, 8)], 2, partition="contiguous")], width=13))
    contiguous partition, balanced remainder: the busiest rank has 1.44 times the mean
    rank 0 |#####        | 10 pairs, 0.56 x the mean
    rank 1 |#############| 26 pairs, 1.44 x the mean
    """
    busiest = max([pairs for plan in plans for pairs in plan.rank_pairs] + [1])
    blocks = []
    for plan in plans:
        mean = sum(plan.rank_pairs) / plan.cp_size
        lines = [f"{describe_partition(plan)}: {describe_busiest(plan)}"]
        label_width = len(f"rank {plan.cp_size - 1}")
        number_width = max(len(f"{pairs:,}") for pairs in plan.rank_pairs)
        for rank, pairs in enumerate(plan.rank_pairs):
            bar = "#" * round(pairs / busiest * width)
            share = f", {pairs / mean:.2f} x the mean" if mean else ""
            lines.append(f"{f'rank {rank}':<{label_width}} |{bar:<{width}}| {pairs:>{number_width},} pairs{share}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
