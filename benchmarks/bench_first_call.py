"""The host's time of a new batch: its first call, beside later ones, and what puts it into a bucket; as on a GPU but without one.

python benchmarks/bench_first_call.py --tree NAME [--json FILE]
python benchmarks/bench_first_call.py --report FILE FILE ... [--name first_call_cpu] [--results FOLDER]

To compare trees, run each in turn with PYTHONPATH=TREE, and then report their files side by side. Tensors are on a device that is stood
in for (:mod:`cuda_stand_in`): kernels are launched into nothing, and the driver's time is not there. Counts do not depend on the machine.
Times are of this thread, so that others do not count, without what stands for the GPU; they are only to be compared with each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from cuda_stand_in import StandIn, cuda_stand_in, transport
from timing import RESULTS, machine

import cpattn

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 16, 8, 128, 256
PACKAGE = str(Path(cpattn.__file__).parent)
BATCHES, WARM_UPS, LATER = 24, 4, 3


class Case(NamedTuple):
    """New batches of one kind."""

    requests: int
    cache: str
    cp_size: int
    prefixes: bool = False
    over: str = "peer_memory"

    def __str__(self) -> str:
        prefixes = " with prefixes" * self.prefixes
        over = " over collectives" * (self.over == "collectives")
        return f"{self.requests} requests, {self.cache}{prefixes}, cp {self.cp_size}{over}"


CASES = [
    Case(1, "pages", 2),
    Case(1, "pages", 4, prefixes=True),
    Case(8, "pages", 2),
    Case(8, "pages", 4, prefixes=True),
    Case(64, "pages", 2, prefixes=True),
    Case(256, "pages", 4, prefixes=True),
    Case(1, "packed", 2, prefixes=True),
    Case(64, "packed", 4, prefixes=True),
    Case(8, "packed", 2, over="collectives"),
    Case(1, "striped pages", 2, prefixes=True),
    Case(64, "striped pages", 2, prefixes=True),
    Case(64, "striped pages", 2, prefixes=True, over="collectives"),
]
# Steps of a decoding engine, whose graphs are replayed: what a step does is to put its batch into the bucket.
STEPS = [
    Case(64, "pages", 2, prefixes=True),
    Case(64, "striped pages", 2, prefixes=True, over="collectives"),
    Case(256, "striped pages", 4, prefixes=True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", default="here", help="what this tree is called")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, nargs="+")
    parser.add_argument("--name", default="first_call_cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.report:
        text = report([json.loads(file.read_text()) for file in options.report])
        print(text)
        (options.results / f"{options.name}.md").write_text(text)
        return
    found: dict[str, Any] = {}
    for case in CASES:
        found[str(case)] = measured(case)
        print(case, found[str(case)], flush=True)
    steps: dict[str, Any] = {}
    for case in STEPS:
        steps[str(case)] = stepped(case)
        print(case, steps[str(case)], flush=True)
    if options.json:
        options.json.write_text(json.dumps({"tree": options.tree, "machine": machine(), "cases": found, "steps": steps}, indent=1))


def measured(case: Case) -> dict[str, Any]:
    """Of the first call of each batch its time and what the device was asked for, and the time of later ones."""
    first, later, counted, calls, how = [], [], None, 0, ""
    group = transport(case.over, case.cp_size // 2, case.cp_size)
    with cuda_stand_in() as device, torch.no_grad():
        for number in range(BATCHES):
            call, meta = call_of(case, batch_of(case, number), group)
            device.take()
            if number == BATCHES - 1:
                calls = python_calls(call)
                break
            first.append(seconds(device, call))
            counted = device.take()
            later.append(min(seconds(device, call) for _ in range(LATER)))
        (prepared,) = (found for found in meta.memo.values() if isinstance(found, cpattn.PreparedCall))
        how = prepared.strategy.name
    assert counted is not None
    first, later = first[WARM_UPS:], later[WARM_UPS:]
    # The least that most of them take: others on the machine only add to it.
    times = {"first": float(np.percentile(first, 20)), "later": float(np.percentile(later, 20))}
    return {**times, **counted._asdict(), "calls": calls, "strategy": how}


def stepped(case: Case) -> dict[str, Any]:
    """Of putting another batch of decodes into a bucket, once a call has been made over it."""
    rng = np.random.default_rng(0)

    def next_plan() -> cpattn.Plan:
        batch = [(int(rng.integers(1, 8000)), 1) for _ in range(case.requests - int(rng.integers(4)))]
        return cpattn.plan(batch, case.cp_size, owner=cpattn.Striped(PAGE_SIZE) if case.cache == "striped pages" else None)

    most = case.requests
    bucket = cpattn.Bucket(max_requests=most, max_rows=most, max_chunks=2 * most, max_seqlen=8192)
    times = []
    group = transport(case.over, case.cp_size // 2, case.cp_size)
    with cuda_stand_in() as device, torch.no_grad():
        meta = next_plan().metadata(case.cp_size // 2, "cuda", bucket=bucket)
        q, k, v = (empty(most, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        k_pages, v_pages = (empty(4, PAGE_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2))
        cache = cpattn.PagedKV(k_pages, v_pages, page_table(most, 8192 // PAGE_SIZE))
        cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=cache)
        for _ in range(BATCHES):
            plan = next_plan()
            plan.fingerprint, plan.by_rank  # noqa: B018 - an engine has made it
            device.take()
            times.append(seconds(device, lambda plan=plan: meta.copy_(plan)))  # type: ignore[misc]
            counted = device.take()
    return {"step": float(np.percentile(times, 20)), **counted._asdict()}


def empty(*shape: int) -> torch.Tensor:
    """On the device."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda")


