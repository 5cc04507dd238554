"""A large plan, chunk by chunk: a panel a kind of request to its own scale, and a bar of rows a rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpattn.metadata.draw import counted, describe_partition
from cpattn.metadata.plan import Plan
from cpattn.viz.canvas import canvas
from cpattn.viz.captions import CAPTION_STEP, CAPTION_TOP, TITLE_SIZE, TITLE_TOP, text_width, wrapped
from cpattn.viz.rank_rows import draw_held, draw_rows
from cpattn.viz.request_panels import Panel, draw_panel, panels_of

_MOST_PANELS, _MOST_PANELS_A_LINE = 12, 4
_WIDTH, _LEFT = 9.3, 0.75  # inches; the left for the names of ranks
_ABOVE_PANEL, _BELOW_PANEL, _BESIDE_PANEL = 0.45, 0.3, 0.45
# How high panels are at least, and to have room for all numbers at most: in one line, in several.
_LEAST_HEIGHTS, _MOST_HEIGHTS = (2.15, 1.5), (6.6, 4.05)


def draw_chunks(plan: Plan, path: str | Path) -> None:
    """See :func:`cpattn.viz.draw_plan_picture`."""
    panels = panels_of(plan, _MOST_PANELS)
    widest = max((text_width(line) for panel in panels for line in panel.title), default=1.0) + _BESIDE_PANEL
    across = max(1, min(_MOST_PANELS_A_LINE, len(panels), int((_WIDTH - 0.3) / widest)))
    lines = [panels[at : at + across] for at in range(0, len(panels), across)]
    heights = [_height(line, len(lines) > 1) for line in lines]
    panel_width = (_WIDTH - 0.3) / across - _BESIDE_PANEL
    caption = wrapped(_caption(plan, lines, heights), _WIDTH - 0.3)
    bars_height = min(8.0, 0.26 * plan.cp_size)
    head = CAPTION_TOP + CAPTION_STEP * len(caption)
    bars_top = head + sum(_ABOVE_PANEL + height + _BELOW_PANEL for height in heights) + 0.15
    held_top = bars_top + 0.2 + bars_height + 0.45
    height = (held_top + 0.2 + bars_height if plan.sharded else bars_top + 0.2 + bars_height) + 0.4
    with canvas(path, _WIDTH, height) as figure:

        def axes_at(x: float, top: float, wide: float, high: float) -> Any:
            return figure.add_axes((x / _WIDTH, 1 - (top + high) / height, wide / _WIDTH, high / height))

        def write(top: float, text: str, **style: Any) -> None:
            figure.text(0.15 / _WIDTH, 1 - top / height, text, va="center", **style)

        heading: dict[str, Any] = {"fontsize": TITLE_SIZE, "weight": "bold"}
        write(TITLE_TOP, "Which rank computes what: queries down, keys across, each request to its own scale", **heading)
        for number, text in enumerate(caption):
            write(CAPTION_TOP + CAPTION_STEP * number, text)
        top = head
        for line, high in zip(lines, heights, strict=True):
            for column, panel in enumerate(line):
                x = 0.4 + column * (panel_width + _BESIDE_PANEL)
                draw_panel(axes_at(x, top + _ABOVE_PANEL, panel_width, high), panel, high, panel_width)
            top += _ABOVE_PANEL + high + _BELOW_PANEL
        padding = ", then padding" if plan.cp_size * plan.rows > plan.num_tokens else ""
        write(bars_top, f"The rows that each rank holds: requests one after another{padding}", **heading)
        bars_width = _WIDTH - _LEFT - 0.35
        draw_rows(axes_at(_LEFT, bars_top + 0.2, bars_width, bars_height), plan, bars_width, bars_height)
        if plan.sharded:
            write(held_top, "The tokens that each rank's cache holds after the step", **heading)
            draw_held(axes_at(_LEFT, held_top + 0.2, bars_width, bars_height), plan, bars_width, bars_height)


def _height(line: Sequence[Panel], several: bool) -> float:
    """Of a line of panels, in inches: so that each chunk's number has room, as far as that goes."""
    needed = max(panel.inches_for_numbers for panel in line)
    return min(_MOST_HEIGHTS[several], max(_LEAST_HEIGHTS[several], needed))


def _caption(plan: Plan, lines: Sequence[Sequence[Panel]], heights: Sequence[float]) -> list[str]:
    """Sentences, each where it is true."""
    panels = [panel for line in lines for panel in line]
    shown = sum(len(panel.kind.requests) for panel in panels)
    all_numbered = all(
        len(panel.numbers(height)) == len(panel.bands) for line, height in zip(lines, heights, strict=True) for panel in line
    )
    shared = [panel for panel in panels if len(panel.kind.requests) > 1 and panel.bands]
    if all(panel.stacked for panel in shared):
        equal = "Equal requests share a panel; each is whole on one rank: a band a rank."
    elif not any(panel.stacked for panel in shared):
        equal = "Equal requests share a panel, which shows the first."
    else:
        equal = "Equal requests share a panel: it shows the first, or a band a rank where each is whole on one."
    return [
        f"{counted(plan.cp_size, 'rank')}, {describe_partition(plan)}{plan.cache_in_words}.",
        "Colours and numbers: ranks." if all_numbered else "Colours: ranks; numbers too, where there is room.",
        "Pale: keys of the prefix." if any(panel.kind.prefix_len and panel.bands for panel in panels) else "",
        f"{shown:,} of {counted(len(plan.batch), 'request')}, those with the most work." if shown < len(plan.batch) else "",
        equal if shared else "",
        "" if plan.batch else "No requests.",
    ]
