"""Choosing the fastest of several shape sets: what fails is left out, and only what is clearly faster takes the default's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from cpattn.errors import CPError
from cpattn.kernels.tile_candidates import ShapeSet

# By how much a set must be faster than the default one: less may be noise, and would change bits for next to nothing.
LEAST_GAIN = 0.02
# The best of many by one measurement is partly the luckiest: so many are timed again, and only that counts.
_FINALISTS = 4
_REASON_LENGTH = 160

# Launches a batch with one set.
Run: TypeAlias = Callable[[ShapeSet], Any]


class Timer(Protocol):
    """See :func:`cpattn.cli.tune.timing.gpu_median_seconds`."""

    def __call__(self, variants: Mapping[ShapeSet, Callable[[], Any]], seconds: float) -> dict[ShapeSet, float]: ...


class Outcome(NamedTuple):
    """What was measured, and what follows.

    Attributes:
        seconds: of each set that runs, its time on each batch.
        failures: of each set that was left out, why.
        finalists: the sets that were timed again, beside the default.
        winner: what to take: the default set, or one that is faster by LEAST_GAIN and gives right results.
    """

    default: ShapeSet
    seconds: dict[ShapeSet, dict[str, float]]
    failures: dict[ShapeSet, str]
    finalists: list[ShapeSet]
    winner: ShapeSet

    def relative(self, shapes: ShapeSet) -> float:
        """Its speed beside that of the default: the geometric mean over the batches."""
        return relative_speed(self.seconds[shapes], self.seconds[self.default])

    @property
    def gain(self) -> float:
        """Of the winner; 0.0 if that is the default."""
        return self.relative(self.winner) - 1

    @property
    def best_other(self) -> ShapeSet | None:
        """The fastest finalist that gives right results, as far as that was asked; None if there is none."""
        return max((shapes for shapes in self.finalists if shapes not in self.failures), key=self.relative, default=None)


def choose_fastest(
    sets: Sequence[ShapeSet],
    runs: Mapping[str, Run],
    seconds: float,
    timer: Timer,
    wait: Callable[[], None],
    why_wrong: Callable[[ShapeSet], str | None],
    step: Callable[[str], None] = lambda what: None,
) -> Outcome:
    """Times the sets, of which the first is the default, on all batches.

    Args:
        runs: by the batch's name.
        seconds: about how long to measure, what is compiled aside.
        timer: times variants in turn.
        wait: for the device; raises what went wrong there.
        why_wrong: a reason why a set must not be used, or None; asked for a set that would win.
        step: is told what begins: each set, two measurements, the check.

    Raises:
        CPError: the default set fails, or a set has broken the device for all that follow.
    """
    default = sets[0]
    failures: dict[ShapeSet, str] = {}
    for number, shapes in enumerate(sets):
        step(f"compiling candidate {number + 1} of {len(sets)}")
        reason = _why_not(shapes, runs, wait)
        if reason is not None:
            failures[shapes] = reason
    if default in failures:
        raise CPError(f"the default shapes do not run here: {failures[default]}")
    able = [shapes for shapes in sets if shapes not in failures]

    step(f"timing {len(able)} candidates")
    times = _time(able, runs, seconds / 2, timer)
    others = sorted(able[1:], key=lambda shapes: relative_speed(times[shapes], times[default]), reverse=True)
    finalists = others[:_FINALISTS]
    step("timing the best again")
    again = _time([default, *finalists], runs, seconds / 2, timer)
    # The others are put beside the default as it was then.
    others_now = {
        shapes: {batch: time * again[default][batch] / times[default][batch] for batch, time in times[shapes].items()} for shapes in able
    }
    times = others_now | again

    step("checking the results of the best")
    winner = default
    for shapes in sorted(finalists, key=lambda shapes: relative_speed(times[shapes], times[default]), reverse=True):
        if relative_speed(times[shapes], times[default]) < 1 + LEAST_GAIN:
            break
        reason = why_wrong(shapes)
        if reason is None:
            winner = shapes
            break
        failures[shapes] = reason
    return Outcome(default, times, failures, finalists, winner)


def relative_speed(times: Mapping[str, float], of_default: Mapping[str, float]) -> float:
    """
    >>> round(relative_speed({"long": 1.0, "decode": 2.0}, {"long": 2.0, "decode": 2.0}), 3)
    1.414
    """
    return float(np.exp(np.mean([np.log(of_default[batch] / times[batch]) for batch in of_default])))


def in_words(shapes: ShapeSet) -> str:
    """
    >>> from cpattn.kernels.tile_shapes import TileShape
    >>> in_words((TileShape(128, 64, 8, 2, True), TileShape(64, 64, 4, 3, True)))
    '128/64x64 w8/4 s2/3 tma'
    """

    def each(values: list[int]) -> str:
        return "/".join(map(str, values if len(set(values)) > 1 else values[:1]))

    rows, warps, stages = ([getattr(shape, name) for shape in shapes] for name in ("block_m", "num_warps", "num_stages"))
    kind = " specialized" if shapes[0].specialized else " tma" if shapes[0].tma else ""
    return f"{each(rows)}x{shapes[0].block_n} w{each(warps)} s{each(stages)}{kind}"


def in_one_line(error: Exception) -> str:
    """What was raised, cut where it is long: compilers write pages."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."


def _why_not(shapes: ShapeSet, runs: Mapping[str, Run], wait: Callable[[], None]) -> str | None:
    try:
        for run in runs.values():
            run(shapes)
        wait()
    except Exception as error:
        reason = in_one_line(error)
        try:
            wait()
        except Exception as broken:
            raise CPError(f"{in_words(shapes)} has broken the device, so that nothing more can be timed: {in_one_line(broken)}") from error
        return reason
    return None


def _time(sets: Sequence[ShapeSet], runs: Mapping[str, Run], seconds: float, timer: Timer) -> dict[ShapeSet, dict[str, float]]:
    of_batch = {name: timer({shapes: partial(run, shapes) for shapes in sets}, seconds / len(runs)) for name, run in runs.items()}
    return {shapes: {name: times[shapes] for name, times in of_batch.items()} for shapes in sets}
