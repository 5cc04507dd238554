"""What the times over batches of traffic say: how far ``auto`` is from the best fixed choice, and from one GPU."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from peers.report import Line, markdown

from traffic.batches import Batch, in_words
from traffic.choices import AUTO, AUTO_UNEVEN, CHOICES, FIXED, ONE_GPU, Choice, plan_bytes

# What a layer may take beyond one GPU's time, in us.
ALLOWED = 10.0
HEADER = ["batch", "what", "partition of auto", "way of auto", *map(str, CHOICES), ONE_GPU, "auto / best even", "uneven / best", "note"]


@dataclass
class Row:
    """One batch; times of a layer are in us.

    Attributes:
        taken: which partition, and which strategy and backend, ``auto`` takes.
        times: by the names of choices; those that were not timed are missing.
        note: why some were not.
    """

    number: int
    what: str
    taken: tuple[str, str]
    times: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def even(self) -> float | None:
        """Of ``auto`` over the best fixed choice that keeps ranks even in tokens."""
        return self._over(AUTO, [choice for choice in FIXED if choice.keeps_even])

    @property
    def even_by_rows(self) -> float | None:
        """The same beside an all-gather and a ring alone."""
        return self._over(AUTO, [choice for choice in FIXED if choice.keeps_even and choice.strategy != "ulysses"])

    @property
    def uneven(self) -> float | None:
        """Where tokens cost nothing, over the best of all."""
        return self._over(AUTO_UNEVEN, FIXED)

    @property
    def beyond_one_gpu(self) -> float | None:
        """Where tokens cost nothing: the time less what is allowed, over that of one GPU."""
        mine, alone = self.times.get(str(AUTO_UNEVEN)), self.times.get(ONE_GPU)
        return None if mine is None or alone is None else (mine - ALLOWED) / alone

    def _over(self, auto: Choice, fixed: Iterable[Choice]) -> float | None:
        mine, others = self.times.get(str(auto)), [self.times[str(choice)] for choice in fixed if str(choice) in self.times]
        return None if mine is None or not others else mine / min(others)

    @property
    def cells(self) -> list[str]:
        """Of the table."""
        times = [f"{self.times[name]:.1f}" if name in self.times else "" for name in (*map(str, CHOICES), ONE_GPU)]
        ratios = ["" if ratio is None else f"{ratio:.3f}" for ratio in (self.even, self.uneven)]
        return [str(self.number), self.what, *self.taken, *times, *ratios, self.note]

    @classmethod
    def parse(cls, cells: dict[str, str]) -> Row:
        """Of a line that was written."""
        times = {name: float(cells[name]) for name in (*map(str, CHOICES), ONE_GPU) if cells[name]}
        return cls(int(cells["batch"]), cells["what"], (cells["partition of auto"], cells["way of auto"]), times, cells["note"])


def row_of(
    number: int, batch: Batch, size: int, lines: list[Line], of: Mapping[Choice, tuple[str, ...]], beside: Callable[[Choice, Line], float]
) -> Row:
    """A batch's, by its lines.

    Choices that come to the same call, with the same chunks, are one: their times are taken together, so that they do not differ by
    chance.

    Args:
        of: the lines of each choice, by their variants, of which the slowest counts.
        beside: what is to be added to each, in us.
    """
    named = {line.variant: line for line in lines}
    plans = {choice: choice.plan(batch, size) for choice in CHOICES}
    timed = {choice: [named[name] for name in names if name in named and _timed(named[name])] for choice, names in of.items()}
    # One that lacks a rank is not known.
    timed = {choice: found for choice, found in timed.items() if found and len(found) == len(of[choice])}
    together: dict[tuple[bytes, str, int], dict[str, list[float]]] = {}
    for choice, found in timed.items():
        for place, line in enumerate(found):
            together.setdefault((plan_bytes(plans[choice]), line.way, place), {})[line.variant] = _timed(line)

    def median(choice: Choice, place: int, line: Line) -> float:
        of_call = together[plan_bytes(plans[choice]), line.way, place]
        return float(np.median([time for times in of_call.values() for time in times]))

    times = {
        str(choice): max(median(choice, place, line) for place, line in enumerate(timed[choice])) + beside(choice, timed[choice][0])
        for choice in CHOICES
        if choice in timed
    }
    alone = named.get(ONE_GPU)
    if alone is not None and (of_one := _timed(alone)):
        times[ONE_GPU] = float(np.median(of_one))
    way = next((named[name].way for name in of.get(AUTO, ()) if name in named), "")
    notes = dict.fromkeys(f"{line.variant}: {line.note}" for line in lines if line.note)
    return Row(number, in_words(batch), (plans[AUTO].kind, way), times, "; ".join(notes))


def _timed(line: Line) -> list[float]:
    """As graphs; on a CPU, where there are none, as they come."""
    return line.times["graph"] or line.times["eager"]


def summary(rows: list[Row]) -> str:
    """How many of the batches are within what."""
    lines = [
        _shares("auto over the best of zigzag and whole", [row.even for row in rows]),
        _shares("the same, beside all_gather and ring alone", [row.even_by_rows for row in rows]),
        _shares("auto, where a token costs nothing, over the best of all", [row.uneven for row in rows]),
        _shares(f"the same less {ALLOWED:g} us, over one GPU", [row.beyond_one_gpu for row in rows]),
    ]
    worst = [
        [row.what, row.taken[0], row.taken[1], f"{row.even:.3f}", *_best(row, even=True)]
        for row in sorted((row for row in rows if row.even is not None), key=lambda row: -(row.even or 0.0))[:5]
    ]
    return "\n\n".join(
        [
            markdown(["", "batches", "within 1.02", "within 1.05", "median", "worst"], lines),
            "The worst of auto over the best of zigzag and whole:",
            markdown(["what", "partition of auto", "way", "over the best", "the best", "us"], worst),
        ]
    )


def _best(row: Row, even: bool) -> list[str]:
    times = {str(choice): row.times[str(choice)] for choice in FIXED if str(choice) in row.times and (choice.keeps_even or not even)}
    name = min(times, key=lambda name: times[name])
    return [name, f"{times[name]:.1f}"]


def _shares(name: str, ratios: list[float | None]) -> list[str]:
    known = np.array([ratio for ratio in ratios if ratio is not None])
    if not len(known):
        return [name, "0", "", "", "", ""]
    within = [f"{np.mean(np.round(known, 3) <= bound):.1%}" for bound in (1.02, 1.05)]
    return [name, str(len(known)), *within, f"{np.median(known):.3f}", f"{known.max():.3f}"]


def read(path: Path) -> list[Row]:
    """What earlier runs have measured, if anything."""
    file = path.with_suffix(".csv")
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        return [Row.parse(cells) for cells in csv.DictReader(opened)]
