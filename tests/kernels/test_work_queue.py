"""Launches whose programs draw their work from a queue: one after another, side by side, and replayed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cpattn.attention.rows import RaggedRows
from cpattn.kernels import work_queue
from cpattn.kernels.ragged_attention import ragged_attention
from cpattn.kernels.tiles import cut

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCALE = 0.1


def test_items_in_the_queue_are_all_items_once_and_a_run_has_one_key_range() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        q_len, k_len = (rng.integers(0, most, 20) for most in (300, 900))
        rows = RaggedRows.build(q_len, np.cumsum(k_len) - k_len, k_len, k_len - q_len + 1)
        tiles, _ = cut(rows.host, 32, 64, None)
        heads = int(rng.integers(1, 5))
        number = np.arange(len(tiles.q_begin) * heads)
        # As the kernels do it.
        begin, length = tiles.run_begin[number // heads], tiles.run_tiles[number // heads]
        in_run = number - begin * heads
        tile, head = begin + in_run % length, in_run // length
        assert sorted(tile * heads + head) == number.tolist()
        for at in set(tiles.run_begin.tolist()):
            of_run = tiles.run_begin == at
            assert len(set(tiles.k_start[of_run].tolist())) == len(set(tiles.k_len[of_run].tolist())) == 1
            assert (tiles.run_tiles[of_run] == of_run.sum()).all()


@pytest.fixture
def work() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Attention over rows that keep every program busy several times, and its queries."""
    requests, extend, keys = 40, 100, 333
    q_len, k_len = np.full(requests, extend), np.full(requests, keys)
    rows = RaggedRows.build(q_len, np.arange(requests) * keys, k_len, k_len - q_len + 1, "cuda")
    k, v = torch.randn(2, requests * keys, 4, 64, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(requests * extend, 16, 64, device="cuda", dtype=torch.bfloat16)

    def attend(q: Tensor) -> Tensor:
        return ragged_attention(q, k, v, rows, scale=SCALE)[0]

    return attend, q


@needs_gpu
def test_counters_are_left_as_they_were(work: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    attend, q = work
    expected = attend(q)
    for _ in range(20):
        assert torch.equal(attend(q), expected)
    assert work_queue.counter_for_launch(q.device).item() == 0


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
@pytest.mark.parametrize("pool", [None, 0], ids=["from the pool", "pool exhausted"])
def test_graphs_replayed_at_once(
    work: tuple[Callable[[Tensor], Tensor], Tensor], pool: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, q = work
    expected = attend(q)
    if pool is not None:
        monkeypatch.setattr(work_queue, "_POOL", work_queue._pools[q.device]._taken if q.device in work_queue._pools else 0)
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
