"""A model that compiles to one graph, over batches of every kind, beside the same model uncompiled: bit for bit.

Outside of its attention it has only what every compiler rounds alike, in whichever order it sums: products of small whole
numbers, and sums of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

import cpattn

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES, TABLE_WIDTH = 4, 2, 16, 4, 56, 14
WIDTH = HEADS * HEAD_DIM
PROMPTS = [[(0, 13), (0, 6)], [(0, 9), (0, 20), (0, 8)], [(0, 22), (0, 9), (0, 3), (0, 17)], [(0, 11), (0, 15)]]
# First one whose number of requests is no other size: what is alike in the first batch is taken to be alike in all.
PREFIXES = [[(0, 9), (21, 20), (8, 8)], [(5, 13), (17, 6)], [(3, 22), (9, 9), (3, 3), (0, 17)], [(11, 11), (2, 15)]]
# Sizes that a compiler has code of their own for: 1 row and none, each twice.
SMALL = [[(0, 1)], [(0, 0)], [(0, 1)], [(0, 0)]]


class Layer(nn.Module):
    def __init__(self, window: int | None, softcap: float | None, sinks: bool) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randint(-8, 9, ((HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH)) / 32)
        self.window, self.softcap = window, softcap
        self.sinks = nn.Parameter(torch.randn(HEADS)) if sinks else None

    def forward(self, x: Tensor, meta: cpattn.CPMetadata, group: Any, cache: Any, out: Tensor | None) -> Tensor:
        coarse = torch.round(x * 8) / 8
        heads = nn.functional.linear(coarse, self.qkv).view(-1, HEADS + 2 * KV_HEADS, HEAD_DIM)
        heads = heads * (1.0 + meta.position_ids % 2)[:, None, None]
        q, k, v = torch.split(heads, [HEADS, KV_HEADS, KV_HEADS], dim=1)
        attended, lse = cpattn.cp_attention(
            q, k, v, meta, group=group, kv_cache=cache, window=self.window, softcap=self.softcap, sinks=self.sinks, out=out, return_lse=True
        )
        rest: Tensor = (x + attended.flatten(1)) + lse.clamp(min=-1.0)[:, :1]
        return rest


class Model(nn.Module):
    """All tokens in, all tokens out, on every rank."""

    def __init__(self, window: int | None = None, softcap: float | None = None, sinks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(window, softcap, sinks) for _ in range(2))

    def forward(self, x: Tensor, meta: cpattn.CPMetadata, group: Any, caches: list[Any], out: Tensor | None = None) -> Tensor:
        rows = cpattn.shard(x + 1, meta)
        return cpattn.unshard(self.over_rows(rows, meta, group, caches, out), meta, group=group) * 2

    def over_rows(self, rows: Tensor, meta: cpattn.CPMetadata, group: Any, caches: list[Any], out: Tensor | None = None) -> Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            # A view that the graph makes, as of an engine's buffer.
            rows = layer(rows, meta, group, cache, None if out is None else out[1])
        return rows


class Place(NamedTuple):
    """Where the model runs: as which rank of a group of this size, on which device."""

    size: int
    rank: int
    group: Any = None
    device: str = "cpu"


class Step(NamedTuple):
    """One batch: the arguments of the model, made anew for each call; and the pages that the last of them has written."""

    arguments: Callable[[], tuple[Any, ...]]
    written: Callable[[], list[Tensor]]


def _random(seed: int, device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _tokens(plan: cpattn.Plan, device: str) -> Tensor:
    return _random(plan.num_tokens, device, plan.num_tokens, WIDTH)


def _pages(device: str) -> list[tuple[Tensor, Tensor]]:
    """Of both layers, K and V one tensor, as engines have it."""
    both = _random(0, device, 2, 2, NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    return [(layer[0], layer[1]) for layer in both]


def _table(lines: int, device: str) -> Tensor:
    return torch.arange(NUM_PAGES, dtype=torch.int32, device=device).view(-1, TABLE_WIDTH)[:lines].contiguous()


def _arguments(plan: cpattn.Plan, at: Place, cache: cpattn.PackedKV | None) -> tuple[Any, ...]:
    return _tokens(plan, at.device), plan.metadata(at.rank, at.device), at.group, [cache, cache]


def _all_pages(caches: list[cpattn.PagedKV]) -> list[Tensor]:
    return [pages for cache in caches for pages in (cache.k_pages, cache.v_pages) if pages is not None]


def _prompts(at: Place) -> Iterator[Step]:
    for batch in (*PROMPTS, *SMALL, PROMPTS[0]):
        yield Step(partial(_arguments, cpattn.plan(batch, at.size), at, None), list)


def _packed(at: Place) -> Iterator[Step]:
    for batch in PREFIXES:
        plan = cpattn.plan(batch, at.size)
        prefix = _random(2, at.device, 2, plan.num_prefix_tokens, KV_HEADS, HEAD_DIM)
        yield Step(partial(_arguments, plan, at, cpattn.PackedKV(prefix[0], prefix[1])), list)


def _paged(at: Place, *, sharded: bool = False, with_out: bool = False) -> Iterator[Step]:
    for batch in PREFIXES:
        shards = [[prefix // at.size + (r < prefix % at.size) for r in range(at.size)] for prefix, _ in batch] if sharded else None
        plan = cpattn.plan(batch, at.size, prefix_shards=shards)
        caches: list[cpattn.PagedKV] = []

        def arguments(plan: cpattn.Plan = plan, caches: list[cpattn.PagedKV] = caches) -> tuple[Any, ...]:
            table, meta = _table(len(plan.batch), at.device), plan.metadata(at.rank, at.device)
            caches[:] = [cpattn.PagedKV(k, v, table) for k, v in _pages(at.device)]
            out = torch.empty(2, meta.rows, HEADS, HEAD_DIM, device=at.device) if with_out else None
            return _tokens(plan, at.device), meta, at.group, list(caches), out

        yield Step(arguments, partial(_all_pages, caches))


def _bucket(at: Place) -> Iterator[Step]:
    bucket = cpattn.Bucket(max_requests=4, max_rows=64, max_chunks=8, max_seqlen=TABLE_WIDTH * PAGE_SIZE)
    meta = cpattn.plan(PREFIXES[0], at.size).metadata(at.rank, at.device, bucket=bucket)
    table = _table(4, at.device)
    for batch in (*PREFIXES, *SMALL[:2]):
        plan = cpattn.plan(batch, at.size)
        caches: list[cpattn.PagedKV] = []

        def arguments(plan: cpattn.Plan = plan, caches: list[cpattn.PagedKV] = caches) -> tuple[Any, ...]:
            meta.copy_(plan)
            caches[:] = [cpattn.PagedKV(k, v, table) for k, v in _pages(at.device)]
            padded = torch.nn.functional.pad(_tokens(plan, at.device), (0, 0, 0, 64 - plan.num_tokens))
            return padded, meta, at.group, list(caches)

        yield Step(arguments, partial(_all_pages, caches))


CASES: dict[str, tuple[dict[str, Any], Callable[[Place], Iterator[Step]]]] = {
    "prompts": ({}, _prompts),
    "packed_prefixes": ({"softcap": 5.0}, _packed),
    "pages": ({"window": 9, "sinks": True}, _paged),
    "pages_and_out": ({}, partial(_paged, with_out=True)),
    "sharded_pages": ({"softcap": 5.0}, partial(_paged, sharded=True)),
    "bucket": ({"sinks": True}, _bucket),
}


def run_case(name: str, at: Place, backend: str = "aot_eager", dynamic: bool | None = None, batches: int | None = None) -> list[int]:
    """Compiles the model to one graph, and compares it with itself over the first batches of a case, or all; how many graphs there
    were after each."""
    torch._dynamo.reset()
    counters.clear()
    options, steps = CASES[name]
    plain = Model(**options).eval().to(at.device)
    compiled = torch.compile(plain, backend=backend, fullgraph=True, dynamic=dynamic)
    graphs = []
    for number, step in enumerate(islice(steps(at), batches)):
        with torch.inference_mode():
            expected = plain(*step.arguments())
            pages = step.written()
            got = compiled(*step.arguments())
        assert torch.equal(got, expected), f"batch {number}: the largest difference is {(got - expected).abs().max()}"
        assert all(torch.equal(one, other) for one, other in zip(step.written(), pages, strict=True)), f"pages of batch {number}"
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def check_counts(name: str, graphs: list[int]) -> None:
    """Of a fixed size there is one graph. Else one for the first batch, one for any, and one each for 1 row and for none."""
    if name == "bucket":
        assert set(graphs) == {1}
    elif name != "prompts":
        assert graphs == [1] + [2] * (len(graphs) - 1)
    else:
        any_size, small = graphs[: len(PROMPTS)], graphs[len(PROMPTS) :]
        assert any_size == [1] + [2] * (len(PROMPTS) - 1)
        if small:
            assert small[1] <= 4
            assert set(small[1:]) == {small[1]}


def here(group: Any = None) -> Place:
    """On a rank of the default group; on its own GPU where it has one."""
    device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
    return Place(dist.get_world_size(), dist.get_rank(), group, device)


def run_cases(backend: str, names: list[str]) -> dict[str, list[int]]:
    return {name: run_case(name, here(), backend) for name in names}


def run_with_each_kind_of_group() -> dict[str, list[int]]:
    """A few batches of a case for each: the default group, an axis of a mesh, which is passed by its process group, and a transport."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    groups = {"pages": mesh["cp"], "sharded_pages": cpattn.transport()}
    graphs = {name: run_case(name, here(group), "eager", batches=2) for name, group in groups.items()}
    return {**graphs, "prompts": run_case("prompts", here(), batches=len(PROMPTS))}


