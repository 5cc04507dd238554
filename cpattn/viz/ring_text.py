"""A ring's hops over time, as text."""

from __future__ import annotations

from collections.abc import Sequence

from cpattn.metadata.draw import RANK_MARKS, rank_mark
from cpattn.metadata.plan import Plan
from cpattn.viz.ring_schedule import RingSchedule, Stretch


def ring_as_text(schedule: RingSchedule, width: int = 60) -> str:
    """Two lines a rank, what it computes and what it sends, over ``width`` marks of time.

    >>> import cpattn
    >>> from cpattn.viz import ring_schedule
    >>> print(ring_as_text(ring_schedule(cpattn.plan([(0, 8)], 2), transfer=0.5), width=20).split("meanwhile")[1])
    <BLANKLINE>
    rank 0 computes |00000000000111111111|
           sends    |00000...............|
    rank 1 computes |11111111111000000000|
           sends    |11111...............|
    """
    lines = _legend(schedule.plan)
    label_width = len(f"rank {schedule.plan.cp_size - 1}")
    for rank in range(schedule.plan.cp_size):
        for label, name, stretches in (
            (f"rank {rank}", "computes", schedule.computing),
            ("", "sends", schedule.sending),
        ):
            mine = [stretch for stretch in stretches if stretch.rank == rank]
            lines.append(f"{label:<{label_width}} {name:<8} |{_marks(mine, schedule.end, width)}|")
    return "\n".join(lines)


def _legend(plan: Plan) -> list[str]:
    """What the marks mean, as far as it is true of this plan."""
    again = [] if plan.cp_size <= len(RANK_MARKS) else [f"{len(RANK_MARKS)} ranks have a mark of their own; then the marks begin again"]
    cached = ", in the first hop over cached ones as well" if plan.num_prefix_tokens and not plan.sharded else ""
    return [
        "0 1 .. 9 a b ..: the rank whose keys they are   .: nothing",
        *again,
        f"computes: attention over those keys{cached}",
        "sends: those keys, to the next rank, meanwhile",
    ]


def _marks(stretches: Sequence[Stretch], end: float, width: int) -> str:
    """The mark of each slice of time: what goes on in its middle."""
    line = []
    for at in range(width):
        middle = (at + 0.5) * end / width
        owner = next((stretch.owner for stretch in stretches if stretch.begin <= middle < stretch.end), None)
        line.append("." if owner is None else rank_mark(owner))
    return "".join(line)
