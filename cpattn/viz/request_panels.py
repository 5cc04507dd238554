"""What a large plan's panels show: a panel a kind of request, in bands of one rank each."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cpattn.metadata.draw import counted
from cpattn.metadata.kinds import Kind, kinds_of, most_work
from cpattn.metadata.plan import Plan
from cpattn.viz.captions import longest_that_fits
from cpattn.viz.palette import INK, ink_on, rank_color, rank_hatch, tint

NUMBER_PITCH = 0.09  # inches from one rank's number to the next
_LEAST_INCHES_HATCHED = 0.06


class Band(NamedTuple):
    """Queries ``begin .. end`` of a panel, all of one rank. The first sees ``first_seen`` new keys, the last ``last_seen``."""

    begin: int
    end: int
    rank: int
    first_seen: int
    last_seen: int


class Panel(NamedTuple):
    """Attributes:
    height: where the last band ends.
    stacked: the requests are whole, each on one rank, and a band is as high as its rank's number of them.
    """

    kind: Kind
    bands: tuple[Band, ...]
    height: int
    stacked: bool

    @property
    def title(self) -> list[str]:
        """Two lines."""
        first = f"request {self.kind.requests[0]}" if len(self.kind.requests) == 1 else f"{len(self.kind.requests):,} requests of"
        return [first, f"{self.kind.prefix_len:,} cached + {self.kind.extend_len:,} new"]

    @property
    def inches_for_numbers(self) -> float:
        """The best height: the thinnest band has room for its number, unless it is much thinner than the others."""
        thinnest = min((band.end - band.begin for band in self.bands), default=1)
        return NUMBER_PITCH * min(1.5 * len(self.bands), self.height / thinnest)

    def numbers(self, inches: float) -> dict[Band, float]:
        """Where the bands' numbers stand in a panel of that height, in queries from above.

        Each band has one, moved a little where that makes room. Where there are too many, those have one that have room,
        thick ones first.
        """
        inch = inches / max(1, self.height)
        middles = [(band.begin + band.end) / 2 * inch for band in self.bands]
        places = _apart(middles, inches)
        if max(map(abs, np.subtract(places, middles)), default=0.0) <= NUMBER_PITCH / 2:
            return {band: place / inch for band, place in zip(self.bands, places, strict=True)}
        taken: dict[Band, float] = {}
        for band, middle in sorted(zip(self.bands, middles, strict=True), key=lambda pair: pair[0].begin - pair[0].end):
            # A hair less, since bands of one length differ by rounding.
            if all(abs(place * inch - middle) >= NUMBER_PITCH * 0.95 for place in taken.values()):
                taken[band] = middle / inch
        return taken


def _apart(places: list[float], inches: float) -> list[float]:
    """The places, moved down and then up again until there is a pitch between them and the last is in sight."""
    moved = list(places)
    for at in range(1, len(moved)):
        moved[at] = max(moved[at], moved[at - 1] + NUMBER_PITCH)
    below = inches + NUMBER_PITCH / 2
    for at in reversed(range(len(moved))):
        moved[at] = below = min(moved[at], below - NUMBER_PITCH / 2 if at == len(moved) - 1 else below - NUMBER_PITCH)
    return moved


def panels_of(plan: Plan, most: int) -> list[Panel]:
    """At most that many panels: the kinds with the most work, in the order of the batch."""
    request, start, length, rank = plan.chunk_table
    panels = []
    for kind in most_work(kinds_of(plan), most):
        numbers = np.asarray(kind.requests)
        begins, ends = np.searchsorted(request, numbers), np.searchsorted(request, numbers + 1)
        stacked = len(numbers) > 1 and bool((ends - begins == 1).all())
        if stacked:
            counts = np.bincount(rank[begins], minlength=plan.cp_size)
            edges = np.concatenate([[0], np.cumsum(counts)]).tolist()
            bands = [Band(edges[r], edges[r + 1], r, 1, kind.extend_len) for r in np.flatnonzero(counts).tolist()]
        else:
            own = slice(begins[0], ends[0])
            table = zip(start[own].tolist(), length[own].tolist(), rank[own].tolist(), strict=True)
            bands = [Band(begin, begin + size, owner, begin + 1, begin + size) for begin, size, owner in table]
        panels.append(Panel(kind, tuple(bands), len(numbers) if stacked else kind.extend_len, stacked))
    return panels


def draw_panel(axis: Any, panel: Panel, inches: float, inches_wide: float) -> None:
    """Draws queries down and keys across, in a place of that height and width."""
    from matplotlib.patches import Polygon, Rectangle

    prefix_len, extend_len, _ = panel.kind
    axis.set_title("\n".join(panel.title), loc="left", pad=4)
    total = max(1, prefix_len + extend_len)
    axis.set_xlim(0, total)
    axis.set_ylim(max(1, panel.height), 0)
    axis.set_yticks([])
    axis.set_xticks([0, total], ["0", f"{prefix_len + extend_len:,}"], fontsize=7.5)
    axis.get_xticklabels()[0].set_horizontalalignment("left")
    axis.get_xticklabels()[-1].set_horizontalalignment("right")
    axis.tick_params(axis="x", length=2, pad=2)
    if not extend_len:
        axis.set_facecolor("#EEEEEE")
        axis.text(0.5, 0.5, "nothing new", transform=axis.transAxes, ha="center", va="center")
        return
    inch = inches / panel.height
    numbers = panel.numbers(inches)
    for band in panel.bands:
        thick = (band.end - band.begin) * inch
        color, hatch = rank_color(band.rank), rank_hatch(band.rank) if thick >= _LEAST_INCHES_HATCHED else ""
        style: dict[str, Any] = {"edgecolor": INK, "linewidth": min(0.4, 7 * thick), "hatch": hatch}
        if prefix_len:
            axis.add_patch(Rectangle((0, band.begin), prefix_len, band.end - band.begin, facecolor=tint(color), **style))
        corners = [
            (prefix_len, band.begin), (prefix_len + band.first_seen, band.begin),
            (prefix_len + band.last_seen, band.end), (prefix_len, band.end),
        ]  # fmt: skip
        axis.add_patch(Polygon(corners, facecolor=color, **style))
        middle = (band.begin + band.end) / 2
        if band in numbers:
            axis.text(-0.02, numbers[band], f"{band.rank}", va="center", ha="right", fontsize=7, transform=axis.get_yaxis_transform())
        if panel.stacked and thick >= 0.14 and (prefix_len or extend_len == 1):
            # On the part that is a rectangle; a triangle has no room for a text.
            wide, behind = (prefix_len, tint(color)) if prefix_len else (1, color)
            count = counted(band.end - band.begin, "request")
            text = longest_that_fits([count, count.split()[0]], wide / total * inches_wide, 7.5)
            box = {"color": behind, "pad": 1} if hatch and text else None
            axis.text(wide / 2, middle, text, va="center", ha="center", fontsize=7.5, color=ink_on(behind), bbox=box)
    if prefix_len:
        axis.axvline(prefix_len, color=INK, linewidth=1.2)
