"""Launches whose programs draw their work from a queue: one after another, side by side, and replayed."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
import pytest
import torch
from inputs.ragged_inputs import launch_attention
from torch import Tensor

pytest.importorskip("triton")

from cpattn.attention.ragged_rows import RaggedRows
from cpattn.kernels import tiles, work_queue
from cpattn.kernels.ragged_attention import specialized_kernel
from cpattn.kernels.tile_shapes import tile_shapes
from cpattn.spans import SpanTable

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# The plain kernel has a program for each item, and its default shapes have other blocks of keys: its bits are others.
needs_queue = pytest.mark.skipif(
    not torch.cuda.is_available() or specialized_kernel(torch.device("cuda")) is None,
    reason="needs a Hopper GPU, and a Triton that has what its kernel needs",
)
SCALE = 0.1


def test_items_in_the_queue_are_all_items_once_and_a_run_has_one_key_range() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        q_len, k_len = (rng.integers(0, most, 20) for most in (300, 900))
        rows = RaggedRows.build(q_len, np.cumsum(k_len) - k_len, k_len, k_len - q_len + 1)
        cut, _ = tiles.cut(rows.host, 32, 64, None)
        heads = int(rng.integers(1, 5))
        number = np.arange(len(cut.q_begin) * heads)
        # As the kernels do it.
        begin, length = cut.run_begin[number // heads], cut.run_tiles[number // heads]
        in_run = number - begin * heads
        tile, head = begin + in_run % length, in_run // length
        assert sorted(tile * heads + head) == number.tolist()
        for at in set(cut.run_begin.tolist()):
            of_run = cut.run_begin == at
            assert len(set(cut.k_start[of_run].tolist())) == len(set(cut.k_len[of_run].tolist())) == 1
            assert (cut.run_tiles[of_run] == of_run.sum()).all()


def test_programs_are_enough_for_all_items_whatever_they_cost() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        processors, items, blocks = int(rng.integers(1, 20)), int(rng.integers(1, 500)), float(rng.uniform(2, 3000))
        quota, programs = tiles._share(items, blocks, processors, fixed=False)
        assert programs <= items
        # Each time that a processor is free while there are items, its program has some quota left, or there is another.
        cost = rng.exponential(1.0, items)
        begun = min(programs, processors)
        free = [(0.0, quota)] * begun
        for item in range(items):
            at, left = heapq.heappop(free)
            if left == 0:
                begun, left = begun + 1, quota
                assert begun <= programs
            heapq.heappush(free, (at + cost[item], left - 1))


@pytest.fixture
def work() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Attention over rows that keep every program busy several times, and its queries."""
    requests, extend, keys = 40, 100, 333
    q_len, k_len = np.full(requests, extend), np.full(requests, keys)
    rows = RaggedRows.build(q_len, np.arange(requests) * keys, k_len, k_len - q_len + 1, "cuda")
    k, v = torch.randn(2, requests * keys, 4, 64, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(requests * extend, 16, 64, device="cuda", dtype=torch.bfloat16)

    def attend(q: Tensor) -> Tensor:
        return launch_attention(q, k, v, rows, scale=SCALE)[0]

    return attend, q


@needs_queue
def test_programs_with_several_items() -> None:
    """Short ones, without keys, with half a tile of queries: against the kernel that has a program for each."""
    rng = np.random.default_rng(0)
    for heads in (8, 24):
        q_len, k_len = rng.integers(0, 50, 80), rng.integers(0, 300, 80) * rng.integers(0, 2, 80)
        rows = RaggedRows.build(q_len, np.cumsum(k_len) - k_len, k_len, k_len - q_len + 1, "cuda")
        q = torch.randn(rows.num_queries, heads, 64, device="cuda", dtype=torch.bfloat16)
        k, v = torch.randn(2, int(k_len.sum()) + 200, 4, 64, device="cuda", dtype=torch.bfloat16)
        v[int(k_len.sum()) :] = torch.nan
        out, lse = launch_attention(q, k, v, rows, scale=SCALE)
        plain = tuple(shape._replace(specialized=False) for shape in tile_shapes(64, 64, q.dtype, (9, 0), specialized=True))
        expected = launch_attention(q, k, v, rows, scale=SCALE, shapes=plain)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@needs_queue
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("page_size", [None, 16, 48])
@pytest.mark.parametrize("into", [False, True], ids=["new", "into"])
def test_several_items_a_program_with_every_feature(into: bool, page_size: int | None, window: int | None) -> None:
    """A window, pages, sinks on rows without keys, an earlier result: against the kernel that has a program for each item."""
    rng = np.random.default_rng(0)
    q_len, k_len = rng.integers(0, 80, 70), rng.integers(1, 300, 70) * (rng.random(70) < 0.8)
    # Diagonals as a ring's with a window: some queries see nothing any more.
    diagonal = k_len - q_len + 1 + rng.integers(0, 60, 70) * (rng.random(70) < 0.5)
    q = torch.randn(int(q_len.sum()), 16, 64, device="cuda", dtype=torch.bfloat16)
    sinks = torch.randn(16, device="cuda")
    begins = np.cumsum(k_len) - k_len
    if page_size is None:
        rows = RaggedRows.build(q_len, begins, k_len, diagonal, "cuda")
        k, v = torch.randn(2, int(k_len.sum()), 4, 64, device="cuda", dtype=torch.bfloat16)
    else:
        pages = -(-k_len // page_size)
        # Entries that no key is in are not looked at.
        table = torch.full((70, int(pages.max())), 10**6, dtype=torch.int32)
        for i, (count, first) in enumerate(zip(pages, np.cumsum(pages) - pages, strict=True)):
            table[i, :count] = torch.arange(first, first + count)
        k, v = torch.full((2, int(pages.sum()), page_size, 4, 64), torch.nan, device="cuda", dtype=torch.bfloat16)
        for i, length in enumerate(k_len):
            for at in range(0, length, page_size):
                count = min(page_size, length - at)
                k[table[i, at // page_size], :count], v[table[i, at // page_size], :count] = torch.randn(2, count, 4, 64, device="cuda")
        rows = RaggedRows.build(q_len, np.zeros_like(k_len), k_len, diagonal, "cuda", np.arange(70)).with_pages(table.cuda(), page_size)
    plain = tuple(shape._replace(specialized=False) for shape in tile_shapes(64, 64, q.dtype, (9, 0), specialized=True))
    earlier = torch.randn(len(q), 16, 64, device="cuda"), torch.randn(len(q), 16, device="cuda")
    results = []
    for shapes in (None, plain):
        given = (earlier[0].clone(), earlier[1].clone()) if into else None
        results.append(
            launch_attention(q, k, v, rows, scale=SCALE, window=window, sinks=None if into else sinks, into=given, shapes=shapes)
        )
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
        assert not x.isnan().any()


@needs_gpu
def test_a_graph_replayed_over_more_and_fewer_items_than_programs() -> None:
    """With fixed rows: whether there is a queue at all is decided on the device."""
    num_rows, num_queries, num_keys = 41, 3000, 20000
    k, v = torch.randn(2, num_keys, 4, 64, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(num_queries, 16, 64, device="cuda", dtype=torch.bfloat16)

    def fixed(q_len: list[int], k_len: list[int]) -> RaggedRows:
        """The rest of the queries, padding, is the last row."""
        missing = num_rows - 1 - len(q_len)
        queries, keys = np.array([*q_len, *[0] * missing, num_queries - sum(q_len)]), np.array([*k_len, *[0] * missing, 0])
        table = SpanTable(queries, np.cumsum(keys) - keys, keys, keys - queries + 1, np.zeros_like(keys), "bottom_right")
        return RaggedRows.build_all([table], "cuda", (num_queries, num_keys))[0]

    many = fixed([70] * 40, [400] * 40)
    batches = [many, fixed([3], [900]), fixed([1] * 40, [5] * 40), fixed([], []), fixed([1500, 1, 1400], [9000, 1, 3000]), many]
    captured = fixed([70] * 40, [400] * 40)
    launch_attention(q, k, v, captured, scale=SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = launch_attention(q, k, v, captured, scale=SCALE)
    for batch in batches:
        captured.copy_(batch)
        out.fill_(torch.nan)
        graph.replay()
        expected, expected_lse = launch_attention(q, k, v, batch, scale=SCALE)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


@needs_gpu
def test_counters_are_left_as_they_were(work: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    attend, q = work
    expected = attend(q)
    for _ in range(20):
        assert torch.equal(attend(q), expected)
    assert work_queue.counter_for_launch(q.device).tolist() == [0, 0]


@needs_gpu
def test_programs_that_end_after_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    q_len, k_len = np.full(90, 60), np.full(90, 200)
    q = torch.randn(90 * 60, 16, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 90 * 200, 4, 64, device="cuda", dtype=torch.bfloat16)
    results, quotas = [], []
    for blocks in (tiles._PROGRAM_BLOCKS, 4):
        monkeypatch.setattr(tiles, "_PROGRAM_BLOCKS", blocks)
        rows = RaggedRows.build(q_len, np.arange(90) * 200, k_len, k_len - q_len + 1, "cuda")
        results += [launch_attention(q, k, v, rows, scale=SCALE) for _ in range(5)]
        (launch,) = rows.prepared.values()
        assert isinstance(launch, tiles.Launch)
        quotas.append(launch.limits[1].item())
    assert quotas[1] == 2 < quotas[0]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
    assert work_queue.counter_for_launch(q.device).tolist() == [0, 0]


@needs_gpu
def test_launches_on_several_streams_at_once(work: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    attend, q = work
    queries = [q, q.flip(0), -q, q * 0.5]
    expected = [attend(x) for x in queries]
    streams = [torch.cuda.Stream() for _ in queries]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    counters = []
    results: list[list[Tensor]] = [[] for _ in queries]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(attend(queries[i]))
                counters.append(work_queue.counter_for_launch(q.device).data_ptr())
    torch.cuda.synchronize()
    assert len(set(counters)) == len(streams)
    for outs, out in zip(results, expected, strict=True):
        assert all(torch.equal(x, out) for x in outs)


@needs_gpu
@pytest.mark.parametrize("left", [None, 2], ids=["from the pool", "pool exhausted"])
def test_graphs_replayed_at_once(work: tuple[Callable[[Tensor], Tensor], Tensor], left: int | None) -> None:
    attend, q = work
    expected = attend(q)
    if left is not None:
        # The next launch that is not captured makes more.
        work_queue._pools[q.device].left = left
    graphs = []
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # One after another, and all from the same capture stream.
            outs = [attend(q) for _ in range(3)]
        graphs.append((graph, outs, torch.cuda.Stream()))  # type: ignore[no-untyped-call]
    for _ in range(5):
        for graph, outs, stream in graphs:
            with torch.cuda.stream(stream):
                for out in outs:
                    out.zero_()
                graph.replay()
        # Beside an eager launch.
        assert torch.equal(attend(q), expected)
        torch.cuda.synchronize()
        for _, outs, _ in graphs:
            assert all(torch.equal(out, expected) for out in outs)
