"""A ring's hops over time, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cpattn.exchange.schedule import prefix_pairs
from cpattn.metadata.draw import counted
from cpattn.viz.canvas import PictureError, canvas
from cpattn.viz.captions import CAPTION_STEP, CAPTION_TOP, TITLE_SIZE, TITLE_TOP, longest_that_fits, wrapped
from cpattn.viz.palette import INK, ink_on, rank_color, rank_hatch, tint
from cpattn.viz.ring_schedule import RingSchedule, Stretch

_COMPUTE_HEIGHT, _SEND_HEIGHT = 0.48, 0.24
_INCHES_A_RANK, _LANE, _INCHES_A_HOP = 0.62, 7.0, 0.22
_LEFT, _RIGHT, _BELOW = 1.25, 0.15, 0.42
_MOST_RANKS = 64


class _Bar(NamedTuple):
    """A stretch, where it stands in the lanes, and what is written on it; "" where nothing fits."""

    stretch: Stretch
    top: float
    height: float
    color: str
    text: str
    size: float


def draw_ring_picture(schedule: RingSchedule, path: str | Path) -> None:
    """Draws two lanes a rank over time: above, what it computes; below, what it sends meanwhile. Colours and numbers, where
    there is room for one, name the rank whose keys they are.

    Args:
        schedule: from :func:`cpattn.viz.ring_schedule`.
        path: a .png, .svg or .pdf.

    Raises PictureError.
    """
    plan = schedule.plan
    if plan.cp_size > _MOST_RANKS:
        raise PictureError(f"a ring over {plan.cp_size} ranks is too large to draw; {_MOST_RANKS} ranks at most, or as text")
    lanes = _INCHES_A_RANK * plan.cp_size
    width = _LEFT + _RIGHT + max(_LANE, _INCHES_A_HOP * plan.cp_size)
    end = schedule.end or 1.0
    inch = (width - _LEFT - _RIGHT) / end
    bars = _bars(schedule, inch)
    caption = wrapped(_caption(schedule, bars), width - 0.2)
    above = CAPTION_TOP + CAPTION_STEP * len(caption)
    height = above + lanes + _BELOW
    with canvas(path, width, height) as figure:
        axis = figure.add_axes((_LEFT / width, _BELOW / height, (width - _LEFT - _RIGHT) / width, lanes / height))
        for bar in bars:
            _draw(axis, bar, inch)
        axis.set_xlim(0, end)
        axis.set_ylim(plan.cp_size - 0.05, -0.1)
        axis.set_yticks(
            [rank + at for rank in range(plan.cp_size) for at in (_COMPUTE_HEIGHT / 2, 0.5 + _SEND_HEIGHT / 2)],
            [text for rank in range(plan.cp_size) for text in (f"rank {rank} computes", "sends")],
        )
        axis.set_xticks([0, end] if schedule.end else [0], ["0", f"{end:,.0f}"] if schedule.end else ["0"])
        for label, side in zip(axis.get_xticklabels(), ("left", "right"), strict=False):
            label.set_horizontalalignment(side)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("time, as the query-key pairs that a rank can compute in it", labelpad=-9)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        for rank in range(1, plan.cp_size):
            axis.axhline(rank - 0.13, color=INK, linewidth=0.3)
        work = f"ranks compute {schedule.busy:.0%} of the time" if schedule.end else "nothing to compute"
        ring = f"A ring over {counted(plan.cp_size, 'rank')}"
        # Bold letters are wider. A caller's partition may have a long name.
        title = longest_that_fits([f"{ring}, {plan.partition} partition: {work}"], (width - 0.2) / 1.15, TITLE_SIZE) or f"{ring}: {work}"
        figure.text(0.1 / width, 1 - TITLE_TOP / height, title, va="center", fontsize=TITLE_SIZE, weight="bold")
        for line, text in enumerate(caption):
            figure.text(0.1 / width, 1 - (CAPTION_TOP + CAPTION_STEP * line) / height, text, va="center")


def _caption(schedule: RingSchedule, bars: Sequence[_Bar]) -> list[str]:
    """Sentences, each where it is true."""
    numbered = all(bar.text for bar in bars)
    return [
        "Colour and number: whose keys." if numbered else "Colour: whose keys; a number too, where there is room.",
        "White: nothing to do.",
        f"A transfer is taken to last {schedule.transfer:g} of a mean hop." if schedule.sending else "",
    ]


def _bars(schedule: RingSchedule, inch: float) -> list[_Bar]:
    """Each stretch with the longest text that fits in it, where a pair is so many inches long."""
    plan = schedule.plan
    cached = prefix_pairs(plan) if plan.num_prefix_tokens and not plan.sharded else [0] * plan.cp_size
    bars = []
    for stretch in schedule.computing:
        keys = f"keys of rank {stretch.owner}"
        texts = [keys, f"rank {stretch.owner}", f"{stretch.owner}"]
        if stretch.hop == 0 and cached[stretch.rank]:
            texts.insert(0, f"{keys} and cached ones")
        bars.append(_bar(stretch, (stretch.rank, _COMPUTE_HEIGHT), rank_color(stretch.owner), texts, (9.0, 7.0), inch))
    for stretch in schedule.sending:
        to = (stretch.rank + 1) % plan.cp_size
        texts = [f"keys of {stretch.owner} to rank {to}", f"{stretch.owner} to {to}", f"{stretch.owner}"]
        bars.append(_bar(stretch, (stretch.rank + 0.5, _SEND_HEIGHT), tint(rank_color(stretch.owner)), texts, (7.5, 7.0), inch))
    return [bar for bar in bars if bar.stretch.end > bar.stretch.begin]


def _bar(stretch: Stretch, place: tuple[float, float], color: str, texts: Sequence[str], sizes: tuple[float, float], inch: float) -> _Bar:
    """Its text in the first of the sizes, or if there is no room for any, the shortest in the second."""
    inches = (stretch.end - stretch.begin) * inch
    text, size = longest_that_fits(texts, inches, sizes[0]), sizes[0]
    if not text:
        text, size = longest_that_fits(texts[-1:], inches, sizes[1]), sizes[1]
    return _Bar(stretch, *place, color, text, size)


def _draw(axis: Any, bar: _Bar, inch: float) -> None:
    from matplotlib.patches import Rectangle

    begin, length, hatch = bar.stretch.begin, bar.stretch.end - bar.stretch.begin, rank_hatch(bar.stretch.owner)
    # An edge as wide as its bar would hide it: 72 points are an inch.
    style: dict[str, Any] = {"edgecolor": INK, "linewidth": min(0.6, 18 * length * inch), "hatch": hatch, "clip_on": False}
    axis.add_patch(Rectangle((begin, bar.top), length, bar.height, facecolor=bar.color, **style))
    if bar.text:
        behind = {"color": bar.color, "pad": 0.8} if hatch else None
        place = (begin + length / 2, bar.top + bar.height * 0.52)
        axis.text(*place, bar.text, ha="center", va="center", fontsize=bar.size, color=ink_on(bar.color), bbox=behind)
