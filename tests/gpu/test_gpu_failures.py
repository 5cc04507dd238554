"""Calls that fail on a GPU: over NCCL, in a capture, on other streams, and NaN that must not pass for a query without keys."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from programs import fault_programs as programs
from programs.failed_calls import Faults, attend_with_faults, check_partly_failed
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.testing import ProcessRanks, SoloCommunicator, run_loopback

EXCHANGES = [
    ("all_gather", "packed"),
    ("all_gather", "paged"),
    ("ring", "packed"),
    ("ring", "sharded"),
    ("pass_q", "sharded"),
    ("pass_q_ring", "sharded"),
]
MIXED = [(0, 331), (64, 157), (0, 3), (97, 1), (30, 0), (0, 1)]
FIELDS: dict[str, Any] = {"batch": MIXED, "heads": 8, "kv_heads": 4, "head_dim": 64, "dtype": torch.bfloat16, "device": "cuda"}


@pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)
def test_a_fault_anywhere_keeps_ranks_in_step_over_nccl(strategy: str, cache: str) -> None:
    draw = random.Random(f"{strategy} {cache}")
    with ProcessRanks(2, timeout=60, transport="nccl") as ranks:
        for backend in ("triton", "reference"):
            cases = [{**FIELDS, "cache": cache, "overlap": draw.choice([1, 2, 4]), "seed": seed} for seed in range(12)]
            faults = [Faults({rank: draw.randrange(300) for rank in draw.choice([[0], [1], [0, 1]])}) for _ in cases]
            results = ranks.run(programs.fail_and_go_on, cases, faults, strategy, backend)
            for n, fields in enumerate(cases):
                case = AttentionCase(**fields)
                plan = case.plan(ranks.size)
                check_partly_failed(case, plan, strategy, [result[n][0] for result in results])
                outputs = [tuple(x.cuda() for x in result[n][1]) for result in results]
                case.check(outputs, plan, strategy, backend)


@pytest.mark.parametrize("backend", ["triton", "flash_attn4", "flash_attn3", "torch_flash", "reference"])
@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q"])
@pytest.mark.parametrize("batch", [[(0, 700), (0, 90)], [(0, 5), (0, 2)]], ids=["long", "short"])
def test_keys_that_are_missing_make_nan_and_nothing_else(batch: list[tuple[int, int]], strategy: str, backend: str) -> None:
    """Whatever a kernel says of NaN scores, no query that sees them comes out finite."""
    case = AttentionCase(batch, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda")
    plan = case.plan(2)
    try:
        case.on_rank(case.plan(1), 0, None, "all_gather", backend)
    except cpattn.UnsupportedError as error:
        pytest.skip(str(error))
    failures = 0
    for line in (0, 3, 10, 30, 60, 90):

        def program(group: cpattn.Communicator, line: int = line) -> tuple[Tensor, Tensor] | None:
            return attend_with_faults(case, plan, group, group.rank, strategy, backend, Faults({1: line}))

        results = run_loopback(program, 2, timeout=60)
        failures += results[1] is None
        check_partly_failed(case, plan, strategy, results)
    assert failures


def test_a_call_from_another_stream_waits_for_the_last_one() -> None:
    """The buffers of a call are read by its attention, long after the host has gone on to the next call."""
    group = SoloCommunicator(0, 2)
    long, short = ([torch.randn(rows, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)] for rows in (16384, 256))
    metas = [cpattn.build_metadata([(0, 2 * len(x[0]))], 2, 0, "cuda") for x in (long, short)]

    def call(tensors: list[Tensor], meta: cpattn.CPMetadata) -> Tensor:
        q, k, v = tensors
        return cpattn.cp_attention(q, k, v, meta, group=group, strategy="all_gather", backend="torch_flash")

    expected = [call(tensors, meta).clone() for tensors, meta in zip((long, short), metas, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]  # type: ignore[no-untyped-call]
    for _ in range(5):
        got = []
        for stream, tensors, meta in zip(streams, (long, short), metas, strict=True):
            with torch.cuda.stream(stream):
                got.append(call(tensors, meta))
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_a_capture_that_fails_leaves_the_group_as_it_was() -> None:
    group = SoloCommunicator(0, 2)
    meta = cpattn.build_metadata([(0, 64)], 2, 0, "cuda")
    x = torch.randn(32, 2, 64, device="cuda", dtype=torch.bfloat16)

    def call(backend: Any) -> Tensor:
        return cpattn.cp_attention(x, x, x, meta, group=group, strategy="ring", backend=backend)

    def fails_in_a_capture(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, *, out_dtype: torch.dtype, **options: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            raise MemoryError("no memory in a capture")
        return cpattn.BACKENDS["reference"].run(q, k, v, rows, AttentionOptions(**options), out_dtype)

    expected = call(fails_in_a_capture).clone()
    with pytest.raises(MemoryError, match="no memory in a capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        call(fails_in_a_capture)
    assert torch.equal(call(fails_in_a_capture), expected)


def test_released_memory_that_a_graph_has_captured_stays() -> None:
    group = SoloCommunicator(0, 2)
    meta = cpattn.build_metadata([(0, 512)], 2, 0, "cuda")
    x = torch.randn(256, 2, 64, device="cuda", dtype=torch.bfloat16)

    def call() -> Tensor:
        return cpattn.cp_attention(x, x, x, meta, group=group, strategy="all_gather", backend="torch_flash")

    expected = call().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    cpattn.release()
    # Whatever takes the memory's place now would be overwritten, or read, by the replay.
    others = [torch.full((1 << 16,), 7.0, device="cuda") for _ in range(64)]
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    assert all(bool((other == 7).all()) for other in others)
