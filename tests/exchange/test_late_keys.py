"""Which rows come late, and in which order, against the layout of the batch read row by row."""

from __future__ import annotations

import numpy as np
import pytest

import cpattn
from cpattn.exchange.late_keys import PIECE_ROWS, late_tables

BATCHES = [
    [(0, 777), (640, 300), (0, 3), (997, 1), (64, 0)],
    [(0, 1)],
    [(5, 0), (0, 1), (33, 2)],
    [(0, 200)],
    [(0, 16)] * 9,
]


@pytest.mark.parametrize("partition", ["zigzag", "contiguous", "whole"])
@pytest.mark.parametrize("cp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", BATCHES)
def test_tables_bring_what_is_seen_and_not_here(batch: list[tuple[int, int]], cp_size: int, partition: str) -> None:
    plan = cpattn.plan(batch, cp_size, partition=partition, pad_to=8)
    gathered, at = {}, 0
    for request, (prefix, extend) in enumerate(batch):
        gathered.update({(request, token): at + prefix + token for token in range(extend)})
        at += prefix + extend
    for rank in range(cp_size):
        meta = plan.metadata(rank)
        tables = late_tables(meta, at)
        source = np.full(-(-at // PIECE_ROWS) * PIECE_ROWS, -1)
        own = np.full(plan.rows, -1)
        seen = dict.fromkeys(range(len(batch)), 0)
        for chunk in plan.chunks:
            if chunk.rank == rank:
                seen[chunk.request] = max(seen[chunk.request], chunk.start + chunk.length)
        for chunk, first in zip(plan.chunks, plan.chunk_rows, strict=True):
            for i in range(chunk.length):
                key = gathered[chunk.request, chunk.start + i]
                if chunk.rank == rank:
                    own[first + i] = key
                elif chunk.start + i < seen[chunk.request]:
                    source[key] = chunk.rank * plan.rows + first + i
        assert tables.own_rows.tolist() == own.tolist()
        assert tables.source.tolist() == source.tolist()
        late = (source.reshape(-1, PIECE_ROWS) >= 0).any(1)
        assert tables.late.tolist() == late.tolist()
        order = tables.order.tolist()
        assert sorted(piece for piece in order if piece >= 0) == np.flatnonzero(late).tolist()
        assert all(piece < 0 for piece in order[int(late.sum()) :])


def test_the_longest_request_comes_first_and_in_it_the_last_keys() -> None:
    plan = cpattn.plan([(0, 128), (0, 1024), (0, 1024)], 2)
    order = [piece for piece in late_tables(plan.metadata(0), 2176).order.tolist() if piece >= 0]
    # Rank 0 has the first and the last quarter of each request, rank 1 those between.
    assert order == [*range(55, 23, -1), *range(119, 87, -1), 5, 4, 3, 2]


def test_another_batch_in_a_bucket_has_its_own() -> None:
    bucket = cpattn.Bucket(max_requests=4, max_rows=64, max_chunks=8)
    first, second = (cpattn.plan(batch, 2) for batch in ([(0, 100), (0, 20)], [(0, 30), (0, 5), (0, 60)]))
    meta = first.metadata(1, bucket=bucket)
    tables = late_tables(meta, 128)
    meta.copy_(second)
    for mine, theirs in zip(tables, late_tables(second.metadata(1, bucket=bucket), 128), strict=True):
        assert mine.tolist() == theirs.tolist()
