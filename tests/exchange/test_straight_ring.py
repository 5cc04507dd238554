"""A ring in which few keys are needed: they come straight from their owners, and the result is that of any ring."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inputs.cases import AttentionCase
from inputs.own_partitions import OwnPartition

import cpattn
from cpattn.exchange.ring_keys import explain_ring_keys, ring_keys
from cpattn.exchange.schedule import num_results
from cpattn.metadata import needed_keys
from cpattn.testing import run_loopback

# One request that is cut among all ranks, beside some that are short.
MIXED = [(3, 90), (0, 5), (7, 0), (40, 9), (0, 6), (0, 13), (21, 1), (0, 8)]


@pytest.mark.parametrize("window", [None, 1, 12])
@pytest.mark.parametrize("cache", ["packed", "sharded"])
@pytest.mark.parametrize(
    "options", [{"partition": "whole", "pad_to": 4}, {}, {"partition": OwnPartition(3)}], ids=["mixed", "zigzag", "own"]
)
def test_results_and_bytes(cache: str, options: Any, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if cache == "sharded" and window is not None:
        return  # which it refuses
    monkeypatch.setattr(needed_keys, "MOST_NEEDED", 1.0)
    case = AttentionCase(MIXED, cache=cache, window=window, page_size=5, sinks=True)
    plan = case.plan(3, **options)
    travels = ring_keys(case.problem(plan), plan)
    assert travels.straight

    def program(group: cpattn.Transport) -> Any:
        meta, before = plan.metadata(group.rank), group.bytes_sent
        case.on_rank(plan, group.rank, group, "ring", "reference", meta=meta)
        # Its result is gathered as well, with its LSE.
        gathered = 2 * plan.rows * (case.heads * 16 + case.heads) * 4
        return group.bytes_sent - before - gathered

    sent = run_loopback(program, 3)
    assert sent == (travels.sent.sum(axis=0) * case.problem(plan).key_bytes).tolist()
    for backend in ("reference", "cpu") if window is None else ("reference",):
        case.check_loopback(plan, "ring", backend)


@pytest.mark.parametrize("cache", ["packed", "sharded"])
def test_whole_requests_send_nothing(cache: str) -> None:
    """And take one launch, or of a prefix another one. Of a sharded cache each rank holds what its requests have there."""
    batch = [(5, 12)] * 3

    def one_each(pairs: Any, cp_size: int) -> cpattn.Chunks:
        return cpattn.Chunks(np.arange(3), np.zeros(3, dtype=np.int64), np.full(3, 12), np.arange(3))

    shards = [[5, 0, 0], [0, 5, 0], [0, 0, 5]] if cache == "sharded" else None
    plan = cpattn.plan(batch, 3, partition=one_each, prefix_shards=shards)
    case = AttentionCase(batch, cache=cache, page_size=4)
    schedule = cpattn.STRATEGIES["ring"].schedule(case.problem(plan), plan)
    assert num_results(schedule) == (2 if cache == "packed" else 1)
    assert not any(hop.sent.any() for hop in schedule)
    assert explain_ring_keys(case.problem(plan), plan) == "none travel: each rank holds all that its queries see"
    for backend in ("reference", "cpu"):
        case.check_loopback(plan, "ring", backend)


def test_it_is_explained() -> None:
    batch = [*[(0, 64)] * 10, (0, 32)]
    case = AttentionCase(batch)
    whole, zigzag = (cpattn.plan(batch, 4, partition=partition) for partition in ("whole", "zigzag"))
    assert explain_ring_keys(case.problem(whole), whole) == (
        "a rank receives those that its queries see from their owners, at most 14.0 KiB of 126.0 KiB, in 3 of 3 hops: the busiest rank "
        "receives or sends 11% of all, within 67%"
    )
    assert explain_ring_keys(case.problem(zigzag), zigzag) == (
        "all go around, so that a rank receives 126.0 KiB, of which its queries see at most 126.0 KiB: the busiest rank receives or sends "
        "100% of all, which is above 67%"
    )
