"""A large plan, chunk by chunk: a panel a request to its own scale, and a bar of rows a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cpattn.metadata.draw import describe_partition
from cpattn.metadata.plan import Plan
from cpattn.viz.canvas import canvas
from cpattn.viz.palette import INK, PADDING, ink_on, rank_color, rank_hatch, tint

_MOST_PANELS, _MOST_PANELS_A_LINE = 12, 4
_WIDTH, _PANEL_HEIGHT, _SINGLE_LINE_HEIGHT = 9.3, 2.25, 2.9
_MOST_RANKS_NAMED = 32
_LEAST_INCHES_NAMED = 0.09  # of a chunk
_LEFT = 0.75  # inches, for the names of ranks


def draw_chunks(plan: Plan, path: str | Path) -> None:
    """See :func:`cpattn.viz.draw_plan_picture`."""
    shown = _most_work(plan)
    across = min(_MOST_PANELS_A_LINE, max(1, len(shown)))
    lines = max(1, -(-len(shown) // across))
    panel_width, panel_height = (_WIDTH - 0.3) / across, _PANEL_HEIGHT if lines > 1 else _SINGLE_LINE_HEIGHT
    bars_height = min(8.0, 0.26 * plan.cp_size)
    height = 0.55 + lines * panel_height + 0.4 + bars_height + 0.4
    with canvas(path, _WIDTH, height) as figure:

        def axes_at(x: float, top: float, wide: float, high: float) -> Any:
            return figure.add_axes((x / _WIDTH, 1 - (top + high) / height, wide / _WIDTH, high / height))

        def write(top: float, text: str, **style: Any) -> None:
            figure.text(0.15 / _WIDTH, 1 - top / height, text, va="center", **style)

        write(0.22, "Which rank computes what: queries down, keys across, each request to its own scale", fontsize=10.5, weight="bold")
        left_out = f" {len(shown)} of {len(plan.batch)} requests, those with the most work." if len(shown) < len(plan.batch) else ""
        pale = " Pale: keys of the prefix." if plan.num_prefix_tokens else ""
        write(
            0.45,
            f"{plan.cp_size} ranks, {describe_partition(plan)}. Colours and numbers: ranks.{pale}{left_out}",
        )
        for number, request in enumerate(shown):
            line, column = divmod(number, across)
            axis = axes_at(0.4 + column * panel_width, 1.05 + line * panel_height, panel_width - 0.45, panel_height - 0.75)
            _draw_request(axis, plan, request, panel_height - 0.75)
        top = 0.55 + lines * panel_height + 0.2
        write(top, "The rows that each rank holds: requests one after another, white lines between them", fontsize=10.5, weight="bold")
        _draw_rows(axes_at(_LEFT, top + 0.2, _WIDTH - _LEFT - 0.35, bars_height), plan)


def _most_work(plan: Plan) -> list[int]:
    """The requests with the most query-key pairs, in the order of the batch."""
    pairs = plan.extend_lens * plan.prefix_lens + plan.extend_lens * (plan.extend_lens + 1) // 2
    return sorted(np.argsort(-pairs, kind="stable")[:_MOST_PANELS].tolist())


def _draw_request(axis: Any, plan: Plan, request: int, inches: float) -> None:
    from matplotlib.patches import Polygon, Rectangle

    prefix_len, extend_len = plan.batch[request]
    axis.set_title(f"request {request}\n{prefix_len:,} cached + {extend_len:,} new", loc="left", pad=4)
    total = max(1, prefix_len + extend_len)
    axis.set_xlim(0, total)
    axis.set_ylim(max(1, extend_len), 0)
    axis.set_yticks([])
    axis.set_xticks([0, total], ["0", f"{total:,}"], fontsize=7.5)
    axis.get_xticklabels()[0].set_horizontalalignment("left")
    axis.get_xticklabels()[-1].set_horizontalalignment("right")
    axis.tick_params(axis="x", length=2, pad=2)
    if not extend_len:
        axis.set_facecolor("#EEEEEE")
        axis.text(0.5, 0.5, "nothing new", transform=axis.transAxes, ha="center", va="center")
        return
    for chunk in plan.chunks:
        if chunk.request != request:
            continue
        begin, end, color, hatch = chunk.start, chunk.start + chunk.length, rank_color(chunk.rank), rank_hatch(chunk.rank)
        axis.add_patch(Rectangle((0, begin), prefix_len, chunk.length, facecolor=tint(color), edgecolor=INK, linewidth=0.4, hatch=hatch))
        corners = [(prefix_len, begin), (prefix_len + begin + 1, begin), (prefix_len + end, end), (prefix_len, end)]
        axis.add_patch(Polygon(corners, facecolor=color, edgecolor=INK, linewidth=0.4, hatch=hatch))
        if chunk.length / extend_len * inches >= _LEAST_INCHES_NAMED:
            place = axis.get_yaxis_transform()
            axis.text(-0.02, (begin + end) / 2, f"{chunk.rank}", va="center", ha="right", fontsize=7, transform=place)
    if prefix_len:
        axis.axvline(prefix_len, color=INK, linewidth=1.2)


def _draw_rows(axis: Any, plan: Plan) -> None:
    rows = max(1, plan.rows)
    tokens = plan.rank_extends.T
    for rank in range(plan.cp_size):
        begin = 0
        color = rank_color(rank)
        for request in np.flatnonzero(tokens[rank]).tolist():
            length = int(tokens[rank, request])
            axis.barh(rank, length, 0.82, begin, color=color, hatch=rank_hatch(rank), edgecolor="white", linewidth=0.7)
            if length * 9 > rows and plan.cp_size <= _MOST_RANKS_NAMED:
                style = {"fontsize": 7.5, "color": ink_on(color), "ha": "center", "va": "center", "bbox": {"color": color, "pad": 1}}
                axis.text(begin + length / 2, rank, f"request {request}", **style)
            begin += length
        padding = plan.rows - begin
        if padding:
            axis.barh(rank, padding, 0.82, begin, color=PADDING, hatch="//////", edgecolor=INK, linewidth=0.6)
        if padding * 12 > rows:
            axis.text(
                begin + padding / 2, rank, f"padding {padding:,}", ha="center", va="center", fontsize=7.5, bbox={"color": "white", "pad": 1}
            )
    step = 1 if plan.cp_size <= _MOST_RANKS_NAMED else plan.cp_size // 16
    axis.set_yticks(range(0, plan.cp_size, step), [f"rank {rank}" for rank in range(0, plan.cp_size, step)])
    axis.set_ylim(plan.cp_size - 0.4, -0.6)
    axis.set_xlim(0, rows)
    axis.set_xticks([0, rows], ["0", f"{rows:,} rows"])
    axis.get_xticklabels()[-1].set_horizontalalignment("right")
    axis.tick_params(length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
