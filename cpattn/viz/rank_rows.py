"""The rows that each rank holds, as a bar a rank: requests one after another, then padding."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from cpattn.metadata.draw import counted
from cpattn.metadata.plan import Plan
from cpattn.viz.captions import longest_that_fits
from cpattn.viz.palette import INK, PADDING, ink_on, rank_color, rank_hatch

MOST_RANKS_NAMED = 64
_LEAST_INCHES_APART = 0.04  # of a request, for a line on each side
_LEAST_INCHES_HATCHED = 0.12  # of padding: the hatch of less looks like stray dashes
_LEAST_INCHES_NAMED = 0.14  # of a bar's height
_NAME_SIZE = 7.5


def rank_ticks(axis: Any, cp_size: int, inches: float) -> None:
    """Names the ranks down an axis, each of them if there is room."""
    step = 1 if cp_size <= MOST_RANKS_NAMED else -(-cp_size // 16)
    size = 9.0 if inches / cp_size * step >= 0.16 else 7.0
    ranks = range(0, cp_size, step)
    axis.set_yticks(ranks, [f"rank {rank}" for rank in ranks], fontsize=size)
    axis.set_ylim(cp_size - 0.4, -0.6)
    axis.tick_params(length=0)


def draw_rows(axis: Any, plan: Plan, inches_wide: float, inches_high: float) -> None:
    """Draws the bars in a place of that size."""
    rows = max(1, plan.rows)
    inch = inches_wide / rows
    named = inches_high / plan.cp_size * 0.82 >= _LEAST_INCHES_NAMED
    tokens = plan.rank_extends.T
    for rank in range(plan.cp_size):
        color = rank_color(rank)
        requests = np.flatnonzero(tokens[rank])
        ends = np.cumsum(tokens[rank, requests])
        end = int(ends[-1]) if len(ends) else 0
        if end:
            axis.barh(rank, end, 0.82, 0, color=color, hatch=rank_hatch(rank), edgecolor="white", linewidth=0)
        runs = list(_runs(plan, requests.tolist(), ends.tolist(), inch))
        for run, after in pairwise(runs):
            if min(run.end - run.begin, after.end - after.begin) * inch >= _LEAST_INCHES_APART:
                axis.vlines(run.end, rank - 0.41, rank + 0.41, color="white", linewidth=0.9)
        for run in runs if named else ():
            _name(axis, (run.begin + run.end) / 2, rank, longest_that_fits(run.names, (run.end - run.begin) * inch, _NAME_SIZE), color)
        padding = plan.rows - end
        if padding * inch >= _LEAST_INCHES_HATCHED:
            axis.barh(rank, padding, 0.82, end, color=PADDING, hatch="//////", edgecolor=INK, linewidth=0.6)
            text = longest_that_fits([f"padding {padding:,}", f"{padding:,}"], padding * inch, _NAME_SIZE) if named else ""
            _name(axis, end + padding / 2, rank, text, PADDING)
    rank_ticks(axis, plan.cp_size, inches_high)
    axis.set_xlim(0, rows)
    axis.set_xticks([0, rows] if plan.rows else [0], ["0", counted(plan.rows, "row")] if plan.rows else ["no rows"])
    for label, side in zip(axis.get_xticklabels(), ("left", "right"), strict=False):
        label.set_horizontalalignment(side)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _name(axis: Any, x: float, y: float, text: str, color: str) -> None:
    if text:
        box = {"color": color, "pad": 1}
        axis.text(x, y, text, fontsize=_NAME_SIZE, color=ink_on(color), ha="center", va="center", bbox=box)


class _Run(NamedTuple):
    """Rows ``begin .. end``, and what they can be called, from long to short."""

    begin: int
    end: int
    names: list[str]


def _runs(plan: Plan, requests: list[int], ends: list[int], inch: float) -> Iterator[_Run]:
    """A rank's requests; equal ones next to each other that have no room for a name each are one run."""
    begin = at = 0
    while at < len(requests):
        names, until = [f"request {requests[at]}"], at + 1
        if not longest_that_fits(names, (ends[at] - begin) * inch, _NAME_SIZE):
            request = plan.batch[requests[at]]
            while until < len(requests) and plan.batch[requests[until]] == request:
                until += 1
            if until > at + 1:
                count = counted(until - at, "request")
                names = [f"{count} of {request.prefix_len:,} + {request.extend_len:,}", count]
        yield _Run(begin, ends[until - 1], names)
        begin, at = ends[until - 1], until
