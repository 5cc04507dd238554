"""A ring's hops over time, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpattn.viz.canvas import PictureError, canvas
from cpattn.viz.palette import INK, ink_on, rank_color, rank_hatch, tint
from cpattn.viz.ring_schedule import RingSchedule, Stretch

_COMPUTE_HEIGHT, _SEND_HEIGHT = 0.48, 0.24
_INCHES_A_RANK, _WIDTH = 0.62, 8.4
_LEFT, _RIGHT, _ABOVE, _BELOW = 1.25, 0.15, 0.6, 0.42
_MOST_RANKS = 64
_INCHES_A_POINT = 0.0083  # the width of a letter, on average


def draw_ring_picture(schedule: RingSchedule, path: str | Path) -> None:
    """Draws two lanes a rank over time: above, what it computes; below, what it sends meanwhile. Colours and numbers name
    the rank whose keys they are.

    Args:
        schedule: from :func:`cpattn.viz.ring_schedule`.
        path: a .png, .svg or .pdf.

    Raises PictureError.
    """
    plan = schedule.plan
    if plan.cp_size > _MOST_RANKS:
        raise PictureError(f"a ring over {plan.cp_size} ranks is too large to draw; {_MOST_RANKS} ranks at most, or as text")
    lanes = _INCHES_A_RANK * plan.cp_size
    height = _ABOVE + lanes + _BELOW
    with canvas(path, _WIDTH, height) as figure:
        axis = figure.add_axes((_LEFT / _WIDTH, _BELOW / height, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, lanes / height))
        end = schedule.end or 1.0
        for stretch in schedule.computing:
            prefix = " and cached ones" if stretch.hop == 0 and plan.num_prefix_tokens and not plan.sharded else ""
            texts = [f"keys of rank {stretch.owner}{prefix}", f"keys of rank {stretch.owner}", f"rank {stretch.owner}", f"{stretch.owner}"]
            _bar(axis, stretch, stretch.rank, _COMPUTE_HEIGHT, end, texts, rank_color(stretch.owner), 9.0)
        for stretch in schedule.sending:
            to = (stretch.rank + 1) % plan.cp_size
            texts = [f"keys of {stretch.owner} to rank {to}", f"{stretch.owner} to {to}"]
            _bar(axis, stretch, stretch.rank + 0.5, _SEND_HEIGHT, end, texts, tint(rank_color(stretch.owner)), 7.5)
        axis.set_xlim(0, end)
        axis.set_ylim(plan.cp_size - 0.05, -0.1)
        axis.set_yticks(
            [rank + at for rank in range(plan.cp_size) for at in (_COMPUTE_HEIGHT / 2, 0.5 + _SEND_HEIGHT / 2)],
            [text for rank in range(plan.cp_size) for text in (f"rank {rank} computes", "sends")],
        )
        axis.set_xticks([0, end], ["0", f"{end:,.0f}"])
        for label, side in zip(axis.get_xticklabels(), ("left", "right"), strict=True):
            label.set_horizontalalignment(side)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("time, as the query-key pairs that a rank can compute in it", labelpad=-9)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        for rank in range(1, plan.cp_size):
            axis.axhline(rank - 0.13, color=INK, linewidth=0.3)
        title = f"A ring over {plan.cp_size} ranks, {plan.partition} partition: ranks compute {schedule.busy:.0%} of the time"
        figure.text(0.1 / _WIDTH, 1 - 0.2 / height, title, va="center", fontsize=10.5, weight="bold")
        note = f"Colour and number: whose keys. White: nothing to do. A transfer is taken to last {schedule.transfer:g} of a mean hop."
        figure.text(0.1 / _WIDTH, 1 - 0.42 / height, note, va="center")


def _bar(axis: Any, stretch: Stretch, top: float, height: float, end: float, texts: list[str], color: str, size: float) -> None:
    """One stretch, with the longest of the texts that fits in it."""
    from matplotlib.patches import Rectangle

    length = stretch.end - stretch.begin
    if length <= 0:
        return
    hatch = rank_hatch(stretch.owner)
    axis.add_patch(
        Rectangle((stretch.begin, top), length, height, facecolor=color, edgecolor=INK, linewidth=0.6, hatch=hatch, clip_on=False)
    )
    inches = length / end * (_WIDTH - _LEFT - _RIGHT)
    text = next((text for text in texts if _INCHES_A_POINT * size * len(text) + 0.05 < inches), "")
    behind = {"color": color, "pad": 0.8} if hatch and text else None
    place = (stretch.begin + length / 2, top + height * 0.52)
    axis.text(*place, text, ha="center", va="center", fontsize=size, color=ink_on(color), bbox=behind)
