"""A small serving engine on cpattn: continuous batching, chunked prefill, prefix reuse and decode over several processes.

python examples/mini_engine.py [--cp 4] [--replicated | --sharded] [--model qwen3]

It serves requests that arrive one after another with a transformers model of 8M random parameters in float32, its KV
cache in pages, and compares every generated token with the model's own single-process ``generate``, and its logits. The
exit code is 1 if any differs. In one step a kernel raises on one rank; all ranks take that step back and plan again.
Needs transformers (``pip install 'cpattn[transformers]'``); no GPU, and no download. Where there are several GPUs it takes
them, over NCCL, or as many as --cp says; else it runs two processes on the CPU.

What an engine does with cpattn is in ``engine/rank.py`` (the loop: plan, metadata, shard, forward, unshard),
``engine/model.py`` (attention) and ``engine/scheduler.py`` (the pool of pages).
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec

import torch
from engine.rank import EngineOptions, Expected, Report, Served, generate, serve
from engine.shape import ModelShape
from engine.workload import make_requests

from cpattn.testing import ProcessRanks

PAGE_SIZE = 16
# A lost key in a long context seldom changes a token, but it does change logits, by far more than rounding would: the
# engine's may differ from generate's by so many times what the model's own do between two ways of computing them.
ALLOWED_ERROR = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--cp", type=int, default=max(2, gpus), help="processes")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--replicated", action="store_true", help="only with the whole cache on every rank")
    cache.add_argument("--sharded", action="store_true", help="only with each rank's own tokens on it")
    parser.add_argument("--model", choices=["qwen3", "llama"], default="qwen3")
    parser.add_argument("--new-tokens", type=int, default=24, help="of the longest answers")
    parser.add_argument("--budget", type=int, default=128, help="new tokens of a step, at most")
    parser.add_argument("--pool-tokens", type=int, default=800, help="that the pages hold, over all ranks where they are sharded")
    parser.add_argument("--fail-step", type=int, default=5, help="from which on a kernel is in use that raises once")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if find_spec("transformers") is None:
        sys.exit("this needs transformers: pip install 'cpattn[transformers]'")
    shape = ModelShape(kind=arguments.model)
    requests = make_requests(arguments.seed, shape.vocab_size, arguments.new_tokens)
    good = True
    known: dict[tuple[tuple[int, ...], int], Expected] = {}
    on_gpus = gpus >= arguments.cp
    device, transport = ("cuda", "nccl") if on_gpus else ("cpu", "gloo")
    with ProcessRanks(arguments.cp, timeout=300, transport=transport) as ranks:
        for sharded in (False, True):
            if (arguments.replicated and sharded) or (arguments.sharded and not sharded):
                continue
            pages = arguments.pool_tokens // PAGE_SIZE
            if sharded:
                # Each rank has its part, and of every request a part-filled page of its own.
                pages = pages // arguments.cp + len(requests) // 2
            options = EngineOptions(shape, arguments.seed, arguments.budget, PAGE_SIZE, pages, sharded, arguments.fail_step, device)
            start = time.perf_counter()
            reports: list[Report] = ranks.run(serve, options, requests)
            seconds = time.perf_counter() - start
            served = reports[0].served
            asked = [(tuple(one.prompt), len(one.answer)) for one in served]
            # Both kinds of cache are asked for the same answers, unless one is wrong and another prompt goes on from it.
            new = [each for each in asked if each not in known]
            for answers in ranks.run(generate, options, new):
                known |= {new[number]: answer for number, answer in answers.items()}
            expected = [known[each] for each in asked]
            print(f"\n{'sharded' if sharded else 'replicated'} cache, {describe(reports[0], options, arguments.cp)}, {seconds:.1f} s\n")
            good &= print_table(served, expected)
            if any(report.served != served for report in reports):
                print("the ranks disagree")
                good = False
    return 0 if good else 1


def describe(report: Report, options: EngineOptions, cp_size: int) -> str:
    return (
        f"{cp_size} processes on {options.device}: {report.steps} steps of up to {options.budget} tokens, "
        f"{report.mixed_steps} of them mixed, and {report.failed_steps} failed and planned again; "
        f"{options.num_pages} pages of {options.page_size} tokens a rank ({report.cache_bytes / 1e6:.1f} MB): {report.evictions} finished "
        f"requests evicted, work waiting for pages in {report.waits} steps, {sum(one.preempted for one in report.served)} preempted"
    )


def print_table(served: list[Served], expected: list[Expected]) -> bool:
    """Prints a line for each request, and how far logits are apart; whether all is as it should be."""
    widths = (15, 6, 20, 6, 9, 6)
    header = ("request", "prompt", "prefix reused", "chunks", "preempted", "tokens")
    print("  ".join(f"{text:<{width}}" for text, width in zip(header, widths, strict=True)), " equal")
    for one, theirs in zip(served, expected, strict=True):
        reused = f"{one.reused[1]} of {one.reused[0]}" if one.reused else "-"
        cells = (one.name, len(one.prompt), reused, one.chunks, one.preempted or "-", len(one.answer))
        equal = "yes" if one.answer == theirs.answer else "NO"
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)), f" {equal}")
    pairs = [pair for one, theirs in zip(served, expected, strict=True) for pair in zip(one.answer, theirs.answer, strict=True)]
    right = sum(mine == theirs for mine, theirs in pairs)
    error = max(distance(one.top, theirs.top) for one, theirs in zip(served, expected, strict=True))
    own = max(distance(theirs.top_in_one_pass, theirs.top) for theirs in expected)
    gap = min(first - second for theirs in expected for first, second in theirs.top)
    print(f"\n{right} of {len(pairs)} tokens equal those of generate. Its logits and the engine's differ by {error:.1e} at most, as the")
    print(f"model's own do by {own:.1e} when computed in one pass; the closest two largest of any token are {gap:.1e} apart.")
    return right == len(pairs) and error <= ALLOWED_ERROR * own


def distance(mine: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> float:
    """The largest difference of two lists of logits."""
    return max(abs(a - b) for pair, other in zip(mine, theirs, strict=True) for a, b in zip(pair, other, strict=True))


if __name__ == "__main__":
    sys.exit(main())
