"""Many calls over one cache: prefill in chunks, then decode, then the next turn, reading back what was written."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from engines.model_engine import ModelEngine
from hypothesis import given, settings
from hypothesis import strategies as st

import cpattn

# Which strategies can serve a cache, "auto" included.
STRATEGIES = {False: ["auto", "all_gather", "ring"], True: ["auto", "pass_q", "pass_q_ring", "ring"]}

caches = pytest.mark.parametrize("owner", ["replicated", "computed", cpattn.Striped(3)], ids=["replicated", "computed", "striped"])


@caches
@pytest.mark.parametrize("cp_size", [1, 2, 3, 5])
def test_turns_of_prefill_and_decode(cp_size: int, owner: str | cpattn.Striped) -> None:
    """Several requests, each call with another strategy: zigzag prefills, decodes one token a call, and idle ones."""
    engine = ModelEngine(cp_size, owner, page_size=4)
    strategies = cycle(STRATEGIES[owner != "replicated"])
    for name in "abc":
        engine.admit(name)
    engine.step([("a", 23), ("b", 0), ("c", 1)], next(strategies), pad_to=4)
    for _ in range(3):
        engine.step([("a", 1), ("b", 0), ("c", 1)], next(strategies))
    engine.step([("b", 17), ("c", 1), ("a", 0)], next(strategies), partition="contiguous")
    for _ in range(3):
        engine.step([("c", 1), ("a", 1), ("b", 1)], next(strategies))
    engine.step([("a", 9), ("b", 1), ("c", 2 * cp_size - 1)], next(strategies), pad_to=8)
    engine.fork("a", "d", 24)
    engine.step([("d", 1), ("a", 1)], next(strategies))
    engine.release("a")
    engine.step([("d", 5), ("c", 1)], next(strategies))


@pytest.mark.parametrize("owner", ["computed", cpattn.Striped(3)], ids=["computed", "striped"])
def test_turns_with_a_window(owner: str | cpattn.Striped) -> None:
    """Over shards whose positions the pool knows; drafts that are rejected, and forks, change those."""
    engine = ModelEngine(3, owner, page_size=4)
    strategies, window = cycle(["auto", "all_gather", "pass_q"]), 7
    for name in "ab":
        engine.admit(name)
    engine.step([("a", 23), ("b", 2)], window=window)
    for partition in ("zigzag", "whole", "zigzag"):
        engine.step([("a", 1), ("b", 9)], next(strategies), partition, window=window)
    engine.truncate("a", 21)
    engine.fork("b", "c", 17)
    for _ in range(3):
        engine.step([("c", 4), ("a", 1), ("b", 0)], next(strategies), window=window)


@caches
@given(chunks=st.lists(st.integers(1, 30), min_size=1, max_size=5), cp_size=st.integers(1, 4), data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_chunking_of_a_prefill_equals_one_shot(
    owner: str | cpattn.Striped, chunks: list[int], cp_size: int, data: st.DataObject
) -> None:
    whole, chunked = (ModelEngine(cp_size, owner, page_size=7) for _ in range(2))
    for engine in (whole, chunked):
        engine.admit("a")
    expected = whole.step([("a", sum(chunks))])
    outputs = [
        chunked.step(
            [("a", chunk)],
            data.draw(st.sampled_from(STRATEGIES[owner != "replicated"])),
            data.draw(st.sampled_from(["zigzag", "contiguous", "whole"])),
        )
        for chunk in chunks
    ]
    torch.testing.assert_close(torch.cat(outputs), expected)


@pytest.mark.parametrize("partition", ["zigzag", "whole"])
@pytest.mark.parametrize("cp_size", [2, 3, 5])
@pytest.mark.parametrize("prefill", [1, 8, 13])
def test_decoding_fills_all_ranks_of_a_sharded_cache_alike(cp_size: int, prefill: int, partition: str) -> None:
    """One token a call goes to the rank that holds the fewest, and not to rank 0 every time."""
    engine = ModelEngine(cp_size, "computed")
    engine.admit("a")
    engine.step([("a", prefill)])
    for _ in range(2 * cp_size):
        engine.step([("a", 1)], partition=partition)
        held = [engine.owners["a"].count(rank) for rank in range(cp_size)]
        assert max(held) - min(held) <= 1
