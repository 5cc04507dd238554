"""Each rank's work as bars, for several plans beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpattn.metadata.draw import describe_busiest, describe_partition
from cpattn.metadata.plan import Plan
from cpattn.viz.canvas import canvas
from cpattn.viz.captions import wrapped
from cpattn.viz.palette import INK, rank_color, rank_hatch
from cpattn.viz.rank_rows import MOST_RANKS_NAMED, rank_ticks

_INCHES_A_PLAN = 3.4


def draw_work_picture(plans: Sequence[Plan], path: str | Path) -> None:
    """Draws the query-key pairs of each rank, a panel a plan, over the mean of its plan.

    Args:
        plans: at least one, such as the contiguous and the zigzag plan of one batch.
        path: a .png, .svg or .pdf.

    Raises PictureError.
    """
    most_ranks = max(plan.cp_size for plan in plans)
    bars = min(0.28 * most_ranks, 9.0)
    size = 9.0 if most_ranks <= 32 else 7.0
    with canvas(path, 1.0 + _INCHES_A_PLAN * len(plans), 1.3 + bars) as figure:
        axes = figure.subplots(1, len(plans), sharex=True, squeeze=False)[0]
        widest = max(plan.pair_imbalance for plan in plans)
        for axis, plan in zip(axes, plans, strict=True):
            mean = sum(plan.rank_pairs) / plan.cp_size
            for rank, pairs in enumerate(plan.rank_pairs):
                ratio = pairs / mean if mean else 0.0
                axis.barh(rank, ratio, height=0.8, color=rank_color(rank), hatch=rank_hatch(rank), edgecolor=INK, linewidth=0.6)
                if plan.cp_size <= MOST_RANKS_NAMED:
                    axis.text(ratio + 0.02 * widest, rank, f"{ratio:.2f}", va="center", fontsize=size, bbox={"color": "white", "pad": 0.6})
            if mean:
                # Solid: of a dashed line beside equal bars only the dashes between them are seen.
                axis.axvline(1.0, color=INK, linewidth=1.0)
                axis.annotate("mean", (1.0, 1.0), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center")
            title = [*wrapped([describe_partition(plan)], _INCHES_A_PLAN - 0.6), describe_busiest(plan)]
            axis.set_title("\n".join(title), pad=16, loc="left")
            axis.set_xlim(0, 1.18 * widest)
            axis.set_xticks([tick for tick in axis.get_xticks() if tick <= 1.18 * widest])
            rank_ticks(axis, plan.cp_size, bars)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            axis.set_xlabel("query-key pairs of the rank / mean of all ranks")
        figure.tight_layout(w_pad=2.0)
