"""Random batches over process groups until the time is over: every result beside another transport's, bit for bit, and memory watched.

PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/soak.py --minutes 30
PYTHONPATH=. python benchmarks/soak.py --minutes 1 --nproc 2 --device cpu

Each rank needs a GPU, or with ``--device cpu`` none. On GPUs the memory of peers and NCCL's collectives take turns in going first,
eagerly and in replayed graphs; on CPUs it is gloo, twice. Small batches are held against the oracle as well. In the first
third of the time, and at least 100 batches, all is made that is kept; after it memory must not grow, but for that of messages, which is as
large as the largest batch of a kind has needed so far: some kinds are rare. Every batch follows from the seed and its number: ``--only N``
runs one again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from inputs.cases import EXCHANGES, STRIPED_EXCHANGES, AttentionCase

import cpattn
from cpattn.testing import ProcessRanks
from cpattn.transports import arena, shared_memory
from cpattn.transports.groups import Kind
from cpattn.transports.peer_memory import PeerTransport
from cpattn.transports.transport import living_transports

# Batches between two looks at the clock and at memory, which are collectives.
ROUND = 10
SAYS_EVERY = 10.0
# Batches after which each kind of call has made its memory; a short run on a slow machine has fewer in its first third.
WARM_UP = 100
# What may come and go: torch's allocator keeps pieces, and Python and the driver take memory by the way.
SLACK = {"beside_messages": 16, "reserved": 512, "used": 768, "rss": 256, "heaps": 0, "graph_heaps": 0, "blocks": 0, "transports": 0}
MIB = {"messages", "beside_messages", "reserved", "used", "rss"}
SMALL_TOKENS = 300
PAGE_SIZE = 16
BUCKET = cpattn.Bucket(max_requests=8, max_rows=256, max_chunks=16, max_seqlen=1024)
# A graph for each of these, of all batches that fit the bucket.
GRAPHS = [("all_gather", "paged"), ("ring", "paged"), ("pass_q", "sharded"), ("pass_q", "striped")]
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


class Asked(NamedTuple):
    """What was asked for on the command line."""

    minutes: float
    device: str
    seed: int
    only: int | None


class Drawn(NamedTuple):
    """One batch, and how its calls are made: eagerly, or as the bucket's ``graph``-th pair of strategy and cache."""

    number: int
    case: AttentionCase
    strategy: str
    options: dict[str, Any]
    graph: int | None

    def __str__(self) -> str:
        how = "eagerly" if self.graph is None else "by a graph"
        return (
            f"batch {self.number}, {how}: {self.case.batch}, {self.case.cache}, window={self.case.window}, {self.options}, {self.strategy}"
        )


