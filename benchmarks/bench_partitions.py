"""cp_attention over many short requests: cut by zigzag, left whole, and as ``partition="auto"`` has it, beside peers and one GPU.

PYTHONPATH=.:FOLDER python benchmarks/bench_partitions.py [--ranks 2] [--results FOLDER] [--seconds 120]
PYTHONPATH=. python benchmarks/bench_partitions.py --by-length
PYTHONPATH=. python benchmarks/bench_partitions.py --by-length --draw

FOLDER is where ring-flash-attn was unpacked, if it is not installed. Each is timed by the strategy, backend and transport that ``auto``
takes, and over collectives as well. --by-length times ours alone, over as many tokens in requests of each length; --draw draws what that
has written. --check tries everything on a CPU over small batches, in seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from peers import ours, ring_flash_attention
from peers.batches import ragged
from peers.bench import MOST_LAYERS, WRONG, Bench, Task
from peers.report import HEADER, MODES, Line, Mode, best, markdown, read
from peers.sglang_form import sglang_form
from peers.ulysses import ulysses
from peers.variants import Kind, Variant
from peers.work import Heads

RESULTS = Path(__file__).parent / "results"
HEADS, CHECKED_HEADS = Heads(32, 8, 128), Heads(8, 4, 16)
BATCHES = {
    "64 ragged ~0.9k": ragged(with_prefix=False),
    "64 ragged + ~4k prefix": ragged(with_prefix=True),
    "16 x 512": [(0, 512)] * 16,
    "32 x 2k": [(0, 2048)] * 32,
    "1 x 32k, 48 ragged": [(0, 32768), *ragged(with_prefix=False)[:48]],
    "1 x 600": [(0, 600)],
    "1 x 4k": [(0, 4096)],
}
CHECKED_BATCHES = {"ragged": [(0, 40), (0, 8), (0, 64)], "uneven, a prefix": [(3, 17), (0, 9), (30, 6)]}
PARTITIONS = ("zigzag", "whole", "auto")
# As many tokens in requests of each length.
TOKENS = 32768
LENGTHS = {f"{TOKENS // length} x {length}": length for length in (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)}
ALL_BATCHES = BATCHES | {name: [(0, length)] * (TOKENS // length) for name, length in LENGTHS.items()}


def all_variants(device_type: str) -> dict[str, Variant]:
    """By name: ours first, by partition and transport."""
    found = {}
    transports = ("auto", "collectives") if device_type == "cuda" else ("auto",)
    for transport in transports:
        for partition in PARTITIONS:
            make = partial(ours.cp_attention, strategy="auto", transport=transport, backend="auto", partition=partition)
            kind: Kind = "auto" if transport == "auto" else "fixed"
            found[_name(partition, transport)] = Variant(make, kind)
    for backend in ours.backends_here(device_type):
        found[f"one GPU, {backend}"] = Variant(partial(ours.one_gpu, backend=backend), "one GPU")
    return found | {
        "SGLang's form": Variant(sglang_form, "peer"),
        "Ulysses as USP": Variant(ulysses, "peer"),
        "ring-flash-attn llama3": Variant(ring_flash_attention.llama3_varlen, "peer"),
    }


def _name(partition: str, transport: str = "auto") -> str:
    return f"cpattn {partition}" if transport == "auto" else f"cpattn {partition}, {transport}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="at most; long batches get fewer")
    parser.add_argument("--batches", nargs="+", choices=list(ALL_BATCHES), metavar="NAME")
    parser.add_argument("--by-length", action="store_true", help="ours alone, over requests of each length")
    parser.add_argument("--draw", action="store_true", help="only draw the results by length that are there")
    parser.add_argument("--seconds", type=float, default=120, help="after which no further batch is begun")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="on a CPU, over small batches")
    options = parser.parse_args()
    name = f"partitions_{options.ranks}_gpus" + "_by_length" * options.by_length
    if options.check:
        check(options.ranks)
        return
    if not options.draw:
        variants = all_variants("cuda")
        if options.by_length:
            variants = {name: made for name, made in variants.items() if made.kind in ("auto", "one GPU")}
        names = options.batches or list(LENGTHS if options.by_length else BATCHES)
        measure(options.results / name, options.ranks, names, variants, options.rounds, options.seconds)
    if options.by_length:
        draw(options.results / name, options.ranks)


def measure(path: Path, num_ranks: int, names: list[str], variants: dict[str, Variant], rounds: int, seconds: float) -> None:
    """Times the batches one after another, and writes what is known after each."""
    bench = Bench("cuda", num_ranks, rounds, time.monotonic() + seconds)
    try:
        bench.measure_all(
            names, lambda name: Task(name, ALL_BATCHES[name], HEADS, variants), lambda left: write(path, num_ranks, bench.lines, left)
        )
    finally:
        bench.close()
    print("\n\n".join(summary(bench.lines, mode) for mode in MODES), flush=True)


def draw(path: Path, ranks: int) -> None:
    """How many times as fast as one GPU each partition is, over the length of requests. Needs matplotlib."""
    from gpu_report import draw_lines

    lines = read(path)
    curves: dict[str, dict[int, float]] = {}
    for name, length in LENGTHS.items():
        alone = best(lines, name, "one GPU", "graph")
        for partition in PARTITIONS:
            found = [line for line in lines if (line.batch, line.variant) == (name, _name(partition))]
            if alone is not None and found and (time_of := found[0].median("graph")) is not None:
                curves.setdefault(partition, {})[length] = alone[1] / time_of
    title = f"A layer's attention over {TOKENS // 1024}k tokens in requests of one length, {ranks} GPUs, as a CUDA graph"
    draw_lines(path.with_suffix(".png"), title, ("tokens of a request", "times as fast as one GPU"), curves)


def check(num_ranks: int) -> None:
    """Everything but the GPU, over gloo; exits with what is wrong where a result is."""
    bench = Bench("cpu", num_ranks, 1, time.monotonic() + 60)
    try:
        for name, batch in CHECKED_BATCHES.items():
            bench.measure(Task(name, batch, CHECKED_HEADS, all_variants("cpu"), seconds=1.0))
    finally:
        bench.close()
    for line in bench.lines:
        print(line)
    print(summary(bench.lines, "eager"))
    wrong = [line for line in bench.lines if line.note.startswith(WRONG) or (line.kind != "peer" and line.note)]
    if wrong:
        sys.exit("\n".join(f"{line.batch}, {line.variant}: {line.note}" for line in wrong))


def summary(lines: list[Line], mode: Mode) -> str:
    """Of each batch: each partition by ``auto``, one GPU, the best peer, and what the issue is: whole over cut."""
    rows = []
    for batch in dict.fromkeys(line.batch for line in lines):
        times = {line.variant: line.median(mode) for line in lines if line.batch == batch}
        mine = [times[_name(partition)] for partition in PARTITIONS]
        alone, peer = best(lines, batch, "one GPU", mode), best(lines, batch, "peer", mode)
        chosen, known = mine[-1], [time for time in mine[:-1] if time is not None]
        rows.append(
            [
                batch, *map(_us, mine), _us(alone and alone[1]), *((_us(peer[1]), peer[0]) if peer else ("", "")),
                _ratio(chosen, mine[0]), _ratio(chosen, min(known, default=None)), _ratio(chosen, peer and peer[1]),
                _ratio(chosen, alone and alone[1]),
            ]
        )  # fmt: skip
    ratios = [f"auto / {other}" for other in ("zigzag", "best of both", "best peer", "one GPU")]
    title = "As CUDA graphs" if mode == "graph" else "Eager"
    return f"## {title}, us\n\n{markdown(['batch', *PARTITIONS, 'one GPU', 'best peer', 'which', *ratios], rows)}"


def _us(time: float | None) -> str:
    return "" if time is None else f"{time:,.1f}"


def _ratio(one: float | None, other: float | None) -> str:
    return "" if one is None or other is None else f"{one / other:.3f}"


def write(path: Path, num_ranks: int, lines: list[Line], left_out: list[str]) -> None:
    """``path.md`` and ``path.csv``."""
    from gpu_report import write_gpu_report

    notes = (
        f"bf16, {HEADS.query} query and {HEADS.kv} key/value heads, D = {HEADS.dim}, one rank a GPU. One layer's attention, in CUDA graphs "
        f"and eager runs of up to {MOST_LAYERS} layers; the slowest rank counts; variants interleaved in random order; medians. Strategy, "
        "transport and backend are those that auto takes, but where collectives are named. Prefixes lie in order on every rank. One GPU: "
        "the whole batch in one launch on each rank's device. Each result was compared with cpattn's over collectives before it was timed."
    )
    if left_out:
        notes += f" Not timed, as the time was up: {', '.join(left_out)}."
    notes = "\n\n".join([notes, *(summary(lines, mode) for mode in MODES), "## Everything"])
    rows = [line.cells(lines) for line in lines]
    title = f"Requests cut and left whole, {num_ranks} GPUs"
    write_gpu_report(path.name, title, HEADER, rows, notes, path.parent, prints=False)


if __name__ == "__main__":
    main()
