"""The spans that estimates count are those that ranks attend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cpattn
from cpattn.costs.hop_spans import RankSpans, sample, spans_of
from cpattn.exchange.schedule import Hop, hop_pairs
from cpattn.exchange.step_spans import (
    cached_spans,
    causal_spans,
    gathered_source_spans,
    new_token_spans,
    prefix_spans,
    shard_spans,
    source_spans,
)
from cpattn.metadata.united import UnitedRows
from cpattn.spans import HostSpans, Spans

BATCH = [(40, 131), (0, 57), (9, 3), (64, 1), (30, 0), (0, 2)]
SHARDED = [[prefix // 3 + (rank < prefix % 3) for rank in range(3)] for prefix, _ in BATCH]
PLANS = {
    "zigzag": cpattn.plan(BATCH, 3),
    "contiguous, padded": cpattn.plan(BATCH, 3, partition="contiguous", pad_to=16),
    "sharded": cpattn.plan(BATCH, 3, prefix_shards=SHARDED),
    "striped": cpattn.plan(BATCH, 3, owner=cpattn.Striped(4)),
    "one rank": cpattn.plan(BATCH, 1),
}


def of_rank(parts: list[tuple[RankSpans, int]], rank: int) -> list[tuple[int, ...]]:
    """Of one rank, those that see anything, sorted."""
    assert {count for _, count in parts} == {1}
    columns = [np.stack([spans.q_len, spans.k_len, spans.diagonal])[:, (spans.rank == rank) & (spans.k_len > 0)] for spans, _ in parts]
    return sorted(map(tuple, np.concatenate(columns, axis=1).T.tolist()))


def seen(host: HostSpans) -> list[tuple[int, ...]]:
    columns = np.stack([host.q_len, host.k_len, host.diagonal])[:, host.k_len > 0]
    return sorted(map(tuple, columns.T.tolist()))


@pytest.mark.parametrize("name", PLANS)
def test_spans_are_those_of_ranks(name: str) -> None:
    plan = PLANS[name]
    problem = cpattn.Problem(torch.device("cpu"), torch.bfloat16, plan.rows, 4, 2, 16, 16, cache="packed")
    for strategy in cpattn.STRATEGIES.values():
        if strategy.refusal(problem, plan):
            continue
        for hop in strategy.schedule(problem, plan):
            for rank in range(plan.cp_size):
                assert of_rank(list(spans_of(plan, hop)), rank) == seen(attended(plan.metadata(rank), hop)), (strategy.name, hop)


def attended(meta: cpattn.CPMetadata, hop: Hop) -> HostSpans:
    """What a rank's own spans of the hop are."""
    if hop.united > 1:
        return attended(UnitedRows.of(meta, hop.united).meta, hop._replace(united=1))
    rank, size = meta.cp_rank, meta.plan.cp_size
    if hop.keys == "all":
        return causal_spans(meta, paged=False).host
    if hop.keys == "prefix":
        return prefix_spans(meta, None, paged=False).host
    if hop.keys == "new":
        new: Spans = new_token_spans(meta)
        return new.host
    if hop.keys == "cached":
        cached: tuple[Spans, Spans] = cached_spans(meta, paged=False)
        return cached[hop.queries == "others"].host
    if isinstance(hop.queries, int):
        by_rank: list[list[Spans]] = source_spans(meta, None, paged=False) if hop.queries else shard_spans(meta, None)
        spans: Spans = by_rank[(rank - hop.queries - hop.keys) % size][0]
        return spans.host
    gathered: Spans = gathered_source_spans(meta, None, paged=False)[0]
    return gathered.host


def test_a_sample_of_a_long_ring_stands_for_all_of_it() -> None:
    """The hops that are looked at have 2% more or fewer pairs than all."""
    plan = cpattn.plan([(0, 65536), (3000, 9000)], 64)
    problem = cpattn.Problem(torch.device("cpu"), torch.bfloat16, plan.rows, 4, 2, 16, 16)
    hops = cpattn.STRATEGIES["ring"].schedule(problem, plan)[-plan.cp_size :]
    all_pairs = sum(int(hop_pairs(plan, hop).sum()) for hop in hops[1:])
    looked_at = sample(1, plan.cp_size)
    assert sum(count for _, count in looked_at) == plan.cp_size - 1 > len(looked_at)
    assert sum(count * int(hop_pairs(plan, hops[number]).sum()) for number, count in looked_at) == pytest.approx(all_pairs, rel=0.02)
