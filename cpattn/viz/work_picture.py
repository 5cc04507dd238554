"""Each rank's work as bars, for several plans beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpattn.metadata.draw import describe_partition
from cpattn.metadata.plan import Plan
from cpattn.viz.canvas import canvas
from cpattn.viz.palette import INK, rank_color, rank_hatch

_MOST_LABELS = 32


def draw_work_picture(plans: Sequence[Plan], path: str | Path) -> None:
    """Draws the query-key pairs of each rank, a panel a plan, over the mean of its plan.

    Args:
        plans: at least one, such as the contiguous and the zigzag plan of one batch.
        path: a .png, .svg or .pdf.

    Raises PictureError.
    """
    most_ranks = max(plan.cp_size for plan in plans)
    height = 1.3 + min(0.28 * most_ranks, 9.0)
    with canvas(path, 1.0 + 3.4 * len(plans), height) as figure:
        axes = figure.subplots(1, len(plans), sharex=True, squeeze=False)[0]
        widest = max(plan.pair_imbalance for plan in plans)
        for axis, plan in zip(axes, plans, strict=True):
            mean = sum(plan.rank_pairs) / plan.cp_size
            for rank, pairs in enumerate(plan.rank_pairs):
                ratio = pairs / mean if mean else 0.0
                axis.barh(rank, ratio, height=0.8, color=rank_color(rank), hatch=rank_hatch(rank), edgecolor=INK, linewidth=0.6)
                if plan.cp_size <= _MOST_LABELS:
                    axis.text(ratio + 0.02 * widest, rank, f"{ratio:.2f}", va="center", bbox={"color": "white", "pad": 0.6})
            axis.axvline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 2)))
            axis.annotate("mean", (1.0, 1.0), (2, 2), xycoords=("data", "axes fraction"), textcoords="offset points")
            axis.set_title(
                f"{describe_partition(plan)}\nthe busiest rank has {plan.pair_imbalance:.2f} times the mean",
                pad=16, loc="left",
            )  # fmt: skip
            axis.set_ylim(plan.cp_size - 0.4, -0.6)
            axis.set_xlim(0, 1.18 * widest)
            axis.set_xticks([tick for tick in axis.get_xticks() if tick <= 1.18 * widest])
            step = 1 if plan.cp_size <= _MOST_LABELS else plan.cp_size // 16
            ranks = range(0, plan.cp_size, step)
            axis.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
            axis.tick_params(axis="y", length=0)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            axis.set_xlabel("query-key pairs of the rank / mean of all ranks")
        figure.tight_layout(w_pad=2.0)
