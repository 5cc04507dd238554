"""Integers of numpy of every width are as good as Python's: no sum or product of theirs overflows, and what comes back is an int."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cpattn

WIDTHS: list[Any] = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


@pytest.fixture(autouse=True)
def _overflow_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("integer", WIDTHS, ids=lambda width: width.__name__)
class TestWidths:
    def test_required_rows(self, integer: Any) -> None:
        batch = [(0, 1000), (integer(3), integer(100))]
        for cp_size, pad_to in ((100, 64), (1, 127), (127, 1)):
            rows = cpattn.required_rows(batch, integer(cp_size), pad_to=integer(pad_to))
            expected = cpattn.plan([(0, 1000), (3, 100)], cp_size, pad_to=pad_to).rows
            assert rows == expected == cpattn.plan(batch, integer(cp_size), pad_to=integer(pad_to)).rows
            assert type(rows) is int

    def test_shares_of_a_prefix(self, integer: Any) -> None:
        plan = cpattn.plan([(250, 1)], integer(2), prefix_shards=[[integer(125), integer(125)]])
        assert plan == cpattn.plan([(250, 1)], 2, prefix_shards=[[125, 125]])

    def test_a_bucket(self, integer: Any) -> None:
        bucket = cpattn.Bucket(integer(4), integer(100), integer(100))
        assert bucket == cpattn.Bucket(4, 100, 100)
        assert all(type(size) is int for size in (bucket.max_requests, bucket.max_rows, bucket.max_chunks))
        # 100 ranks of 100 rows are more than a narrow integer holds.
        assert cpattn.plan([(0, 600)], 100).fits(bucket)

    def test_sizes_of_pages(self, integer: Any) -> None:
        meta = cpattn.build_metadata([(200, 1)], 1, integer(0))
        assert cpattn.slot_mapping(meta, torch.arange(4)[None], integer(64)).tolist() == [200]

    def test_options_of_a_call(self, integer: Any) -> None:
        meta = cpattn.build_metadata([(0, 9)], 1, 0)
        q, k = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
        for options in ({"window": 3}, {"overlap": 2}, {"scale": 1}, {"softcap": 2}):
            numbers = {name: integer(value) for name, value in options.items()}
            got, want = (cpattn.cp_attention(q, k, k, meta, **given) for given in (numbers, options))
            assert torch.equal(got, want)
        latent = cpattn.cp_attention(q, k, None, meta, v_dim=integer(8))
        assert torch.equal(latent, cpattn.cp_attention(q, k, None, meta, v_dim=8))

    def test_an_axis_and_a_layer(self, integer: Any) -> None:
        meta = cpattn.build_metadata([(0, 6)], 2, 0)
        x = torch.arange(18).view(3, 6)
        assert torch.equal(cpattn.shard(x, meta, dim=integer(1)), cpattn.shard(x, meta, dim=1))
        pool = cpattn.KVPool(integer(8), integer(4), integer(2), integer(1), integer(8))
        pool.admit("a")
        assert pool.layer(integer(1), pool.page_table(["a"])).page_size == 4