def page_table(requests: int, pages: int) -> torch.Tensor:
    """Whose pages are not looked at."""
    return torch.zeros(requests, pages, dtype=torch.int32, device="cuda")


def seconds(device: StandIn, call: Callable[[], Any]) -> float:
    """Of this thread, without what stands for the device."""
    before, begin = device.seconds, time.thread_time()
    call()
    return time.thread_time() - begin - (device.seconds - before)


def python_calls(call: Callable[[], Any]) -> int:
    """Starts of functions of the package."""
    starts = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal starts
        starts += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return starts


def batch_of(case: Case, number: int) -> list[tuple[int, int]]:
    """The next one, of other lengths than all before."""
    rng = np.random.default_rng(1000 * case.requests + number)
    if case.requests == 1:
        return [(2048 * case.prefixes, 8000 + number)]
    extends = rng.lognormal(5.5, 0.8, case.requests).clip(16, 2000).astype(int)
    return [(int(rng.integers(1, 4000)) * case.prefixes, int(extend)) for extend in extends]


def call_of(case: Case, batch: list[tuple[int, int]], group: cpattn.Transport) -> tuple[Callable[[], Any], cpattn.CPMetadata]:
    """A layer over a batch: with metadata of its own."""
    striped = case.cache == "striped pages"
    plan = cpattn.plan(
        batch,
        case.cp_size,
        partition="zigzag" if striped or case.requests < 16 else "whole",
        owner=cpattn.Striped(PAGE_SIZE) if striped else None,
    )
    meta = plan.metadata(case.cp_size // 2, "cuda")
    q, k, v = (empty(meta.rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache: cpattn.PagedKV | cpattn.PackedKV | None = None
    if case.cache != "packed":
        table = page_table(len(batch), -(-max(map(sum, batch)) // PAGE_SIZE))
        cache = cpattn.PagedKV(empty(4, PAGE_SIZE, KV_HEADS, HEAD_DIM), empty(4, PAGE_SIZE, KV_HEADS, HEAD_DIM), table)
    elif plan.num_prefix_tokens:
        cache = cpattn.PackedKV(*(empty(plan.num_prefix_tokens, KV_HEADS, HEAD_DIM) for _ in range(2)))
    return lambda: cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=cache), meta


COLUMNS = {
    "first": "first call, us",
    "later": "later call, us",
    "calls": "Python calls",
    "copies": "copies",
    "launches": "launches of torch",
}
OF_STEPS = {"step": "another batch into a bucket, us", "copies": "its copies", "launches": "its launches of torch"}


def report(trees: list[dict[str, Any]]) -> str:
    lines = ["# The host's time of a new batch", ""]
    lines += ["`python benchmarks/bench_first_call.py --tree NAME --json FILE`, for each tree, and `--report FILE FILE ...`", ""]
    lines += [trees[-1]["machine"].partition(" Times are")[0], ""]
    lines += [
        "The first call of each of some batches, whose lengths differ, on a device that is stood in for: kernels are launched into "
        "nothing, and the driver takes no time. Time of the thread, without what stands for the device: what a fifth of the batches take "
        "at most. Copies are to the device, launches are of torch's kernels, and Python calls are starts of functions under cpattn/, in a "
        "first call. Last come steps of a decoding engine over a bucket, with a token of each request, whose graph has been captured.",
        "",
    ]
    for part, columns in (("cases", COLUMNS), ("steps", OF_STEPS)):
        for key, title in columns.items():
            lines += [f"## {title[0].upper()}{title[1:]}", "", "| batches | " + " | ".join(tree["tree"] for tree in trees) + " |"]
            lines += ["|" + "---|" * (1 + len(trees))]
            for case in trees[-1][part]:
                values = [tree[part][case][key] for tree in trees]
                shown = [f"{1e6 * value:,.0f}" if isinstance(value, float) else str(value) for value in values]
                lines.append(f"| {case} | " + " | ".join(shown) + " |")
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
