"""A prefill of MLA in DeepSeek-V3's shapes: expanded from the latent and absorbed, on one GPU and on several.

PYTHONPATH=. python benchmarks/bench_mla.py [--ranks 2] [--seconds 85] [--results FOLDER]
PYTHONPATH=. python benchmarks/bench_mla.py --tune
PYTHONPATH=. python benchmarks/bench_mla.py --check

Each variant makes a layer's attention from the same queries and latents to the same results. --tune times how the latent is expanded: all
backends, on the call's own stream or beside, and groups of other sizes. --check tries everything on a CPU over small batches, in seconds.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peers import latents
from peers.latents import Sizes, Variant

from cpattn.testing import ProcessRanks

RESULTS = Path(__file__).parent / "results"
DEEPSEEK_V3, CHECKED = Sizes(128, 512, 64, 128, 128), Sizes(4, 24, 8, 16, 16)
BATCHES = {
    "1 x 8k": [(0, 8192)],
    "1 x 16k": [(0, 16384)],
    "1 x 32k": [(0, 32768)],
    "1 x 64k": [(0, 65536)],
    "30k + 2k": [(30720, 2048)],
}
CHECKED_BATCHES = {"1 x 90": [(0, 90)], "100 + 30, 0 + 20": [(100, 30), (0, 20)]}
TUNED_BATCHES = ("1 x 8k", "1 x 32k", "30k + 2k")
# A call that takes longer is timed no more often than it has to be.
LONG_CALL, LEAST_ROUNDS = 0.3, 3
ONE, ALL = "one GPU", "all GPUs"
HEADER = ["batch", "variant", "way", "relative error", "ms, p50", "p20", "p80", "of one GPU's faster form", "note"]


def all_variants(ranks: int, tune: bool, device_type: str) -> dict[str, Variant]:
    """By name. The first is the reference of all."""
    found = {f"{ONE}, expanded": Variant("expanded", 1), f"{ALL}, expanded": Variant("expanded", ranks)}
    if not tune:
        found[f"{ALL}, expanded, collectives"] = Variant("expanded", ranks, transport="collectives")
        return found | {f"{ONE}, absorbed": Variant("absorbed", 1), f"{ALL}, absorbed": Variant("absorbed", ranks)}
    for where, count in ((ONE, 1), (ALL, ranks)):
        for backend in ("triton", "flash_attn3", "flash_attn4") if device_type == "cuda" else ("cpu", "reference"):
            found[f"{where}, expanded, {backend}"] = Variant("expanded", count, backend)
        found[f"{where}, expanded, in turn"] = Variant("expanded", count, beside=False)
        for mib in (64, 128, 512, 1024, 8192):
            found[f"{where}, expanded, groups of {mib} MiB"] = Variant("expanded", count, most_bytes=mib * 2**20)
    return found


@dataclass
class Line:
    """One variant over one batch; seconds are of each round the slowest rank's."""

    batch: str
    variant: str
    way: str = ""
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float | None:
        return float(np.median(self.seconds)) if self.seconds else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="at most; long calls get fewer")
    parser.add_argument("--batches", nargs="+", choices=list(BATCHES), metavar="NAME")
    parser.add_argument("--tune", action="store_true", help="how the latent is expanded, in place of both forms")
    parser.add_argument("--seconds", type=float, default=85, help="after which no further batch is begun")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="on a CPU, over small batches")
    options = parser.parse_args()
    device_type = "cpu" if options.check else "cuda"
    variants = all_variants(options.ranks, options.tune, device_type)
    batches = CHECKED_BATCHES if options.check else BATCHES
    names = list(batches) if options.check else options.batches or list(TUNED_BATCHES if options.tune else BATCHES)
    path, deadline = options.results / f"mla{'_tuned' * options.tune}_{options.ranks}_gpus", time.monotonic() + options.seconds
    lines: list[Line] = []
    left_out: list[str] = []
    with ProcessRanks(options.ranks, timeout=60, transport="gloo" if options.check else "nccl") as ranks:
        for number, name in enumerate(names):
            left = deadline - time.monotonic()
            if left <= 0:
                left_out.append(name)
                continue
            ranks.run(latents.begin, batches[name], CHECKED if options.check else DEEPSEEK_V3, device_type)
            share, rounds = left / (len(names) - number), 1 if options.check else options.rounds
            found = measure(ranks, name, variants, rounds, share, as_graphs=not options.check)
            lines += found
            for cells in rows(found):
                print(" | ".join(cells), flush=True)
            if not options.check:
                write(path, options.ranks, lines, left_out)
        ranks.run(latents.finish)
    if left_out and not options.check:
        write(path, options.ranks, lines, left_out)
    wrong = [f"{line.batch}, {line.variant}: {line.note}" for line in lines if line.note.startswith(("wrong", "cannot be captured"))]
    if wrong:
        sys.exit("\n".join(wrong))
    print(summary(lines), flush=True)