def draw(seed: int, number: int, device: str, cp_size: int) -> Drawn:
    """A batch, alike for the same numbers. The first ones of a run are the largest, so that memory is as large as it will be."""
    rng = np.random.default_rng([seed, number])
    is_first = number < len(EXCHANGES) + len(STRIPED_EXCHANGES)
    exchanges = [*EXCHANGES, *STRIPED_EXCHANGES]
    graph = int(rng.integers(len(GRAPHS))) if not is_first and rng.random() < 0.4 else None
    strategy, cache = exchanges[number if is_first else rng.integers(len(exchanges))] if graph is None else GRAPHS[graph]
    most = 4000 if device == "cuda" else 80
    if graph is not None:
        batch = _draw_for_bucket(rng, cp_size)
    elif is_first:
        batch = [(most, most)] * 6
    else:
        kind = rng.integers(4)
        longest = [40, 40, most // 4, most][kind]
        count = int(rng.integers(0, 7))
        batch = [(_length(rng, 0.4, longest), 1 if kind == 1 else _length(rng, 0.15, longest)) for _ in range(count)]
    window = int(rng.integers(1, 200)) if cache in ("packed", "paged") and graph is None and rng.random() < 0.25 else None
    case = AttentionCase(
        batch,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM if device == "cuda" else 16,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        window=window,
        seed=number,
        device=device,
        cache=cache,
        page_size=PAGE_SIZE,
        interleave=int(rng.choice([1, 3, 16])) if graph is None else 4,
    )
    partition = ["zigzag", "contiguous", "whole", "auto"][rng.integers(4)] if graph is None else "zigzag"
    pad_to = int(rng.choice([1, 4, 16])) if graph is None else 1
    return Drawn(number, case, strategy, {"partition": partition, "pad_to": pad_to}, graph)


def _length(rng: np.random.Generator, zero: float, most: int) -> int:
    return 0 if rng.random() < zero else int(rng.choice([1, 2, int(rng.integers(1, 12)), int(rng.integers(1, most + 1))]))


def _draw_for_bucket(rng: np.random.Generator, cp_size: int) -> list[tuple[int, int]]:
    batch, left = [], cp_size * BUCKET.max_rows // 2
    for _ in range(rng.integers(0, BUCKET.max_requests + 1)):
        extend = min(left, [0, 1, int(rng.integers(1, 20)), int(rng.integers(1, 200))][rng.integers(4)])
        left -= extend
        batch.append((int(rng.integers(0, 800)) * int(rng.integers(2)), extend))
    return batch


class Captured:
    """A call over a bucket: on a GPU a graph of it, over one transport.

    It has pages of its own, which each batch fills anew.
    """

    def __init__(self, transport: cpattn.Transport, strategy: str, cache: str, device: str) -> None:
        self._transport, self._strategy, self._cache = transport, strategy, cache
        head_dim, dtype = (HEAD_DIM, torch.bfloat16) if device == "cuda" else (16, torch.float32)
        self._q, self._k, self._v = (
            torch.zeros(BUCKET.max_rows, heads, head_dim, dtype=dtype, device=device) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        width = -(-BUCKET.max_seqlen // PAGE_SIZE) + 1
        shape = BUCKET.max_requests * width, PAGE_SIZE, KV_HEADS, head_dim
        self._k_pages, self._v_pages = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._table = torch.zeros(BUCKET.max_requests, width, dtype=torch.int32, device=device)
        empty = AttentionCase([(0, 1)], cache=cache, interleave=4).plan(transport.size)
        self._meta = empty.metadata(transport.rank, device, bucket=BUCKET)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device == "cuda":
            for _ in range(2):
                self._call()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = self._call()

    def _call(self) -> tuple[Tensor, Tensor]:
        pages = cpattn.PagedKV(self._k_pages, self._v_pages, self._table)
        return cpattn.cp_attention(
            self._q, self._k, self._v, self._meta, group=self._transport, kv_cache=pages, strategy=self._strategy,
            backend=_backend(self._q.device.type), return_lse=True,
        )  # fmt: skip

    def __call__(self, case: AttentionCase, plan: cpattn.Plan) -> list[Tensor]:
        """This rank's output and LSE, and what was written to its pages."""
        rank = self._transport.rank
        self._meta.copy_(plan)
        pages = case.pages(plan, rank, max_requests=BUCKET.max_requests).cache
        assert pages.v_pages is not None
        assert pages.page_table is not None
        for mine, theirs in ((self._k_pages, pages.k_pages), (self._v_pages, pages.v_pages)):
            # A kernel that reads whole tiles multiplies what lies after the last token by 0.
            mine.zero_()[: len(theirs)].copy_(theirs.nan_to_num(0.0))
        # Entries that are no pages are nobody's.
        table = pages.page_table.clamp(0, len(self._k_pages) - 1)
        self._table.zero_()[:, : table.shape[1]].copy_(table)
        held = plan.rank_tokens[rank]
        for mine, theirs in ((self._q, case.q), (self._k, case.k), (self._v, case.v)):
            mine.zero_()[:held].copy_(cpattn.shard(theirs, self._meta)[:held])
        if self._graph is None:
            out, lse = self._call()
        else:
            self._graph.replay()
            out, lse = self._results
        return [out[:held].clone(), lse[:held].clone(), self._k_pages.clone(), self._v_pages.clone()]


def _backend(device: str) -> str:
    return "triton" if device == "cuda" else "reference"


def memory(device: str) -> dict[str, int]:
    """What this rank holds: MiB, and numbers of things."""
    transports = living_transports()
    found = {
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20 if sys.platform == "linux" else 0,
        "heaps": sum(len(transport.shared.heaps()) for transport in transports if isinstance(transport, PeerTransport)),
        "graph_heaps": len(shared_memory._of_graphs),
        "blocks": sum(len(transport.arena.blocks()) for transport in transports),
        "transports": len(transports),
    }
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        # Of those that a graph has captured some are no transport's any more.
        blocks = {id(block): block for transport in transports for block in transport.arena.blocks()} | arena._of_graphs
        message_bytes = sum(block.nbytes for block in blocks.values())
        found |= {"messages": message_bytes >> 20, "beside_messages": (torch.cuda.memory_allocated() - message_bytes) >> 20}
        found["reserved"] = torch.cuda.memory_reserved() >> 20
        found["used"] = (total - free) >> 20
    return found


@dataclass
class Watch:
    """The most of each kind of memory on any rank, while it warms up and since; and what has grown."""

    first: Counter[str] = field(default_factory=Counter)
    since: Counter[str] = field(default_factory=Counter)

    def note(self, found: list[dict[str, int]], is_warm: bool) -> None:
        seen = self.since if is_warm else self.first
        for one in found:
            for name, size in one.items():
                seen[name] = max(seen[name], size)

    def grown(self) -> dict[str, str]:
        """Nothing where there was no time to warm up in."""
        if not self.first:
            return {}
        return {
            name: f"{self.first[name]} to {size}{' MiB' if name in MIB else ''}"
            for name, size in self.since.items()
            # Messages are not looked at.
            if name in SLACK and size > self.first[name] + SLACK[name]
        }


class Soak:
    """One rank of a run."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._size, self._rank = dist.get_world_size(), dist.get_rank()
        kinds: tuple[Kind, Kind] = ("peer_memory", "collectives") if asked.device == "cuda" else ("auto", "collectives")
        self._transports = [cpattn.transport(kind=kind) for kind in kinds]
        self._graphs: list[list[Captured]] = []
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, drawn: Drawn) -> None:
        """One batch over both transports."""
        case, plan = drawn.case, drawn.case.plan(self._size, **drawn.options)
        # Who goes first changes what the other finds in memory.
        order = [0, 1] if drawn.number % 2 else [1, 0]
        if drawn.graph is not None and not plan.fits(BUCKET):
            self.counts["did not fit the bucket"] += 1
            return
        calls = (
            [self._eager(drawn, plan, n) for n in range(2)] if drawn.graph is None else [self._captured(drawn, plan, n) for n in range(2)]
        )
        results: dict[int, list[Tensor]] = {n: calls[n]() for n in order}
        same = all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], results[1], strict=True))
        if not same:
            self.wrong.append(f"{drawn}: other bits on rank {self._rank} over {' and '.join(x.kind for x in self._transports)}")
        self.counts[f"{'eager' if drawn.graph is None else 'graph'}, {drawn.strategy}, {case.cache}"] += 1
        if drawn.graph is None and plan.num_tokens + plan.num_prefix_tokens <= SMALL_TOKENS:
            try:
                case.check([(results[0][0], results[0][1])], plan, drawn.strategy, _backend(self._asked.device))
            except AssertionError as error:
                self.wrong.append(f"{drawn}: not what the oracle says on rank {self._rank} ({error})")
            self.counts["held against the oracle"] += 1

    def _eager(self, drawn: Drawn, plan: cpattn.Plan, which: int) -> Callable[[], list[Tensor]]:
        transport, backend = self._transports[which], _backend(self._asked.device)
        return lambda: list(drawn.case.on_rank(plan, self._rank, transport, drawn.strategy, backend, check=drawn.number % 7 == 0))

    def _captured(self, drawn: Drawn, plan: cpattn.Plan, which: int) -> Callable[[], list[Tensor]]:
        assert drawn.graph is not None
        if not self._graphs:
            # After the largest calls, so that graphs are over memory that grows no more.
            for strategy, cache in GRAPHS:
                self._graphs.append([Captured(transport, strategy, cache, self._asked.device) for transport in self._transports])
        graph = self._graphs[drawn.graph][which]
        return lambda: graph(drawn.case, plan)

    def together(self, mine: Any) -> list[Any]:
        """What each rank says."""
        said: list[Any] = [None] * self._size
        dist.all_gather_object(said, mine)
        return said


def soak(asked: Asked) -> dict[str, Any]:
    """A run on one rank; the summary, alike on all."""
    begin = time.monotonic()
    run, watch, said, number, wrong = Soak(asked), Watch(), begin, 0, []
    if asked.only is not None:
        run.run(draw(asked.seed, asked.only, asked.device, dist.get_world_size()))
        return {"wrong": [text for texts in run.together(run.wrong) for text in texts]}
    seconds = 60 * asked.minutes
    for drawn in _batches(asked):
        try:
            run.run(drawn)
        except BaseException:
            print(f"rank {dist.get_rank()} failed in {drawn}", file=sys.stderr, flush=True)
            raise
        number += 1
        if number % ROUND:
            continue
        # Cycles are collected now and then, whenever Python likes.
        gc.collect()
        everyone = run.together((time.monotonic() - begin, memory(asked.device), run.wrong))
        elapsed = everyone[0][0]
        wrong = [text for _, _, texts in everyone for text in texts]
        watch.note([found for _, found, _ in everyone], is_warm=elapsed > seconds / 3 and number > WARM_UP)
        if dist.get_rank() == 0 and time.monotonic() - said > SAYS_EVERY:
            said = time.monotonic()
            print(f"{elapsed:,.0f} s: {number:,} batches, {len(wrong)} wrong; {_in_words(everyone[0][1])}", flush=True)
        if elapsed > seconds or wrong:
            break
    for transport in run._transports:
        cpattn.check(transport)
    return {
        "seed": asked.seed, "ranks": dist.get_world_size(), "device": asked.device, "torch": torch.__version__,
        "seconds": round(time.monotonic() - begin, 1), "batches": number, "counts": dict(sorted(run.counts.items())),
        "transports": [transport.describe() for transport in run._transports],
        "warming up": dict(watch.first), "since": dict(watch.since), "grown": watch.grown(), "wrong": wrong,
    }  # fmt: skip


def _batches(asked: Asked) -> Iterator[Drawn]:
    number = 0
    while True:
        yield draw(asked.seed, number, asked.device, dist.get_world_size())
        number += 1


def _in_words(found: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {size:,}{' MiB' if name in MIB else ''}" for name, size in found.items())


def under_torchrun(asked: Asked) -> dict[str, Any]:
    """This process is one of the ranks."""
    if asked.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if asked.device == "cuda" else "gloo")
    try:
        return soak(asked)
    finally:
        dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--nproc", type=int, default=2, help="ranks to start; under torchrun there are as many as it starts")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one batch of that seed")
    parser.add_argument("--json", type=Path, help="a file that the summary is written to as well")
    given = parser.parse_args()
    asked = Asked(given.minutes, given.device, given.seed, given.only)
    torch.set_num_threads(1)
    if "LOCAL_RANK" in os.environ:
        summary, is_first = under_torchrun(asked), os.environ["RANK"] == "0"
    else:
        with ProcessRanks(given.nproc, timeout=120, transport="nccl" if given.device == "cuda" else "gloo") as ranks:
            summary, is_first = ranks.run(soak, asked)[0], True
    if is_first:
        text = json.dumps(summary, indent=2)
        print(text, flush=True)
        if given.json is not None:
            given.json.write_text(text + "\n")
    wrong, grown = summary["wrong"], summary.get("grown")
    if wrong and is_first:
        print(f"wrong results; python {sys.argv[0]} --only N --seed {given.seed} runs one batch again", file=sys.stderr)
    if grown and is_first:
        print(f"memory has grown: {grown}", file=sys.stderr)
    return int(bool(wrong or grown))


if __name__ == "__main__":
    sys.exit(main())
