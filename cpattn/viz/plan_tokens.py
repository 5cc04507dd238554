"""A small plan, token by token: a cell for each query and key, and for each row that a rank holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpattn.metadata.draw import counted
from cpattn.metadata.holders import holder_of
from cpattn.metadata.plan import Plan
from cpattn.viz.canvas import canvas
from cpattn.viz.captions import wrapped
from cpattn.viz.palette import FAINT, INK, MASKED, PADDING, PREFIX, ink_on, rank_color, tint

_INCH = 0.27  # of a cell, the unit of everything here
_WIDEST = 36.0
_LEFT = 3.2  # beside a request's cells, for the names of ranks
_LEAST_WIDTH = 9.0  # of a request, so that its title fits
_ABOVE = 3.4  # a request's cells, for its title and the keys' positions
_GAP = 1.6
_CAPTION_STEP = 0.75
_CACHE = 1.5  # below a request's cells, for the ranks that hold its tokens where caches are sharded
_NAMED = 3  # rows of a request that have room for its name


class _Place(NamedTuple):
    """Where a request's cells begin: the corner of its first query and key."""

    request: int
    x: float
    y: float


def draw_tokens(plan: Plan, path: str | Path) -> None:
    """See :func:`cpattn.viz.draw_plan_picture`."""
    places, width, height = _flow(plan)
    width = max(width, _LEFT + 1 + plan.rows + 4, 31.0)
    caption = wrapped(_caption(plan), width * _INCH)
    down = _CAPTION_STEP * (len(caption) - 1)
    places, height = [place._replace(y=place.y + down) for place in places], height + down
    rows_at = height + 1.6
    bottom = rows_at + 2.1 * plan.cp_size + 1.2
    with canvas(path, (width + 0.6) * _INCH, (bottom + 2.6) * _INCH) as figure:
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_xlim(-0.3, width + 0.3)
        axis.set_ylim(bottom, -2.6)
        axis.axis("off")
        axis.text(0, -1.6, "Which rank computes what: a row is a query, a column a key", fontsize=10.5, weight="bold", va="center")
        for number, text in enumerate(caption):
            axis.text(0, number * _CAPTION_STEP - 0.55, text, va="center")
        for place in places:
            _draw_request(axis, plan, place)
        axis.text(0, rows_at - 0.1, _rows_title(plan), fontsize=10.5, weight="bold", va="center")
        for rank in range(plan.cp_size):
            _draw_rows(axis, plan, rank, rows_at + 0.8 + 2.1 * rank)


def _caption(plan: Plan) -> list[str]:
    """Sentences, each where it is true."""
    queries = bool(plan.num_tokens)
    return [
        f"{counted(plan.cp_size, 'rank')}, {plan.partition} partition.",
        "Numbers: positions in the request." if plan.batch else "No requests.",
        "Pale: keys of the prefix." if any(request.prefix_len and request.extend_len for request in plan.batch) else "",
        "White: not seen." if any(request.extend_len > 1 for request in plan.batch) else "",
        "Black lines: chunks." if queries else "",
        "Held by: the rank whose cache holds a token after the step." if plan.sharded and plan.batch else "",
        "Of the prefix only counts are known: by rank, not by position." if not plan.knows_positions and plan.num_prefix_tokens else "",
    ]


def _rows_title(plan: Plan) -> str:
    """Explains the short names as well, if there are any."""
    short = next((int(request) for request in np.flatnonzero(((plan.rank_extends > 0) & (plan.rank_extends < _NAMED)).any(axis=1))), None)
    return "The rows that each rank holds" + (f"; r{short}: request {short}" if short is not None else "")


def _flow(plan: Plan) -> tuple[list[_Place], float, float]:
    """The requests side by side, as words in lines; and how wide and high they are together."""
    places = []
    # A line is made of columns; a request goes below the one before where that leaves the line as high as it is.
    line_y, line_height, column_x, column_width, column_height, widest = 0.3, 0.0, 0.0, 0.0, 0.0, 0.0
    for request, (prefix_len, extend_len) in enumerate(plan.batch):
        across, down = max(_LEFT + 1 + prefix_len + extend_len, _LEAST_WIDTH), _ABOVE + max(extend_len, 1) + _CACHE * plan.sharded
        if column_height and column_height + _GAP + down <= line_height and column_x + across <= _WIDEST:
            column_height += _GAP
        else:
            column_x, column_width, column_height = column_x + column_width + _GAP * bool(column_width), 0.0, 0.0
            if column_x and column_x + across > _WIDEST:
                line_y, line_height, column_x = line_y + line_height + _GAP, 0.0, 0.0
        places.append(_Place(request, column_x + _LEFT + 1, line_y + column_height + _ABOVE))
        column_width, column_height = max(column_width, across), column_height + down
        line_height = max(line_height, column_height)
        widest = max(widest, column_x + column_width)
    return places, widest, line_y + line_height


