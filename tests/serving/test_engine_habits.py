"""What engines do that a library may not have thought of: modes, static buffers, other buckets, sinks that are off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.testing import oracle_attention, run_loopback
from cpattn.transports.in_flight import InFlight

BATCH = [(40, 30), (0, 33), (5, 1)]


@pytest.mark.parametrize("strategy", list(cpattn.STRATEGIES))
@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)], ids=["first", "second"])
def test_warming_up_in_one_mode_and_serving_in_another(
    modes: tuple[Callable[[], AbstractContextManager[None]], ...], strategy: str
) -> None:
    case = AttentionCase(BATCH)
    plan = case.plan(3)

    def program(communicator: cpattn.Communicator) -> tuple[Tensor, Tensor]:
        for mode in modes:
            with mode():
                result = case.on_rank(plan, communicator.rank, communicator, strategy, "cpu")
        return result

    outputs = run_loopback(program, 3)
    case.check([(out.clone(), lse.clone()) for out, lse in outputs], plan, strategy, "cpu")


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("strategy", ["ring", "pass_q", "pass_q_ring"])
def test_an_engines_kernel_with_memory_of_its_own(strategy: str, window: int | None) -> None:
    """It returns the same tensors at every call, and for queries that see nothing NaN and an LSE of +inf."""
    reference = cpattn.BACKENDS["reference"]

    def rank_program(communicator: cpattn.Communicator) -> tuple[Tensor, Tensor]:
        memory: dict[int, tuple[Tensor, Tensor]] = {}

        def kernel(
            q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, *, scale: float, window: int | None, out_dtype: torch.dtype,
            **others: object,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            out, lse = reference.run(q, k, v, rows, AttentionOptions(scale, window), out_dtype)
            static = memory.setdefault(len(q), (torch.empty_like(out), torch.empty_like(lse)))
            blind = lse == -torch.inf
            static[0].copy_(torch.where(blind[..., None], torch.nan, out))
            static[1].copy_(torch.where(blind, torch.inf, lse))
            return static

        return case.on_rank(plan, communicator.rank, communicator, strategy, kernel)

    case = AttentionCase(BATCH, window=window)
    plan = case.plan(3, partition="contiguous", pad_to=8)
    case.check(run_loopback(rank_program, 3), plan, strategy, "reference")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_a_sink_that_is_off(strategy: str, backend: str) -> None:
    case = AttentionCase(BATCH, sinks=True)
    sinks = case.options["sinks"]
    assert isinstance(sinks, Tensor)
    sinks[1] = -torch.inf
    for out, lse in run_loopback(lambda c: case.on_rank(plan, c.rank, c, strategy, backend), (plan := case.plan(3, pad_to=8)).cp_size):
        expected, expected_lse = case.expected
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)


def test_ranks_with_different_buckets_find_out() -> None:
    batch = [(0, 40)]
    x = torch.randn(40, 2, 8)

    def program(communicator: cpattn.Communicator) -> str:
        bucket = cpattn.Bucket(4, 48 if communicator.rank else 32, 8)
        meta = cpattn.build_metadata(batch, 2, communicator.rank, bucket=bucket)
        local = cpattn.shard(x, meta)
        with pytest.raises(cpattn.DisagreementError, match="arguments") as refusal:
            cpattn.cp_attention(local, local, local, meta, group=communicator, check=True)
        with pytest.raises(cpattn.DisagreementError):
            cpattn.unshard(local, meta, group=communicator, check=True)
        return str(refusal.value)

    for message in run_loopback(program, 2):
        assert "max_rows=48" in message


def test_a_bucket_refuses_what_a_graph_over_it_could_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    class Capturing(InFlight):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.captures = True

    monkeypatch.setattr("cpattn.call.attention.InFlight", Capturing)
    bucket = cpattn.Bucket(4, 16, 8, max_seqlen=4096)
    x = torch.randn(16, 2, 8)
    bare = cpattn.build_metadata([(0, 8)], 1, 0, bucket=bucket)
    cpattn.cp_attention(x, x, x, bare)
    with pytest.raises(cpattn.PlanError, match="captured without a kv_cache"):
        bare.copy_(cpattn.plan([(100, 8)], 1))
    assert bare.num_tokens == 8
    paged = cpattn.build_metadata([(0, 8)], 1, 0, bucket=bucket)
    pages = torch.zeros(2, 4, 4, 2, 8)
    cache = cpattn.PagedKV(pages[0], pages[1], torch.tensor([[0, 1]] * 4, dtype=torch.int32))
    cpattn.cp_attention(x, x, x, paged, kv_cache=cache, backend="reference")
    with pytest.raises(cpattn.PlanError, match="a page table for 8"):
        paged.copy_(cpattn.plan([(4, 5)], 1))
    paged.copy_(cpattn.plan([(3, 5)], 1))
    with pytest.raises(cpattn.PlanError, match="those of a bucket cannot"):
        _ = paged.key_places


def test_a_bucket_shards_and_unshards_in_its_own_sizes() -> None:
    bucket = cpattn.Bucket(4, 16, 8)
    meta = cpattn.build_metadata([], 1, 0, bucket=bucket)
    for extend in (5, 0, 16):
        meta.copy_(cpattn.plan([(0, extend)], 1))
        x = torch.randn(extend, 3)
        whole = cpattn.unshard(cpattn.shard(x, meta), meta)
        assert whole.shape == (16, 3)
        assert torch.equal(whole[:extend], x)
        assert (whole[extend:] == 0).all()


def test_slots_of_a_sharded_cache_are_those_of_the_local_rows() -> None:
    shards = [[3, 1], [0, 2]]
    meta = cpattn.build_metadata([(4, 3), (2, 1)], 2, 0, prefix_shards=shards, pad_to=4)
    table = torch.tensor([[6, 1], [3, 0]])
    slots = cpattn.slot_mapping(meta, table, page_size=4).tolist()
    request, number = (place.tolist() for place in meta.held_places)
    assert slots == [-1 if n < 0 else int(table[r, n // 4]) * 4 + n % 4 for r, n in zip(request, number, strict=True)]
    assert slots[0] == 6 * 4 + 3


@pytest.mark.parametrize("requests", [1, 3, 4, 8])
def test_decoding_spreads_each_request_over_all_ranks(requests: int) -> None:
    held = [[4, 0, 0, 0]] * requests
    for _ in range(64):
        plan = cpattn.plan([(sum(shares), 1) for shares in held], 4, prefix_shards=held)
        held = (plan.shard_lens + plan.rank_extends).tolist()
    for shares in held:
        assert sum(shares) == 68
        assert max(shares) - min(shares) <= 12, held


def test_engines_padding_of_pages_and_tables_changes_nothing() -> None:
    """A page table with more lines and columns than the batch needs."""
    batch = [(4, 3), (2, 1)]
    k = torch.randn(6, 1, 8)
    meta = cpattn.build_metadata(batch, 1, 0)
    x = torch.randn(4, 1, 8)
    outs = []
    for lines, columns in ((2, 2), (5, 9)):
        pages = torch.full((2, 8, 4, 1, 8), torch.nan)
        table = torch.full((lines, columns), -7, dtype=torch.int32)
        table[0, :2], table[1, :1] = torch.tensor([5, 2]), torch.tensor([7])
        pages[:, 5], pages[:, 7, :2] = k[:4], k[4:]
        outs.append(cpattn.cp_attention(x, x, x, meta, kv_cache=cpattn.PagedKV(pages[0], pages[1], table)))
    expected, _ = oracle_attention(x, x, x, batch, prefix_k=k, prefix_v=k)
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(outs[0].double(), expected, rtol=0, atol=1e-5)
