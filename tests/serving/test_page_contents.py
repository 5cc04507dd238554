"""One slot for two tokens: the check page by page against a look at each token."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.paged_caches import random_shards

import cpattn
from cpattn.call.page_contents import check_page_contents

_TOKEN = r"(new|cached) token (\d+) of request (\d+)(?: \(counted on this rank\))?"
_MESSAGE = re.compile(rf"puts {_TOKEN} and {_TOKEN} into the same slot, place (\d+) of page (\d+) ")


@st.composite
def steps(draw: st.DrawFn) -> tuple[cpattn.CPMetadata, torch.Tensor, int]:
    """Small batches over few pages, so that many are shared."""
    batch = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=4))
    cp_size, page_size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shards = random_shards(batch, cp_size, draw(st.integers(0, 99))) if draw(st.booleans()) else None
    meta = cpattn.plan(batch, cp_size, prefix_shards=shards).metadata(draw(st.integers(0, cp_size - 1)))
    width = -(-14 // page_size)
    pages = st.integers(0, draw(st.sampled_from([7, 19, 59])))
    table = draw(st.lists(pages, min_size=len(batch) * width, max_size=len(batch) * width))
    return meta, torch.tensor(table).view(len(batch), width), page_size


def tokens(meta: cpattn.CPMetadata, table: torch.Tensor, page_size: int) -> list[tuple[tuple[int, int], tuple[str, str, str]]]:
    """The page and place of each token that this rank's pages hold after the step, with its kind, number and request."""
    plan, rank = meta.plan, meta.cp_rank
    found = []
    for request, (prefix, extend) in enumerate(plan.batch):
        if plan.sharded:
            prefix, extend = int(plan.shard_lens[request, rank]), int(plan.rank_extends[request, rank])
        for token in range(prefix + extend):
            slot = int(table[request, token // page_size]), token % page_size
            found.append((slot, ("new" if token >= prefix else "cached", str(token), str(request))))
    return found


@given(step=steps(), dtype=st.sampled_from([torch.int32, torch.int64]))
@settings(max_examples=200, deadline=None)
def test_a_table_is_refused_where_a_written_slot_is_another_tokens(step: Any, dtype: torch.dtype) -> None:
    meta, table, page_size = step
    by_slot: dict[tuple[int, int], list[tuple[str, str, str]]] = {}
    for slot, token in tokens(meta, table, page_size):
        by_slot.setdefault(slot, []).append(token)
    lost = {slot: there for slot, there in by_slot.items() if len(there) > 1 and any(kind == "new" for kind, _, _ in there)}
    pages = torch.zeros(60, 2, page_size, 1, 4)
    cache = cpattn.PagedKV(pages[:, 0], pages[:, 1], table.to(dtype))
    check_page_contents(cache, meta, written=False)
    for look in (lambda: check_page_contents(cache, meta, written=True), lambda: cpattn.slot_mapping(meta, cache.page_table, page_size)):
        if not lost:
            look()
            continue
        with pytest.raises(cpattn.PageTableError) as raised:
            look()
        found = _MESSAGE.search(str(raised.value))
        assert found is not None
        *named, place, page = found.groups()
        there = lost[int(page), int(place)]
        assert tuple(named[:3]) in there
        assert tuple(named[3:]) in there
        assert named[:3] != named[3:]
        assert named[0] == "new"


def test_pages_of_high_numbers_are_told_apart() -> None:
    """They are marked modulo 2**20; what has the same mark is looked at more closely."""
    meta = cpattn.build_metadata([(3, 2), (0, 4), (4, 0)], 1, 0)
    high = 2**20
    apart = torch.tensor([[7, 7 + high], [7 + 2 * high, 0], [7 + 3 * high, 0]])
    assert cpattn.slot_mapping(meta, apart, 4).tolist()[:2] == [31, 4 * (7 + high)]
    with pytest.raises(cpattn.PageTableError, match=f"new token 0 of request 1 and cached token 0 of request 2 .* page {7 + 2 * high} "):
        cpattn.slot_mapping(meta, apart.index_put((torch.tensor(2), torch.tensor(0)), torch.tensor(7 + 2 * high)), 4)
