"""Ranks as threads that share the memory of one GPU, with sizes at which many programs run at once; tests/kernels has the small ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase

import cpattn
from cpattn.testing import run_loopback

BATCHES = [[(0, 777), (640, 300), (0, 3), (997, 1), (64, 0)], [(0, 1)], [(0, 13)] * 7]


def case_of(batch: list[tuple[int, int]], cache: str, head_dim: int = 128) -> AttentionCase:
    return AttentionCase(batch, heads=8, kv_heads=2, head_dim=head_dim, dtype=torch.bfloat16, device="cuda", cache=cache)


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize(
    ("strategy", "cache"),
    [
        ("all_gather", "packed"), ("all_gather", "paged"), ("ring", "packed"), ("ring", "striped"), ("pass_q", "sharded"),
        ("pass_q_ring", "sharded"),
    ],
)  # fmt: skip
def test_bits_are_those_of_copies(size: int, strategy: str, cache: str) -> None:
    cases = [case_of(batch, cache) for batch in BATCHES]

    def program(group: cpattn.Transport) -> list[list[torch.Tensor]]:
        transports = [cpattn.transport(group, kind="peer_memory"), group]
        results = []
        for case in cases:
            plan = case.plan(size, pad_to=8)
            both = [case.on_rank(plan, group.rank, transport, strategy, "triton") for transport in transports]
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(*both, strict=True)), case.batch
            results.append(both[0])
        return results  # type: ignore[return-value]

    by_rank = run_loopback(program, size)
    for n, case in enumerate(cases):
        outputs: Any = [results[n] for results in by_rank]
        case.check(outputs, case.plan(size, pad_to=8), strategy, "triton")


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_one_graph_of_all_ranks_replays_it(strategy: str) -> None:
    """They launch on one stream, in an order in which nothing waits: so does a graph that captures it."""
    size, group = 3, cpattn.LoopbackGroup(3)
    ends = [group.transport(rank) for rank in range(size)]
    metas = [cpattn.build_metadata([(0, 300), (0, 5)], size, rank, device="cuda") for rank in range(size)]
    inputs = [[torch.randn(meta.rows, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)] for meta in metas]

    def call(kind: str) -> list[Any]:
        def program(here: cpattn.Transport) -> Any:
            end, (q, k, v) = ends[here.rank], inputs[here.rank]
            end = cpattn.transport(end, kind="peer_memory") if kind == "peer_memory" else end
            return cpattn.cp_attention(q, k, v, metas[here.rank], group=end, strategy=strategy, backend="triton")

        return run_loopback(program, size)

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call("peer_memory")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Each rank has a thread of its own.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        outs = call("peer_memory")
    for _ in range(4):
        for tensors in inputs:
            for x in tensors:
                x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(outs, call("loopback"), strict=True))
    for end in ends:
        cpattn.check(cpattn.transport(end, kind="peer_memory"))