def run_captured(at: Place | None = None) -> None:
    """A CUDA graph of the compiled layers over a bucket is replayed over each batch that is put into it."""
    at = at or here()
    torch._dynamo.reset()
    options, steps = CASES["bucket"]
    plain = Model(**options).eval().to(at.device)
    compiled = torch.compile(plain.over_rows, fullgraph=True, dynamic=False)
    graph: torch.cuda.CUDAGraph | None = None
    with torch.inference_mode():
        for step in steps(at):
            expected = plain(*step.arguments())
            expected_pages = step.written()
            x, meta, group, caches = step.arguments()
            rows = cpattn.shard(x + 1, meta)
            if graph is None:
                static_rows, static_caches = rows.clone(), caches
                before = [pages.clone() for pages in _all_pages(caches)]
                for _ in range(2):
                    compiled(static_rows, meta, group, static_caches)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    result = compiled(static_rows, meta, group, static_caches)
            else:
                before = _all_pages(caches)
            static_rows.copy_(rows)
            for pages, first in zip(_all_pages(static_caches), before, strict=True):
                pages.copy_(first)
            graph.replay()
            assert torch.equal(cpattn.unshard(result, meta, group=group) * 2, expected)
            for pages, other in zip(_all_pages(static_caches), expected_pages, strict=True):
                assert torch.equal(pages, other)


