"""Results of bench_peers.py: a table of everything, what follows from it, and pictures."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from peers.ours import NO_TRANSFER
from peers.session import Times
from peers.variants import Kind

Mode = Literal["graph", "eager"]
MODES: tuple[Mode, ...] = ("graph", "eager")
PERCENTILES = (50, 20, 80)
HEADER = [
    "batch", "variant", "kind", "relative error", *(f"{mode}, p{p}, us" for mode in MODES for p in PERCENTILES), "host, us",
    *(f"exposed, {mode}, us" for mode in MODES), "note",
]  # fmt: skip


@dataclass
class Line:
    """One variant over one batch. Times are in us, of each round the slowest rank's.

    Attributes:
        beside: see :class:`peers.variants.Variant`.
        error: relative to cpattn's result; None where the result is not the batch's.
        note: why there are no times, or no graph.
        memory: bytes that a call takes on the rank where it takes most; way: what it has chosen by itself. See
            :class:`peers.session.Prepared`.
        layers: of a graph, and of an eager run.
    """

    batch: str
    variant: str
    kind: Kind
    beside: str = ""
    error: float | None = None
    times: dict[Mode, list[float]] = field(default_factory=lambda: {"graph": [], "eager": []})
    host: list[float] = field(default_factory=list)
    note: str = ""
    memory: int = 0
    way: str = ""
    layers: int = 1

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:.1e}"
        return f"{self.batch:22} {self.variant:42} {error:8} {_us(self.median('graph')):>10} {_us(self.median('eager')):>10} {self.note}"

    def add(self, times: list[Times]) -> None:
        """One round's, of each rank: a call is over when its slowest rank is."""
        columns: tuple[list[float], ...] = (self.times["graph"], self.times["eager"], self.host)
        for column, of_ranks in zip(columns, zip(*times, strict=True), strict=True):
            known = [time for time in of_ranks if time is not None]
            if len(known) == len(times):
                column.append(max(known))

    def median(self, mode: Mode) -> float | None:
        return float(np.median(self.times[mode])) if self.times[mode] else None

    def cells(self, lines: list[Line]) -> list[str]:
        """Of the table of everything."""
        percentiles = [_us(np.percentile(self.times[mode], p) if self.times[mode] else None) for mode in MODES for p in PERCENTILES]
        return [
            self.batch, self.variant, self.kind, "" if self.error is None else f"{self.error:.1e}", *percentiles,
            _us(np.median(self.host) if self.host else None), *(_us(exposed(self, lines, mode)) for mode in MODES), self.note,
        ]  # fmt: skip


def exposed(line: Line, lines: list[Line], mode: Mode) -> float | None:
    """The time over that of the same call without transfers: of the strategy and backend, and of a peer the fastest of all."""
    mine = line.median(mode)
    if mine is None or line.kind not in ("auto", "fixed", "peer"):
        return None
    alone = [other for other in lines if other.batch == line.batch and other.kind == NO_TRANSFER]
    times = [other.median(mode) for other in alone if not line.beside or other.variant == line.beside]
    found = [time for time in times if time is not None]
    return mine - min(found) if found else None


def best(lines: Iterable[Line], batch: str, kind: Kind, mode: Mode) -> tuple[str, float] | None:
    """The fastest variant of a kind over a batch, with its median."""
    times = [
        (line.variant, time) for line in lines if line.batch == batch and line.kind == kind and (time := line.median(mode)) is not None
    ]
    return min(times, key=lambda found: found[1]) if times else None


def summaries(lines: list[Line], batches: dict[str, list[tuple[int, int]]]) -> str:
    """What the results say, as Markdown: times beside each peer, in graphs and eagerly, and the speed-up of a second GPU."""
    return "\n\n".join([*(_beside_peers(lines, mode) for mode in MODES), *(_speedups(lines, batches, mode) for mode in MODES)])


def _beside_peers(lines: list[Line], mode: Mode) -> str:
    peers = list(dict.fromkeys(line.variant for line in lines if line.kind == "peer"))
    rows = []
    for batch in dict.fromkeys(line.batch for line in lines):
        alone, auto, fixed, peer = (best(lines, batch, kind, mode) for kind in ("launch", "auto", "fixed", "peer"))
        partition = best(lines, batch, "partition", mode)
        times = {line.variant: line.median(mode) for line in lines if line.batch == batch}
        if fixed is not None:
            rows.append(
                [
                    batch, _us(alone and alone[1]), _us(auto and auto[1]), _us(partition and partition[1]), _us(fixed and fixed[1]),
                    fixed[0].removeprefix("cpattn ") if fixed else "", *(_us(times.get(name)) for name in peers),
                    *(_ratio(auto, other) for other in (alone, fixed, peer)),
                ]
            )  # fmt: skip
    header = ["batch", "A", "auto", "partition auto", "best fixed", "which", *peers, "auto / A", "auto / best fixed", "auto / best peer"]
    return f"## Beside peers, {_title(mode)}, us\n\n{markdown(header, rows)}"


