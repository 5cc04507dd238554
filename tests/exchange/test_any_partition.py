"""Partitions that cut each request in another way, "whole" and callers' own: every strategy, cache and window against the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from inputs.cases import EXCHANGES, STRIPED_EXCHANGES, AttentionCase
from inputs.own_partitions import OwnPartition
from inputs.strategies import Batch

import cpattn
from cpattn.testing import run_loopback

all_exchanges = pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)
# Long and short ones, some without a prefix, some without anything new, and a decode step.
BATCH = [(37, 60), (0, 41), (90, 1), (0, 0), (5, 0), (12, 7), (0, 2)]
# Each window over few ranks and over more: what it leaves of a chunk does not depend on their number.
WINDOWS = [(None, 1), (9, 1), (1, 2), (70, 2), (None, 3), (9, 3), (1, 5), (70, 5)]
all_windows = pytest.mark.parametrize(("window", "cp_size"), WINDOWS, ids=str)


@all_exchanges
@all_windows
def test_random_partitions(strategy: str, cache: str, cp_size: int, window: int | None) -> None:
    if cache == "sharded":
        # It refuses windows; more cuts instead.
        seeds, window = range(10 * (window or 0), 10 * (window or 0) + 2), None
    else:
        seeds = range(2)
    for seed in seeds:
        case = AttentionCase(BATCH, cache=cache, window=window, page_size=5, seed=seed, sinks=seed == 1)
        case.check_loopback(case.plan(cp_size, partition=OwnPartition(seed), pad_to=[1, 4][seed % 2]), strategy, "reference")


@all_exchanges
@all_windows
def test_whole_requests(strategy: str, cache: str, cp_size: int, window: int | None) -> None:
    case = AttentionCase(BATCH, cache=cache, window=None if cache == "sharded" else window, page_size=5, seed=window or 0)
    case.check_loopback(case.plan(cp_size, partition="whole", pad_to=4), strategy, "reference")


@pytest.mark.parametrize(("strategy", "cache"), [*EXCHANGES, *STRIPED_EXCHANGES])
def test_whole_requests_of_a_latent(strategy: str, cache: str) -> None:
    case = AttentionCase(BATCH, kv_heads=1, v_head_dim=8, v_in_k=True, cache=cache)
    case.check_loopback(case.plan(3, partition="whole"), strategy, "cpu")


@pytest.mark.parametrize(("strategy", "cache"), [*EXCHANGES, *STRIPED_EXCHANGES])
@pytest.mark.parametrize("cp_size", [2, 3])
def test_with_another_kernel(strategy: str, cache: str, cp_size: int) -> None:
    case = AttentionCase(BATCH, cache=cache, dtype=torch.bfloat16, overlap=2 if strategy == "all_gather" else None)
    case.check_loopback(case.plan(cp_size, partition=OwnPartition(7)), strategy, "cpu")


BUCKET = cpattn.Bucket(max_requests=8, max_rows=160, max_chunks=70, max_seqlen=160)
IN_BUCKETS = [
    ("all_gather", "paged", 9),
    ("all_gather", "paged", None),
    ("all_gather", "packed", 9),
    ("ring", "paged", None),
    ("ring", "packed", None),
    ("pass_q", "packed", None),
    ("pass_q", "sharded", None),
    ("pass_q_ring", "packed", None),
    ("pass_q_ring", "sharded", None),
]


@pytest.mark.parametrize(("strategy", "cache", "window"), IN_BUCKETS)
@pytest.mark.parametrize("cp_size", [2, 5])
def test_through_a_bucket(strategy: str, cache: str, window: int | None, cp_size: int) -> None:
    """One rank's metadata, refilled with layouts that have nothing in common."""
    batches = [BATCH, [(11, 3)], [], [(20, 50), (60, 1), (0, 9)]]
    if cache == "packed":  # in a bucket, no prefix at all
        batches = [[(0, extend_len) for _, extend_len in batch] for batch in batches]
    check_in_a_bucket(batches, [OwnPartition(seed) for seed in range(len(batches))], (strategy, cache, window), cp_size)


def check_in_a_bucket(
    batches: list[Batch], partitions: Sequence[str | OwnPartition], how: tuple[str, str, int | None], cp_size: int
) -> None:
    strategy, cache, window = how
    cases = [AttentionCase(batch, cache=cache, window=window, page_size=5, seed=seed) for seed, batch in enumerate(batches)]
    plans = [case.plan(cp_size, partition=partition) for case, partition in zip(cases, partitions, strict=True)]

    def program(communicator: cpattn.Communicator) -> list[tuple[torch.Tensor, torch.Tensor]]:
        meta = plans[-1].metadata(communicator.rank, bucket=BUCKET)
        outputs = []
        for case, plan in zip(cases, plans, strict=True):
            meta.copy_(plan)
            outputs.append(case.on_rank(plan, communicator.rank, communicator, strategy, "reference", meta=meta))
        return outputs

    for case, plan, *outputs in zip(cases, plans, *run_loopback(program, cp_size), strict=True):
        case.check(outputs, plan, strategy, "reference")


@pytest.mark.parametrize(
    ("strategy", "cache", "window"), [*IN_BUCKETS, ("ring", "paged", 9), ("pass_q", "packed", 9), ("pass_q_ring", "packed", 9)]
)
@pytest.mark.parametrize("cp_size", [1, 3])
def test_whole_requests_through_a_bucket(strategy: str, cache: str, window: int | None, cp_size: int) -> None:
    """A rank has at most two chunks of any request, so that a window over its shard takes as many launches for each batch. Cut ones may
    follow."""
    batches = [BATCH, [(11, 3)], [], [(20, 50), (60, 1), (0, 9)]]
    if cache == "packed":
        batches = [[(0, extend_len) for _, extend_len in batch] for batch in batches]
    check_in_a_bucket(batches, ["whole", "zigzag", "whole", "uncut"], (strategy, cache, window), cp_size)


@pytest.mark.parametrize("strategy", ["ring", "pass_q", "pass_q_ring"])
def test_a_window_over_shards_in_a_bucket_is_refused(strategy: str) -> None:
    meta = cpattn.plan([(0, 9)], 1, partition=OwnPartition(0)).metadata(0, bucket=BUCKET)
    x = torch.randn(meta.rows, 2, 8)
    with pytest.raises(
        cpattn.UnsupportedError, match=r"launches over a partition of your own change in number.*'all_gather', 'ulysses' could"
    ):
        cpattn.cp_attention(x, x, x, meta, window=3, strategy=strategy)
    assert torch.isfinite(cpattn.cp_attention(x, x, x, meta, window=3)).all()


def test_ranks_with_different_partitions_find_out() -> None:
    x = torch.randn(40, 2, 8)

    def program(communicator: cpattn.Communicator) -> str:
        meta = cpattn.build_metadata([(0, 40)], 2, communicator.rank, partition=OwnPartition(communicator.rank), pad_to=40)
        local = cpattn.shard(x, meta)
        with pytest.raises(cpattn.DisagreementError) as refusal:
            cpattn.cp_attention(local, local, local, meta, group=communicator, check=True)
        return str(refusal.value)

    for message in run_loopback(program, 2):
        assert "the ranks disagree on the plan: rank 0: Plan(1 requests, 40 tokens, " in message
