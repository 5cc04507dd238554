"""Time to the first token and tokens a second of nano-vllm on one GPU, with its own tensor parallelism, and with cpattn.

python benchmarks/bench_nano_vllm.py
python benchmarks/bench_nano_vllm.py --draw  # anew, from the table in results/, where there is matplotlib

The engines are those of ``examples/nano_vllm.py``, which says what they need: a Qwen3 in the shape of Qwen3-0.6B with random weights.
All are there at once, each in processes of its own, and take turns with every prompt, as a host is not equally fast for minutes. A kind
of prompt runs once before it counts. Without GPUs it is a trial with a small model, and writes nothing.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from first_token import FIRST, MIX, draw
from gpu_report import RESULTS, write_gpu_report
from nano_engine.random_model import SMALL, Shape, write_model
from nano_engine.serve import Answer, Request, random_tokens, serve
from nano_engine.stand_ins import ON_CPU, attention_in_words
from nano_vllm import SPLIT_FROM, running

NEW_TOKENS = 32
REPEATS, LONG_REPEATS, MIXES = (2, 2, 1) if ON_CPU else (9, 5, 3)
# Of a GPU's memory, for the weights and pages of each engine; what a prefill takes comes on top.
MEMORY = 0.2
PER_SECOND = 20.0
ONE, TP, CP, SPLIT = "one GPU", "tp", "cp", "cp, all split"


class Measured(NamedTuple):
    """Attributes:
    first: milliseconds to the first token, the median.
    slow: milliseconds of the slowest repeat, of a mix of the slowest tenth.
    speed: tokens a second after the first one: of a prompt alone its own, of a mix those of all requests from begin to end.
    """

    first: float
    slow: float
    speed: float


def mixed_requests(count: int, longest: int, vocab: int) -> list[Request]:
    """As in production: most prompts are short and few are long, they come at random, and half begin with one system prompt."""
    rng = random.Random(0)
    system = random_tokens(1, 1024, vocab)
    requests = []
    arrival = 0.0
    for number in range(count):
        length = min(longest, int(rng.lognormvariate(7.6, 1.2)) + 16)
        prompt = random_tokens(100 + number, length, vocab)
        if number % 2 and length > len(system):
            prompt[: len(system)] = system
        requests.append(Request(prompt, rng.randint(32, 128), arrival))
        arrival += rng.expovariate(PER_SECOND)
    return requests


class EngineProcess:
    """An engine in a process of its own, and those of its other ranks.

    Args:
        kind, ranks, folder, options: see :func:`nano_vllm.running`.
    """

    def __init__(self, kind: str, ranks: int, folder: Path, options: dict[str, Any]) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, kind, ranks, folder, options))
        self._process.start()
        theirs.close()
        self._answer()

    def serve(self, requests: Sequence[Request], split_from: int) -> list[Answer]:
        """Prefills of so many tokens are split, if it is an engine that does."""
        self._pipe.send((list(requests), split_from))
        answers: list[Answer] = self._answer()
        return answers

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("an engine's process has ended; what it printed says why") from None

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def _run(pipe: Connection, kind: str, ranks: int, folder: Path, options: dict[str, Any]) -> None:
    """Of the engine's process: until nobody asks any more."""
    with running(kind, ranks, folder, **options) as engine:
        pipe.send(None)
        split_before = None
        while True:
            try:
                requests, split_from = pipe.recv()
            except EOFError:
                return
            if kind == "cp" and split_from != split_before:
                engine.model_runner.call("set_split_from", split_from)
                split_before = split_from
            pipe.send(serve(engine, requests))


class Served(NamedTuple):
    """An engine, and which prefills it splits.

    Attributes:
        longest: tokens of a prompt up to which it is measured.
    """

    engine: EngineProcess
    split_from: int
    longest: int

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        return self.engine.serve(requests, self.split_from)


def measure_alone(served: dict[str, Served], length: int, vocab: int) -> dict[str, Measured]:
    """Prompts of one length, one at a time, by each in turn."""
    answers: dict[str, list[Answer]] = defaultdict(list)
    for name in served:
        served[name]([Request(random_tokens(length, length, vocab), new_tokens=2)])
    for n in range(1, 1 + (LONG_REPEATS if length > 32768 else REPEATS)):
        request = Request(random_tokens(length + n, length, vocab), NEW_TOKENS)
        for name in random.Random(n).sample(list(served), len(served)):
            answers[name] += served[name]([request])
    return {name: _of_prompts(answers[name]) for name in served}


def _of_prompts(answers: list[Answer]) -> Measured:
    first = [1e3 * answer.first for answer in answers]
    return Measured(median(first), max(first), median((NEW_TOKENS - 1) / (answer.last - answer.first) for answer in answers))


def measure_mix(served: dict[str, Served], requests: Sequence[Request]) -> dict[str, Measured]:
    """Requests that come by themselves, to each in turn."""
    found: dict[str, list[Measured]] = defaultdict(list)
    for name in served:
        served[name]([request._replace(new_tokens=2) for request in requests])
    for n in range(MIXES):
        for name in random.Random(n).sample(list(served), len(served)):
            found[name].append(_of_mix(requests, served[name](requests)))
    return {name: Measured(*map(median, zip(*found[name], strict=True))) for name in served}