def _draw_request(axis: Any, plan: Plan, place: _Place) -> None:
    request, x, y = place
    prefix_len, extend_len = plan.batch[request]
    left = x - 1 - _LEFT
    axis.text(left, y - _ABOVE + 0.7, f"request {request}: {prefix_len} cached + {extend_len} new", va="center", weight="bold")
    owner = {
        chunk.start + token: chunk.rank for chunk in plan.chunks if chunk.request == request for token in range(chunk.length)
    }  # of each new token
    for position in range(prefix_len + extend_len):
        color = PREFIX if position < prefix_len else rank_color(owner[position - prefix_len])
        _cell(axis, x + position, y - 1.15, color, str(position))
    if prefix_len:
        _bracket(axis, x, x + prefix_len, y - 1.35, "prefix" if prefix_len > 1 else "")
    if extend_len:
        _bracket(axis, x + prefix_len, x + prefix_len + extend_len, y - 1.35, "new")
    for token in range(extend_len):
        rank = owner[token]
        _cell(axis, x - 1.15, y + token, rank_color(rank), str(prefix_len + token))
        for position in range(prefix_len + extend_len):
            seen = tint(rank_color(rank)) if position < prefix_len else rank_color(rank)
            _cell(axis, x + position, y + token, seen if position <= prefix_len + token else MASKED)
    for chunk in plan.chunks:
        if chunk.request == request:
            axis.text(x - 1.45, y + chunk.start + chunk.length / 2, f"rank {chunk.rank}", ha="right", va="center")
            axis.plot([left + 0.4, x + prefix_len + extend_len], [y + chunk.start] * 2, color=INK, linewidth=1.2)
    if extend_len:
        axis.plot([left + 0.4, x + prefix_len + extend_len], [y + extend_len] * 2, color=INK, linewidth=1.2)
    if prefix_len and extend_len:
        axis.plot([x + prefix_len] * 2, [y, y + extend_len], color=INK, linewidth=1.2)
    if not extend_len:
        axis.text(x, y + 0.5, "nothing new: no queries", va="center")
    if plan.sharded:
        _draw_holders(axis, plan, place, y + max(extend_len, 1) + _CACHE - 1)


def _draw_holders(axis: Any, plan: Plan, place: _Place, y: float) -> None:
    """The ranks that hold a request's tokens, below their columns."""
    prefix_len, extend_len = plan.batch[place.request]
    if not prefix_len + extend_len:
        return
    axis.text(place.x - 0.45, y + 0.5, "held by rank", ha="right", va="center")
    holder = holder_of(plan, place.request)
    for position in range(prefix_len + extend_len):
        rank = holder(position, position + 1)
        assert rank is not None  # of one token
        _cell(axis, place.x + position, y, rank_color(rank), str(rank))


def _draw_rows(axis: Any, plan: Plan, rank: int, y: float) -> None:
    """One rank's local rows, with the request that each belongs to below."""
    axis.text(_LEFT + 0.7, y + 0.5, f"rank {rank}", ha="right", va="center")
    x = begin = _LEFT + 1
    mine = [chunk for chunk in plan.chunks if chunk.rank == rank]
    for number, chunk in enumerate(mine):
        prefix_len = plan.batch[chunk.request].prefix_len
        for token in range(chunk.length):
            _cell(axis, x + token, y, rank_color(rank), str(prefix_len + chunk.start + token))
        x += chunk.length
        if number + 1 == len(mine) or mine[number + 1].request != chunk.request:
            _below(axis, begin, x, y, f"request {chunk.request}", f"r{chunk.request}")
            begin = x
    padding = plan.rows - plan.rank_tokens[rank]
    if not plan.rows:
        axis.text(x, y + 0.5, "no rows", va="center")
    for number in range(padding):
        _cell(axis, x + number, y, PADDING, hatch="/////")
    if padding:
        axis.text(x + padding + 0.4, y + 0.5, "padding", va="center")


def _cell(axis: Any, x: float, y: float, color: str, text: str = "", hatch: str = "") -> None:
    from matplotlib.patches import Rectangle

    edge = FAINT if color == MASKED and not hatch else INK
    order = 0.8 if color == MASKED and not hatch else 1.0
    axis.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor=edge, linewidth=0.4, hatch=hatch, zorder=order))
    if text:
        axis.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=7.5, color=ink_on(color))


def _bracket(axis: Any, begin: float, end: float, y: float, text: str) -> None:
    axis.plot([begin + 0.1, begin + 0.1, end - 0.1, end - 0.1], [y, y - 0.2, y - 0.2, y], color=INK, linewidth=0.8)
    axis.text((begin + end) / 2, y - 0.35, text, ha="center", va="bottom", fontsize=8)


def _below(axis: Any, begin: float, end: float, y: float, text: str, short: str) -> None:
    axis.plot([begin + 0.1, end - 0.1], [y + 1.18] * 2, color=INK, linewidth=0.8)
    axis.text((begin + end) / 2, y + 1.28, text if end - begin >= _NAMED else short, ha="center", va="top", fontsize=7.5)