def _speedups(lines: list[Line], batches: dict[str, list[tuple[int, int]]], mode: Mode) -> str:
    header = ["batch", "one GPU", "auto", "times as fast", "exposed, us"]
    rows = []
    for batch, (one, auto) in speedups(lines, batches, mode).items():
        line = next(line for line in lines if line.batch == batch and line.kind == "auto")
        rows.append([batch, _us(one), _us(auto), f"{one / auto:.2f}", _us(exposed(line, lines, mode))])
    return f"## From one GPU to all, one request, {_title(mode)}, us\n\n{markdown(header, rows)}"


def speedups(lines: list[Line], batches: dict[str, list[tuple[int, int]]], mode: Mode) -> dict[str, tuple[float, float]]:
    """For batches of one request without a prefix, by length: the time on one GPU, and that of ``auto``."""
    found = {}
    for batch in sorted(dict.fromkeys(line.batch for line in lines), key=lambda name: batches[name][0][1]):
        one, auto = (best(lines, batch, kind, mode) for kind in ("one GPU", "auto"))
        if len(batches[batch]) == 1 and not batches[batch][0][0] and one is not None and auto is not None:
            found[batch] = one[1], auto[1]
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def write(path: Path, head: str, lines: list[Line], batches: dict[str, list[tuple[int, int]]]) -> None:
    """``path.md`` and ``path.csv``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [line.cells(lines) for line in lines]
    everything = f"## Everything\n\n{markdown(HEADER, rows)}"
    path.with_suffix(".md").write_text("\n\n".join([head, summaries(lines, batches), everything]) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])


def read(path: Path) -> list[Line]:
    """What :func:`write` left, with the medians as the only times."""
    lines = []
    with path.with_suffix(".csv").open(newline="") as file:
        for row in csv.DictReader(file):
            line = Line(row["batch"], row["variant"], row["kind"], note=row["note"])  # type: ignore[arg-type]
            for mode in MODES:
                line.times[mode] = [float(cell.replace(",", "")) for cell in [row[f"{mode}, p50, us"]] if cell]
            lines.append(line)
    return lines


def draw(path: Path, lines: list[Line], batches: dict[str, list[tuple[int, int]]], beside: Callable[[str], str]) -> None:
    """Time beside each peer, the speed-up by context length, and exposed communication. Needs matplotlib.

    Args:
        beside: of a variant, see :class:`peers.variants.Variant`.
    """
    from gpu_report import draw_bars, draw_lines

    for line in lines:
        line.beside = beside(line.variant)
    with_peers = [batch for batch in dict.fromkeys(line.batch for line in lines) if best(lines, batch, "peer", "eager")]
    for mode in [mode for mode in MODES if any(line.times[mode] for line in lines)]:
        over: dict[str, dict[str, float]] = {}
        shares: dict[str, dict[str, float]] = {}
        for batch in with_peers:
            alone, fixed = (best(lines, batch, kind, mode) for kind in ("launch", "fixed"))
            shown = {line.variant: line for line in lines if line.batch == batch and line.kind in ("auto", "peer")}
            times = {"cpattn, best fixed choice": fixed and fixed[1]} | {name: line.median(mode) for name, line in shown.items()}
            if alone is not None:
                over[batch] = {name: time / alone[1] for name, time in times.items() if time is not None}
            for name, line in shown.items():
                time, hidden = line.median(mode), exposed(line, lines, mode)
                if time is not None and hidden is not None:
                    shares.setdefault(batch, {})[name] = 100 * hidden / (time - hidden)
        title = f"A layer's attention over A, the launch alone on keys in order; {_title(mode)}"
        draw_bars(path.with_name(f"{path.name}_{mode}.png"), title, {"times A": over}, digits=2)
        title = f"Exposed communication: time over that of the call without transfers; {_title(mode)}"
        draw_bars(path.with_name(f"{path.name}_{mode}_exposed.png"), title, {"% of the call without transfers": shares})
    curves = {}
    for mode in MODES:
        of_mode = speedups(lines, batches, mode)
        curves[_title(mode)] = {batches[batch][0][1]: one / auto for batch, (one, auto) in of_mode.items()}
    axes_titles = "tokens of one request", "times as fast"
    draw_lines(path.with_name(f"{path.name}_speedup.png"), "From one GPU to all: cpattn auto", axes_titles, curves)


def _title(mode: Mode) -> str:
    return "as CUDA graphs" if mode == "graph" else "eager"


def _us(time: float | np.floating[Any] | None) -> str:
    return "" if time is None else f"{time:,.1f}"


def _ratio(mine: tuple[str, float] | None, other: tuple[str, float] | None) -> str:
    return "" if mine is None or other is None else f"{mine[1] / other[1]:.3f}"