def run_between_captured_pieces(at: Place | None = None, over_pages: bool = False) -> int:
    """In the mode in which torch captures CUDA graphs itself, the operators run between them, with the metadata of each batch; how
    many inputs the captured pieces have."""
    at = at or here()
    torch._dynamo.reset()
    counters.clear()
    plain = Model().eval().to(at.device)
    compiled = torch.compile(plain, fullgraph=True, mode="reduce-overhead", dynamic=False)
    # Of one size, so that one graph serves them, but laid out in other ways.
    batches = [[(0, 13), (0, 6)], [(0, 1), (0, 18)], [(0, 10), (0, 9)]]
    if over_pages:
        batches = [[(5, 13), (17, 6)], [(9, 1), (3, 18)], [(0, 10), (30, 9)]]
    table = _table(2, at.device)

    def arguments(batch: list[tuple[int, int]]) -> tuple[Any, ...]:
        *given, caches = _arguments(cpattn.plan(batch, at.size), at, None)
        return *given, [cpattn.PagedKV(k, v, table) for k, v in _pages(at.device)] if over_pages else caches

    with torch.inference_mode():
        for batch in [*batches, *batches]:
            mine, theirs = arguments(batch), arguments(batch)
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            assert torch.equal(compiled(*mine), plain(*theirs))
            if over_pages:
                assert all(torch.equal(one, other) for one, other in zip(_all_pages(mine[-1]), _all_pages(theirs[-1]), strict=True))
    assert counters["stats"]["unique_graphs"] == 1
    return counters["inductor"]["cudagraph_recorded_non_static_inputs"]
