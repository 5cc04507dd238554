"""Which rows come late, and in which order, against the layout of the batch read row by row."""

from __future__ import annotations

import numpy as np
import pytest

import cpattn
from cpattn.exchange.key_order import key_order
from cpattn.exchange.late_keys import late_tables
from cpattn.kernels.arrival_layout import PIECE_ROWS
from cpattn.keys import PREFIX_UNIT

BATCHES = [
    [(0, 777), (640, 300), (0, 3), (997, 1), (64, 0)],
    [(0, 1)],
    [(5, 0), (0, 1), (33, 2)],
    [(0, 200)],
    [(0, 16)] * 9,
]


@pytest.mark.parametrize("in_place", [False, True], ids=["all in order", "prefixes in place"])
@pytest.mark.parametrize("partition", ["zigzag", "contiguous", "whole"])
@pytest.mark.parametrize("cp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", BATCHES)
def test_tables_bring_what_is_seen_and_not_here(batch: list[tuple[int, int]], cp_size: int, partition: str, in_place: bool) -> None:
    plan = cpattn.plan(batch, cp_size, partition=partition, pad_to=8)
    gathered, at = {}, 0
    for request, (prefix, extend) in enumerate(batch):
        prefix %= PREFIX_UNIT if in_place else 10**9
        gathered.update({(request, token): at + prefix + token for token in range(extend)})
        at += prefix + extend
    for rank in range(cp_size):
        meta = plan.metadata(rank)
        order = key_order(meta, packed=True, in_place=in_place)
        assert order.rows == at
        tables = late_tables(meta, order)
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
        count, *pieces = tables.order.tolist()
        assert sorted(pieces[:count]) == np.flatnonzero(late).tolist()
        assert all(piece < 0 for piece in pieces[count:])


def test_the_longest_request_comes_first_and_in_it_the_last_keys() -> None:
    plan = cpattn.plan([(0, 128), (0, 1024), (0, 1024)], 2)
    count, *order = late_tables(plan.metadata(0), key_order(plan.metadata(0), False, False)).order.tolist()
    # Rank 0 has the first and the last quarter of each request, rank 1 those between.
    assert order[:count] == [*range(55, 23, -1), *range(119, 87, -1), 5, 4, 3, 2]


def test_another_batch_in_a_bucket_has_its_own() -> None:
    bucket = cpattn.Bucket(max_requests=4, max_rows=64, max_chunks=8)
    first, second = (cpattn.plan(batch, 2) for batch in ([(0, 100), (0, 20)], [(0, 30), (0, 5), (0, 60)]))
    meta = first.metadata(1, bucket=bucket)
    tables = late_tables(meta, key_order(meta, False, False))
    meta.copy_(second)
    fresh = second.metadata(1, bucket=bucket)
    for mine, theirs in zip(tables, late_tables(fresh, key_order(fresh, False, False)), strict=True):
        assert mine.tolist() == theirs.tolist()


def test_prefixes_in_place() -> None:
    """What shares a block with new tokens is put before them, and all else is read where it lies."""
    batch = [(300, 5), (0, 7), (256, 3), (40, 0)]
    meta = cpattn.plan(batch, 2).metadata(0)
    order = key_order(meta, packed=True, in_place=True)
    assert order.rows == 44 + 5 + 7 + 3 + 40
    assert order.k_starts.tolist() == [-256, 49, 56 - 256, 59]
    assert order.prefix_places is not None
    assert order.prefix_places.tolist() == [256, 0, 0, 300, 256, 300, 0, 556]
    assert order.prefix_rows is not None
    rows = order.prefix_rows.tolist()
    assert rows[256:300] == [*range(44)]
    assert rows[556:] == [*range(59, 99)]
    assert all(row == -1 for row in [*rows[:256], *rows[300:556]])
    assert order.new_rows is not None
    assert order.new_rows.tolist() == [*range(44, 49), *range(49, 56), *range(56, 59)]