def measure(ranks: ProcessRanks, batch: str, variants: dict[str, Variant], rounds: int, seconds: float, *, as_graphs: bool) -> list[Line]:
    """The lines of a batch, whose tensors are there."""
    end = time.monotonic() + seconds
    lines, took = {name: Line(batch, name) for name in variants}, dict[str, float]()
    for name, variant in variants.items():
        line, made = lines[name], attempt(ranks, latents.prepare, name, variant)
        if isinstance(made, str) or not made[0].served:
            line.note = made if isinstance(made, str) else made[0].way
            continue
        line.way = made[0].way
        compare(line, [one.squares for one in made], made[0].bound)
        took[name] = max(one.seconds for one in made)
        if not line.note and as_graphs:
            squares = attempt(ranks, latents.capture, name)
            if isinstance(squares, str):
                line.note = f"cannot be captured: {squares}"
            else:
                compare(line, squares, made[0].bound)
    timed = [name for name in took if not lines[name].note]
    for round_ in range(rounds):
        for name in random.Random(round_).sample(timed, len(timed)):
            is_over = time.monotonic() > end or took[name] > LONG_CALL
            if round_ < LEAST_ROUNDS or not is_over:
                lines[name].seconds.append(max(ranks.run(latents.measure, name)))
    return list(lines.values())


def attempt(ranks: ProcessRanks, program: Callable[..., Any], *arguments: Any) -> list[Any] | str:
    """What every rank returns, or why none does. Raises RuntimeError where some fail and others do not: they are out of step."""
    outcomes = ranks.outcomes(program, *arguments)
    failures = [str(value).strip().splitlines()[-1] for done, value in outcomes if not done]
    if failures and len(failures) < len(outcomes):
        raise RuntimeError(f"{program.__name__} {arguments}: some ranks failed: {' / '.join(failures)}")
    return failures[0].replace("|", "/")[:200] if failures else [value for _, value in outcomes]


def compare(line: Line, squares: Iterable[tuple[float, float]], bound: float) -> None:
    """With the first variant of all."""
    difference, size = np.sum(list(squares), axis=0)
    error = float(np.sqrt(difference / size))
    line.error = error if line.error is None else max(line.error, error)
    if not error <= bound:
        line.note = f"wrong: its relative error is {error:.1e}, above {bound:.1e}"


def faster_form(lines: list[Line], batch: str) -> float | None:
    """Of one GPU, in any variant."""
    times = [line.median for line in lines if line.batch == batch and line.variant.startswith(ONE) and line.median is not None]
    return min(times, default=None)


def rows(lines: list[Line]) -> list[list[str]]:
    """Of the table."""
    table = []
    for line in lines:
        alone, percentiles = faster_form(lines, line.batch), ["", "", ""]
        if line.seconds:
            percentiles = [f"{1e3 * x:,.3f}" for x in np.percentile(line.seconds, [50, 20, 80])]
        ratio = "" if alone is None or line.median is None else f"{line.median / alone:.3f}"
        error = "" if line.error is None else f"{line.error:.1e}"
        table.append([line.batch, line.variant, line.way, error, *percentiles, ratio, line.note])
    return table


def summary(lines: list[Line]) -> str:
    """Of each batch the fastest of all GPUs over the faster form on one."""
    said = []
    for batch in dict.fromkeys(line.batch for line in lines):
        shared = [line for line in lines if line.batch == batch and line.variant.startswith(ALL) and line.median is not None]
        alone = faster_form(lines, batch)
        if shared and alone is not None:
            best = min(shared, key=lambda line: line.median or 0.0)
            said.append(
                f"{batch}: {best.variant} takes {(best.median or 0.0) / alone:.3f} of {alone * 1e3:,.3f} ms, the faster form on one GPU"
            )
    return "\n".join(said)


def write(path: Path, ranks: int, lines: list[Line], left_out: list[str]) -> None:
    """``path.md`` and ``path.csv``."""
    from gpu_report import write_gpu_report

    heads, rank, rope, nope, v_dim = DEEPSEEK_V3
    notes = (
        f"bf16, {heads} heads, a latent of {rank} + {rope}, keys of {nope} + {rope} and values of {v_dim}: DeepSeek-V3. One layer's "
        f"attention as a CUDA graph, from queries [tokens, {heads}, {nope + rope}] and latents to results [tokens, {heads}, {v_dim}]; the "
        "absorbed form has its products with the weight in it. One rank a GPU; the slowest rank counts; one GPU: the whole batch on each; "
        f"variants interleaved in random order. Prefixes lie in pages of {latents.PAGE_SIZE} on every rank. Each result was compared with "
        f"the first variant's before it was timed.\n\n{summary(lines)}"
    )
    if left_out:
        notes += f"\n\nNot timed, as the time was up: {', '.join(left_out)}."
    write_gpu_report(path.name, f"Prefill of MLA, {ranks} GPUs", HEADER, rows(lines), notes, path.parent, prints=False)


if __name__ == "__main__":
    main()
