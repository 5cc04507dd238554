"""What follows from the times of bench_scaling.py: efficiency, exposed communication, rates, and how far the cost model is off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from peers.ours import NO_TRANSFER
from peers.report import MODES, PERCENTILES, Line, Mode, exposed

import cpattn
from scaling.ways import LAUNCH, Case, Way

EVERYTHING = [
    "batch", "GPUs", "partition", "strategy", "transport", "backend", "chosen", "relative error",
    *(f"{mode}, p{p}, us" for mode in MODES for p in PERCENTILES), "host, us", *(f"exposed, {mode}, us" for mode in MODES),
    *(f"efficiency, {mode}" for mode in MODES), "TFLOP/s a GPU", "memory, MiB", "estimate, us", "estimate / measured", "note",
]  # fmt: skip
SUMMARY = [
    "batch", "GPUs", "partition", "timed", "one GPU, us", "auto, us", "p20", "p80", "chosen", "efficiency", "exposed, us", "TFLOP/s a GPU",
    "best fixed, us", "which", "auto / best fixed", "launch alone, us", "launch alone / auto", "memory, MiB", "estimate, us",
    "estimate / measured",
]  # fmt: skip


@dataclass
class Results:
    """The lines of a run, and what they are of.

    Attributes:
        ways: of each batch, by the variant's name.
        machine: by whose constants times are estimated.
    """

    cases: dict[str, Case]
    ways: dict[str, dict[str, Way]]
    lines: list[Line]
    machine: cpattn.Machine
    _estimates: dict[Any, cpattn.Estimates] = field(default_factory=dict)

    def way(self, line: Line) -> Way:
        return self.ways[line.batch][line.variant]

    def of(self, batch: str, **wanted: Any) -> list[Line]:
        """The lines of a batch whose way has these attributes."""
        here = [line for line in self.lines if line.batch == batch and line.variant in self.ways[batch]]
        return [line for line in here if all(getattr(self.way(line), name) == value for name, value in wanted.items())]

    def everything(self) -> list[list[str]]:
        """A row for each way of each batch; those that were not timed have a note."""
        return [self._row(line) for batch in self.cases for line in self.of(batch)]

    def _row(self, line: Line) -> list[str]:
        way, mode = self.way(line), best_mode(line)
        times = [_us(np.percentile(line.times[mode], p) if line.times[mode] else None) for mode in MODES for p in PERCENTILES]
        measured, estimated = line.median(mode), self.estimate(line, mode)
        return [
            line.batch, str(way.ranks), way.partition, way.strategy, way.transport, way.backend, line.way,
            "" if line.error is None else f"{line.error:.1e}", *times, _us(np.median(line.host) if line.host else None),
            *(_us(exposed(line, self.lines, each)) for each in MODES), *(_share(self.efficiency(line, each)) for each in MODES),
            _number(self.tflops(line, mode), 0), f"{line.memory / 2**20:,.0f}" if measured is not None else "", _us(estimated),
            _share(_quotient(estimated, measured)), line.note,
        ]  # fmt: skip

    def summary(self) -> list[list[str]]:
        """A row for ``auto`` over each batch, number of GPUs and partition, as a graph and eagerly."""
        rows = []
        for batch in self.cases:
            for line in self.of(batch, strategy="auto"):
                if self.way(line).transport != NO_TRANSFER:
                    rows += [self._summary(line, mode) for mode in MODES if line.times[mode]]
        return rows

    def _summary(self, line: Line, mode: Mode) -> list[str]:
        way = self.way(line)
        here = self.of(line.batch, ranks=way.ranks, partition=way.partition)
        fixed = fastest([each for each in here if each.kind == "fixed"], mode)
        launch = fastest([each for each in here if each.kind == "launch"], mode)
        measured, estimated = line.median(mode), self.estimate(line, mode)
        return [
            line.batch, str(way.ranks), way.partition, mode, _us(self.one_gpu(line.batch, mode)), _us(measured),
            *(_us(np.percentile(line.times[mode], p)) for p in (20, 80)), line.way, _share(self.efficiency(line, mode)),
            _us(exposed(line, self.lines, mode)), _number(self.tflops(line, mode), 0), _us(_median(fixed, mode)),
            self._choices(fixed), _share(_quotient(measured, _median(fixed, mode))), _us(_median(launch, mode)),
            _share(_quotient(_median(launch, mode), measured)), f"{line.memory / 2**20:,.0f}", _us(estimated),
            _share(_quotient(estimated, measured)),
        ]  # fmt: skip

    def _choices(self, line: Line | None) -> str:
        return "" if line is None else ", ".join(self.way(line)[2:])

    def one_gpu(self, batch: str, mode: Mode) -> float | None:
        """The fastest of the whole batch on one GPU, in us."""
        return _median(fastest(self.of(batch, ranks=1), mode), mode)

    def efficiency(self, line: Line, mode: Mode) -> float | None:
        """The time on one GPU over n times that on n."""
        if line.kind not in ("auto", "fixed"):
            return None
        return _quotient(self.one_gpu(line.batch, mode), line.median(mode), self.way(line).ranks)

    def tflops(self, line: Line, mode: Mode) -> float | None:
        """Of each GPU. Of a launch alone the slowest rank's time counts too."""
        return _quotient(self.cases[line.batch].flops * 1e-6, line.median(mode), self.way(line).ranks)

    def estimate(self, line: Line, mode: Mode) -> float | None:
        """What :func:`cpattn.estimate` says of such a call, in us; None of launches alone and of calls without transfers, and where it
        does not know the backend. Layers follow one another after a rest, of which a card has some ms at its highest clock."""
        way = self.way(line)
        if way.strategy == LAUNCH or way.transport == NO_TRANSFER:
            return None
        strategy, backend = line.way.split(", ") if line.way else (way.strategy, way.backend)
        rested, sustained = (
            _estimated(self._all_estimates(line.batch, way, machine), strategy, way.transport, backend, mode)
            for machine in (self.machine.rested(), self.machine)
        )
        if rested is None or sustained is None:
            return None
        part = min(1.0, self.machine.boost_seconds * 1e6 / (line.layers * rested))
        return part * rested + (1 - part) * sustained

    def _all_estimates(self, batch: str, way: Way, machine: cpattn.Machine) -> cpattn.Estimates:
        key = batch, way.ranks, way.partition, machine
        if key not in self._estimates:
            case = self.cases[batch]
            plan = case.plan(way.ranks, way.partition)
            self._estimates[key] = cpattn.estimate(plan, case.problem(plan), machine)
        return self._estimates[key]


def _estimated(found: cpattn.Estimates, strategy: str, transport: str, backend: str, mode: Mode) -> float | None:
    """In us. Ranks of one host take the memory of peers by themselves, where there is any."""
    transports = ("peer_memory", "collectives") if transport == "auto" else (transport,)
    for kind in transports:
        for one in found:
            if (one.strategy, one.transport, one.overlap, one.backend) == (strategy, kind, 1, backend):
                return 1e6 * (one.graph if mode == "graph" else one.eager)
    return None


def best_mode(line: Line) -> Mode:
    """As a graph, where there is one."""
    return "graph" if line.times["graph"] else "eager"


def fastest(lines: Iterable[Line], mode: Mode) -> Line | None:
    timed = [line for line in lines if line.times[mode]]
    return min(timed, key=lambda line: np.median(line.times[mode])) if timed else None


def _median(line: Line | None, mode: Mode) -> float | None:
    return None if line is None else line.median(mode)


def _quotient(over: float | None, under: float | None, times: int = 1) -> float | None:
    return over / (under * times) if over is not None and under else None


def _us(time: float | np.floating[Any] | None) -> str:
    return _number(time, 1)


def _number(value: float | np.floating[Any] | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return _number(value, 3)
