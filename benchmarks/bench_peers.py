"""cp_attention beside its peers on real GPUs, in one run: its automatic and its fixed choices, ring-flash-attn, torch's
context_parallel, Ulysses as USP has it and SGLang's form; a rank's launch alone; and the whole batch on one GPU.

PYTHONPATH=.:FOLDER python benchmarks/bench_peers.py [--ranks 2] [--results FOLDER] [--seconds 210]

FOLDER is where ring-flash-attn was unpacked, if it is not installed; a peer that is not there, or fails, gets a line that says so.
--check tries everything on a CPU over small batches, in seconds. --draw draws results that are there. Neither needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from peers import ours, report
from peers.batches import ragged
from peers.bench import MOST_LAYERS, WRONG, Bench, Task
from peers.variants import STRATEGIES, all_variants
from peers.work import Heads

RESULTS = Path(__file__).parent / "results"
HEADS, CHECKED_HEADS = Heads(32, 8, 128), Heads(8, 4, 16)

BATCHES = {
    "1 x 1k": [(0, 1024)],
    "1 x 2k": [(0, 2048)],
    "1 x 8k": [(0, 8192)],
    "8 x 8k": [(0, 8192)] * 8,
    "8 x (8k + 2k)": [(8192, 2048)] * 8,
    "1 x 32k": [(0, 32768)],
    "64 ragged ~0.9k": ragged(with_prefix=False),
    "64 ragged + ~4k prefix": ragged(with_prefix=True),
    "1 x (8k + 1k)": [(8192, 1024)],
    "1 x (120k + 2k)": [(122880, 2048)],
    "1 x 128k": [(0, 131072)],
    "1 x 4k": [(0, 4096)],
    "1 x 16k": [(0, 16384)],
    "1 x 64k": [(0, 65536)],
    "1 x 256k": [(0, 262144)],
}
# There for the speed-up by length alone.
SPEEDUP_ONLY = {"1 x 4k", "1 x 16k", "1 x 64k", "1 x 256k"}
CHECKED_BATCHES = {
    "1 x 128": [(0, 128)],
    "3 x (16 + 32)": [(16, 32)] * 3,
    "ragged": [(0, 40), (0, 8), (0, 64)],
    "uneven, a prefix": [(3, 17), (0, 9)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="at most; long batches get fewer")
    parser.add_argument("--batches", nargs="+", default=list(BATCHES), choices=list(BATCHES), metavar="NAME")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--seconds", type=float, default=210, help="after which no further batch is begun")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="on a CPU, over small batches")
    parser.add_argument("--draw", action="store_true", help="only draw the results that are there")
    options = parser.parse_args()
    path = options.results / f"peers_{options.ranks}_gpus"
    strategies = tuple(options.strategies)
    if options.check:
        check(options.ranks, strategies)
    else:
        if not options.draw:
            measure(path, options.ranks, options.batches, options.rounds, strategies, options.seconds)
        variants = all_variants("cuda", ours.ON_GPUS, strategies)
        report.draw(path, report.read(path), BATCHES, lambda name: variants[name].beside if name in variants else "")


def measure(path: Path, num_ranks: int, names: list[str], rounds: int, strategies: tuple[str, ...], seconds: float) -> None:
    """Times the batches one after another, and writes what is known after each."""
    from gpu_timing import gpu_machine

    bench = Bench("cuda", num_ranks, rounds, time.monotonic() + seconds)
    variants = all_variants("cuda", ours.backends_here("cuda"), strategies)
    for_speedup = {variant: made for variant, made in variants.items() if made.is_of_speedup}
    machine = gpu_machine()

    def task(name: str) -> Task:
        return Task(name, BATCHES[name], HEADS, for_speedup if name in SPEEDUP_ONLY else variants)

    try:
        bench.measure_all(names, task, lambda left: report.write(path, head(num_ranks, machine, left), bench.lines, BATCHES))
    finally:
        bench.close()
    print(report.summaries(bench.lines, BATCHES), flush=True)


def head(num_ranks: int, machine: str, left_out: list[str]) -> str:
    """What the figures are of."""
    notes = (
        f"bf16, {HEADS.query} query and {HEADS.kv} key/value heads, D = {HEADS.dim}, one rank a GPU. One layer's attention, in CUDA graphs "
        f"and eager runs of up to {MOST_LAYERS} layers; the slowest rank counts; variants interleaved in random order; medians. "
        "A: the fastest launch of this rank alone, on keys that are in order already. Requests are cut by zigzag, but for partition auto: "
        "what auto takes where the partition is chosen, too. No transfer: what others would send is a local "
        "copy. Exposed: the time over that of the same strategy and backend without transfers; of a peer, over the fastest without "
        "transfers. One GPU: the whole batch in one launch on each rank's device. Each result was compared with cpattn's over "
        "collectives before it was timed; the relative error is that of all ranks together, and of the graph as well where there is one."
    )
    skipped = f"\n\nLeft out, as the time was up: {', '.join(left_out)}." if left_out else ""
    command = " ".join(["python", *sys.argv])
    return f"# cp_attention beside its peers, {num_ranks} GPUs\n\n`{command}`\n\n{machine}; {ring_version()}\n\n{notes}{skipped}"


def ring_version() -> str:
    """Of ring-flash-attn; the other peers are torch's, or written here."""
    try:
        return f"ring-flash-attn {version('ring-flash-attn')}"
    except PackageNotFoundError:
        return "ring-flash-attn not installed"


def check(num_ranks: int, strategies: tuple[str, ...]) -> None:
    """Everything but the GPU, over gloo, with plain torch in place of FlashAttention-4; raises where a result is wrong."""
    bench = Bench("cpu", num_ranks, 1, time.monotonic() + 60)
    try:
        for name, batch in CHECKED_BATCHES.items():
            bench.measure(Task(name, batch, CHECKED_HEADS, all_variants("cpu", ("cpu",), strategies), seconds=1.0))
    finally:
        bench.close()
    for line in bench.lines:
        print(line)
    wrong = [line for line in bench.lines if line.note.startswith(WRONG)]
    exact = {line.variant for line in bench.lines if line.kind == "peer" and line.error is not None} - {line.variant for line in wrong}
    if wrong or not exact >= {"SGLang's form", "Ulysses as USP"}:
        sys.exit(f"not exact: {', '.join(line.variant for line in wrong) or 'a peer that is written here was not compared'}")


if __name__ == "__main__":
    main()