def _of_mix(requests: Sequence[Request], answers: Sequence[Answer]) -> Measured:
    first = sorted(1e3 * answer.first for answer in answers)
    seconds = max(request.arrival + answer.last for request, answer in zip(requests, answers, strict=True))
    return Measured(median(first), first[-1 - len(first) // 10], sum(len(answer.tokens) for answer in answers) / seconds)


def measure(served: dict[str, Served], lengths: Sequence[int], requests: Sequence[Request], vocab: int) -> dict[str, dict[str, Measured]]:
    """By engine, and by prompt."""
    found: dict[str, dict[str, Measured]] = {name: {} for name in served}
    kinds = {in_words(length): (length, partial(measure_alone, length=length, vocab=vocab)) for length in lengths}
    if requests:
        kinds[MIX] = 0, partial(measure_mix, requests=requests)
    for prompt, (length, measure_kind) in kinds.items():
        for name, measured in measure_kind({name: each for name, each in served.items() if length <= each.longest}).items():
            found[name][prompt] = measured
            first, slow, speed = measured
            times = f"{first:9.2f} ms to the first token, {slow:9.2f} at most or in one of ten"
            print(f"{name:>14} {prompt:>6}: {times}; {speed:8.1f} tokens/s", flush=True)
    return found


def in_words(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def table(found: dict[str, dict[str, Measured]], layers: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows, by prompt."""
    header = ["prompt", *(f"{name}{FIRST}" for name in found), *(f"{name}, slow, ms" for name in found)]
    header += [f"{name}, tokens/s" for name in found]
    ratios = [(CP, TP), (CP, ONE), (SPLIT, ONE)]
    ratios = [pair for pair in ratios if all(name in found for name in pair)]
    header += [f"{mine} / {other}, first token" for mine, other in ratios]
    over = CP in found and ONE in found
    header += ["cp over 1.02 of one GPU, us a layer"] if over else []
    rows = []
    for prompt in next(iter(found.values())):
        of = {name: measured.get(prompt) for name, measured in found.items()}
        cells = [prompt]
        for field in Measured._fields:
            cells += [f"{getattr(one, field):,.1f}" if one else "" for one in of.values()]
        for mine, other in ratios:
            a, b = of[mine], of[other]
            cells.append(f"{a.first / b.first:.3f}" if a and b else "")
        if over:
            a, b = of[CP], of[ONE]
            cells.append(f"{1e3 * (a.first - 1.02 * b.first) / layers:,.1f}" if a and b else "")
        rows.append(cells)
    return header, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=["one", "tp", "cp"], default=["one", "tp", "cp"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[300, 700] if ON_CPU else [1024, 4096, 8192, 16384, 65536])
    parser.add_argument("--mix", type=int, default=2 if ON_CPU else 48, help="requests of the mix; 0 for none")
    parser.add_argument("--layers", type=int, help="of the model, in place of its own number")
    parser.add_argument("--split-from", type=int, default=SPLIT_FROM, help="tokens of a prefill from which on cp splits it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="only the picture")
    arguments = parser.parse_args()
    name = f"nano_vllm_{arguments.ranks}_gpus"
    if arguments.draw:
        draw(arguments.out / f"{name}.csv")
        return
    shape = SMALL if ON_CPU else Shape()
    if arguments.layers:
        shape = shape._replace(layers=arguments.layers)
    longest = max(arguments.lengths)
    requests = mixed_requests(arguments.mix, longest // 2, shape.vocab)
    most = longest + 256
    options = {"max_model_len": most, "max_num_batched_tokens": most, "max_num_seqs": 64, "gpu_memory_utilization": MEMORY}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as engines:
        write_model(Path(folder), shape, max_length=most)
        served: dict[str, Served] = {}
        for kind in arguments.engines:
            engine = engines.enter_context(EngineProcess(kind, arguments.ranks, Path(folder), options))
            served[{"one": ONE, "tp": TP, "cp": CP}[kind]] = Served(engine, arguments.split_from, longest)
            if kind == "cp":
                served[SPLIT] = Served(engine, 1, arguments.split_from - 1)
        found = measure(served, arguments.lengths, requests, shape.vocab)
    header, rows = table(found, shape.layers)
    if ON_CPU:
        print("\n".join(" | ".join(row) for row in (header, *rows)))
        return
    notes = (
        f"nano-vllm-fork 20260210, a Qwen3 of {shape.layers} layers, width {shape.width}, {shape.heads} query and {shape.kv_heads} "
        f"key/value heads of {shape.head_dim}, {shape.vocab:,} tokens, random weights in {shape.dtype}; {arguments.ranks} ranks, "
        f"a GPU each. Its own attention is {attention_in_words()}; decodes run in its CUDA graphs. All engines are there at once, and take "
        f"turns, in random order. Single prompts one at a time, with {NEW_TOKENS} new tokens: medians of {REPEATS}, above 32k of "
        f"{LONG_REPEATS}. The mix, {MIXES} times: {len(requests)} prompts of "
        f"{min(len(r.prompt) for r in requests)} to {max(len(r.prompt) for r in requests):,} tokens, half of them with one beginning "
        f"of 1,024, that come at random, {PER_SECOND:.0f} a second, with 32 to 128 new tokens. Slow: the slowest repeat, of the mix "
        f"the slowest tenth. cp splits a prefill from {arguments.split_from:,} tokens on; decodes, and what is shorter, every rank "
        f"computes for itself. All split: every prefill. Tokens/s: after the first one; of the mix, of all requests from begin to end."
    )
    write_gpu_report(name, f"nano-vllm, {arguments.ranks} GPUs", header, rows, notes, arguments.out)
    draw(arguments.out / f"{name}.csv")


if __name__ == "__main__":
    main()
