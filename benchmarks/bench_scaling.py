"""One call of cp_attention on one GPU and on several of a host, in one run: every strategy, transport and partition, and ``auto``; and
the setting that MagiAttention publishes figures for.

PYTHONPATH=. python benchmarks/bench_scaling.py [--ranks 1 2 4] [--seconds 240] [--batches NAME ...] [--results FOLDER] [--name NAME]

Ranks are as many as the largest group; smaller groups make their calls side by side, and the slowest of all ranks counts. Batches share the
time by how long they take, and what does not fit is left out with a line that says so. --check tries everything on a CPU over small
batches, in seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from peers.batches import ragged
from peers.bench import MOST_LAYERS, Bench, Task
from peers.report import MODES
from peers.work import Heads
from scaling.documents import in_words, packed_documents
from scaling.published import HEADER, beside_published, draw_published
from scaling.results import EVERYTHING, SUMMARY, Results
from scaling.ways import USUAL_FLOPS, Case, Way, expected_seconds, ways_of

import cpattn
from cpattn.costs.known_machine import machine_of

RESULTS = Path(__file__).parent / "results"
HEADS, PUBLISHED_HEADS, CHECKED_HEADS = Heads(32, 8, 128), Heads(64, 8, 128), Heads(8, 4, 16)
PACKS = {f"64k of documents, pack {seed}, 64/8 heads": packed_documents(65536, seed) for seed in (1, 2, 3)}
CAUSAL = "64k, 64/8 heads"


def _one(tokens: int) -> Case:
    # Whole cuts a lone request as zigzag does.
    return Case([(0, tokens)], HEADS, with_auto=("contiguous",), sends_queries=tokens <= 32768)


def _published(batch: list[tuple[int, int]], partitions: tuple[str, ...]) -> Case:
    return Case(batch, PUBLISHED_HEADS, partitions, all_sizes=False, sends_queries=False)


# The longest come late, for what others have left over, and the sharded cache after them: memory that its ring shares stays, and would be
# missing there.
CASES = {
    "1 x 8k": _one(8192),
    "1 x 32k": _one(32768),
    "1 x 128k": _one(131072),
    "64 ragged ~0.9k": Case(ragged(with_prefix=False), HEADS, partitions=("zigzag", "whole"), with_auto=("contiguous",)),
    CAUSAL: _published([(0, 65536)], ("zigzag",)),
    **{name: _published(pack, ("zigzag", "whole")) for name, pack in PACKS.items()},
    "1 x 512k": _one(524288),
    "1 x 1M": _one(1048576),
    "256 x (8k + 1), sharded": Case([(8192, 1)] * 256, HEADS, sharded=True),
}
CHECKED_CASES = {
    "1 x 128": Case([(0, 128)], CHECKED_HEADS, with_auto=("contiguous",)),
    "ragged": Case([(0, 40), (0, 8), (0, 64), (0, 17)], CHECKED_HEADS, partitions=("zigzag", "whole")),
    "sharded": Case([(70, 1), (129, 1), (3, 1)], CHECKED_HEADS, sharded=True),
    "documents": Case(packed_documents(256, seed=1), CHECKED_HEADS, partitions=("zigzag", "whole"), all_sizes=False),
}
# Seconds that a batch takes beside its calls, and how many times the whole batch on one GPU those take.
BATCH_SECONDS, CALLS = 10.0, 6.0
# Above that a call takes so long that a graph of it saves nothing, and the graphs of all ways hold more memory than a card has.
LONGEST_GRAPH = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", help="sizes of the groups, divisors of the largest; 1 2 4 if not given")
    parser.add_argument("--rounds", type=int, default=9, help="at most; long batches get fewer")
    parser.add_argument("--batches", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=240, help="of the whole run, about")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the results; scaling_4_gpus for 4 ranks")
    parser.add_argument("--check", action="store_true", help="on a CPU, over small batches")
    options = parser.parse_args()
    sizes = sorted(set(options.ranks or ([1, 2] if options.check else [1, 2, 4])))
    if sizes[0] < 1 or any(sizes[-1] % size for size in sizes):
        parser.error(f"--ranks {' '.join(map(str, sizes))}: groups stand side by side, so the largest is a multiple of each")
    if options.check:
        check(sizes)
    else:
        path = options.results / (options.name or f"scaling_{sizes[-1]}_gpus")
        measure(path, sizes, {name: CASES[name] for name in options.batches}, options.rounds, options.seconds)


def measure(path: Path, sizes: list[int], cases: dict[str, Case], rounds: int, seconds: float) -> None:
    """Times the batches one after another, and writes what is known after each."""
    end = time.monotonic() + seconds
    results = Results(cases, _ways(cases, sizes, "cuda"), [], _machine())
    bench = Bench("cuda", sizes[-1], rounds, end, least_rounds=1, longest_graph=LONGEST_GRAPH, lines=results.lines)
    shares = {name: BATCH_SECONDS + CALLS * case.flops / USUAL_FLOPS for name, case in cases.items()}
    waiting = dict(cases)
    left_out: list[str] = []
    try:
        bench.wait()
        for name, case in cases.items():
            left = end - time.monotonic()
            share = left * shares[name] / sum(shares[other] for other in waiting)
            del waiting[name]
            if left <= 0:
                left_out.append(name)
                continue
            before = len(bench.lines)
            bench.measure(_task(name, case, results.ways[name], share, left))
            for line in bench.lines[before:]:
                print(line, flush=True)
            write(path, results, sizes, [*left_out, *waiting], prints=False)
        write(path, results, sizes, left_out, prints=True)
        draw(path, results, sizes)
    finally:
        bench.close()


def check(sizes: list[int]) -> None:
    """Everything but the GPU, over gloo; exits with what is wrong where a result is, or where a way was not compared that should be."""
    results = Results(CHECKED_CASES, _ways(CHECKED_CASES, sizes, "cpu"), [], cpattn.MACHINES["h100-nvlink"])
    bench = Bench("cpu", sizes[-1], 1, time.monotonic() + 60, lines=results.lines)
    try:
        for name, case in CHECKED_CASES.items():
            bench.measure(_task(name, case, results.ways[name], share=60.0, left=60.0))
    finally:
        bench.close()
    for line in results.lines:
        print(line)
    for row in [SUMMARY, *results.summary()]:
        print(" | ".join(row))
    wrong = [line for line in results.lines if line.note or (line.error is None and line.kind != "no transfer")]
    missing = set(cpattn.STRATEGIES) - {results.way(line).strategy for line in results.lines}
    if wrong or missing:
        sys.exit("\n".join([*(f"{line.batch}, {line.variant}: {line.note or 'not compared'}" for line in wrong), *missing]))


def _ways(cases: dict[str, Case], sizes: list[int], device_type: str) -> dict[str, dict[str, Way]]:
    return {name: {str(way): way for way in ways_of(case, sizes, device_type)} for name, case in cases.items()}


def _task(name: str, case: Case, ways: dict[str, Way], share: float, left: float) -> Task:
    """Of its share of the time that is left, 40% are for the first calls, or more where kernels have to be compiled, and a quarter for
    rounds beyond the first."""
    variants = {variant: way.variant(case) for variant, way in ways.items()}
    return Task(name, case.batch, case.heads, variants, share / 4, partial(expected_seconds, case), max(0.4 * share, left / 4))


def _machine() -> cpattn.Machine:
    """Whose constants the estimates are made by."""
    return machine_of(torch.device("cuda"))


def write(path: Path, results: Results, sizes: list[int], left_out: list[str], prints: bool) -> None:
    """Three tables: what ``auto`` does, every way, and, where it was timed, the published setting."""
    from gpu_report import write_gpu_report

    gpus = sizes[-1]
    left_over = _left_over(results, left_out)
    title = f"cp_attention from one GPU to {gpus}"
    notes = (
        f"bf16, {HEADS.query} query and {HEADS.kv} key/value heads, D = {HEADS.dim}, unless the batch says otherwise; one rank a GPU, "
        f"groups of {', '.join(map(str, sizes))} ranks, smaller ones side by side. One layer's call, in CUDA graphs and eager runs of up "
        f"to {MOST_LAYERS} layers; the slowest of all ranks counts; variants interleaved in random order; medians. Calls above "
        f"{LONGEST_GRAPH:g} s on a number of GPUs are not captured. Each result was compared with cpattn's over collectives before it was "
        "timed. Efficiency: the fastest time on one GPU over n times that on n. Exposed: over the same call with local copies in place of "
        "transfers. TFLOP/s a GPU: 4 x pairs x query heads x D, pairs of a query and a key that it sees, over time and GPUs. Memory: the "
        "most of any rank beside the batch's tensors, by torch.cuda.max_memory_allocated; memory that ranks share is not in it. Launch "
        "alone: a rank's attention on keys in order, by the fastest backend. Best fixed: over the same partition; strategies that send "
        "queries were not tried above 32k tokens. Estimates: "
        f"cpattn.estimate for {results.machine.name}, of a card that has rested as it has here; of auto, for what it chose.{left_over}"
    )
    write_gpu_report(path.name, title, SUMMARY, results.summary(), notes, path.parent, prints)
    write_gpu_report(f"{path.name}_all", f"{title}: every way", EVERYTHING, results.everything(), notes, path.parent, prints=False)
    if not {CAUSAL, *PACKS} & set(results.cases):
        return
    rows = beside_published(results, [[CAUSAL], list(PACKS)], gpus)
    published = (
        f"bf16, 64k tokens in all, {PUBLISHED_HEADS.query} query and {PUBLISHED_HEADS.kv} key/value heads, D = {PUBLISHED_HEADS.dim}, "
        f"forward. Varlen causal: {len(PACKS)} packs of {in_words(list(PACKS.values()))}, drawn by the counts and rules of MagiAttention's "
        "benchmark (benchmarks/scaling/documents.py says what differs); all their work over all their time. Of the launch alone: its time, "
        "by the fastest backend and partition in the same run, over that of the call. Cited rows were not measured here, but read from "
        "MagiAttention's charts for 8 x H100 (docs/source/blog/cp_benchmark.md, commit 2c6413571c2c); its packs are others."
        f"{left_over}"
    )
    write_gpu_report(f"{path.name}_published", f"The published setting, {gpus} GPUs", HEADER, rows, published, path.parent, prints)


def _left_over(results: Results, left_out: list[str]) -> str:
    """What the tables do not have, in words."""
    said = [f" Not timed, as the time was up: {', '.join(left_out)}."] if left_out else []
    said += [f" {line.batch}: {line.note}." for line in results.lines if line.variant not in results.ways[line.batch]]
    return "".join(said)


def draw(path: Path, results: Results, sizes: list[int]) -> None:
    """Efficiency by length, and the published setting."""
    from gpu_report import draw_lines

    curves: dict[str, dict[int, float]] = {}
    for name, case in results.cases.items():
        for line in results.of(name, strategy="auto", transport="auto", partition="zigzag"):
            for mode in MODES:
                efficiency = results.efficiency(line, mode)
                if len(case.batch) == 1 and efficiency is not None and results.way(line).ranks > 1:
                    curves.setdefault(f"{results.way(line).ranks} GPUs, {mode}", {})[case.batch[0][1]] = efficiency
    if curves:
        axes = "tokens of one request", "time on one GPU over n times that on n"
        draw_lines(path.with_name(f"{path.name}_efficiency.png"), "Efficiency of cpattn auto", axes, dict(sorted(curves.items())))
    if not {CAUSAL, *PACKS} & set(results.cases):
        return
    draw_published(path.with_name(f"{path.name}_published"))


if __name__ == "__main__":
    main()
