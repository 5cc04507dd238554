"""What each rank holds, as a bar a rank: rows, requests one after another, then padding; or the tokens in its cache."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
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
    """Draws the rows of each rank in a place of that size."""
    tokens = plan.rank_extends.T
    _draw_bars(axis, plan, tokens, plan.rows, "row", inches_wide, inches_high)
    for rank, end in enumerate(tokens.sum(axis=1).tolist()):
        padding = plan.rows - end
        inches = padding * inches_wide / max(1, plan.rows)
        if inches >= _LEAST_INCHES_HATCHED:
            axis.barh(rank, padding, 0.82, end, color=PADDING, hatch="//////", edgecolor=INK, linewidth=0.6)
            named = _have_names(plan, inches_high)
            text = longest_that_fits([f"padding {padding:,}", f"{padding:,}"], inches, _NAME_SIZE) if named else ""
            _name(axis, end + padding / 2, rank, text, PADDING)


def draw_held(axis: Any, plan: Plan, inches_wide: float, inches_high: float) -> None:
    """Draws the tokens that each rank's cache holds after the step, in a place of that size."""
    tokens = plan.held_lens.T
    _draw_bars(axis, plan, tokens, int(tokens.sum(axis=1).max()), "token", inches_wide, inches_high)


def _have_names(plan: Plan, inches_high: float) -> bool:
    return inches_high / plan.cp_size * 0.82 >= _LEAST_INCHES_NAMED


def _draw_bars(axis: Any, plan: Plan, tokens: IntArray, most: int, thing: str, inches_wide: float, inches_high: float) -> None:
    """A bar a rank of ``tokens [cp_size, num_requests]``, on an axis of ``most`` of those things."""
    rows = max(1, most)
    inch = inches_wide / rows
    named = _have_names(plan, inches_high)
    for rank in range(plan.cp_size):
        color = rank_color(rank)
        requests = np.flatnonzero(tokens[rank])
        ends = np.cumsum(tokens[rank, requests])
        end = int(ends[-1]) if len(ends) else 0
        if end:
            axis.barh(rank, end, 0.82, 0, color=color, hatch=rank_hatch(rank), edgecolor="white", linewidth=0)
        runs = list(_runs(plan, requests.tolist(), ends.tolist(), inch))
        # One that is too thin to be seen must not hide that its neighbours are two.
        for run, after in pairwise(run for run in runs if (run.end - run.begin) * inch >= _LEAST_INCHES_APART):
            apart = (after.begin - run.end) * inch >= _LEAST_INCHES_APART
            axis.vlines([run.end, after.begin] if apart else run.end, rank - 0.41, rank + 0.41, color="white", linewidth=0.9)
        for run in runs if named else ():
            _name(axis, (run.begin + run.end) / 2, rank, longest_that_fits(run.names, (run.end - run.begin) * inch, _NAME_SIZE), color)
    rank_ticks(axis, plan.cp_size, inches_high)
    axis.set_xlim(0, rows)
    axis.set_xticks([0, rows] if most else [0], ["0", counted(most, thing)] if most else [f"no {thing}s"])
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
