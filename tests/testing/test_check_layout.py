"""check_layout finds a layout that breaks a rule, and the smallest batch for it; the strategies that are shipped draw what they say."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cpattn
from cpattn import Chunk
from cpattn.testing import LayoutError, check_layout, strategies

BATCH = [(5, 9), (0, 1), (3, 0), (0, 6)]


@given(strategies.plans())
@settings(max_examples=60, deadline=None)
def test_plans_keep_the_rules(plan: cpattn.Plan) -> None:
    check_layout(plan)


def test_named_partitions_keep_the_rules() -> None:
    check_layout(lambda batch, cp_size: cpattn.plan(batch, cp_size, owner=cpattn.Striped(16), pad_to=8), cp_sizes=[3])
    check_layout(
        lambda batch, cp_size: cpattn.plan(batch, cp_size, owner=cpattn.Striped(2), queries="all"), batches=[BATCH], cp_sizes=[1, 4]
    )


# A plan that says something wrong.


def tampered(name: str, change: Callable[[Any], Any], **options: Any) -> cpattn.Plan:
    plan = cpattn.plan(BATCH, 2, **options)
    plan.__dict__[name] = change(getattr(plan, name))
    return plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (tampered("chunks", lambda chunks: chunks[1:]), "new token 0 of request 0 is on no rank; each is on one"),
        (
            tampered("chunks", lambda chunks: (*chunks, Chunk(3, 5, 1, 0))),
            "new token 5 of request 3 is on ranks [01], 0; each is on one",
        ),
        (tampered("chunks", lambda chunks: (*chunks, Chunk(2, 0, 1, 0))), "a chunk has new token 0 of request 2, which does not exist"),
        (tampered("chunks", lambda chunks: (chunks[0]._replace(rank=2), *chunks[1:])), "request 0 is on rank 2; ranks are 0 to 1"),
        (tampered("chunks", lambda chunks: (chunks[1], chunks[0], *chunks[2:])), "the chunk of request 0 from token 0 on comes after"),
        (
            tampered("chunks", lambda chunks: tuple(c._replace(rank=0) for c in chunks)),
            r"ranks have \[16, 0\] new tokens; partition 'zigzag'",
        ),
        (tampered("rank_tokens", lambda tokens: tokens[::-1] if tokens[0] != tokens[1] else (9, 7)), r"rank_tokens is \[9, 7\]"),
        (tampered("rows", lambda rows: rows + 1), "rows is 9; the fullest rank has 8 tokens, which are 8 rows with pad_to=1"),
        (
            tampered("held_lens", lambda held: held[:, ::-1], prefix_shards=[[4, 1], [0, 0], [3, 0], [0, 0]]),
            r"held_lens says that ranks hold \[\d, \d\] tokens of request 0 after the step; by its rule",
        ),
        (
            tampered("held_lens", lambda held: held[:, ::-1], owner=cpattn.Striped(4)),
            r"held_lens says that ranks hold \[6, 8\] tokens of request 0 after the step; by its rule it is \[8, 6\]",
        ),
        (
            tampered("shard_lens", lambda cached: cached[:, ::-1], owner=cpattn.Striped(4)),
            r"shard_lens says that ranks hold \[1, 4\] prefix tokens of request 0 before the step; by its rule it is \[4, 1\]",
        ),
        (
            tampered("shard_lens", lambda cached: cached[:, ::-1], prefix_ranks=[[0, 0, 1, 0, 0], [], [1, 1, 1], []]),
            r"shard_lens says that ranks hold \[1, 4\] prefix tokens of request 0 before the step; by its rule it is \[4, 1\]",
        ),
        (
            tampered("shard_lens", lambda cached: cached[:, ::-1], prefix_shards=[[4, 1], [0, 0], [3, 0], [0, 0]]),
            r"shard_lens says that ranks hold \[1, 4\] prefix tokens of request 0 before the step; by its rule it is \[4, 1\]",
        ),
        (tampered("shard_lens", lambda cached: cached + 1), r"shard_lens says that ranks hold \[1, 1\] prefix tokens of request 0"),
    ],
    ids=[
        *("missing", "twice", "beyond", "no such rank", "order", "uneven", "counts", "rows", "held, computed", "held"),
        *("cached, striped", "cached, ranks", "cached, counts", "cached, replicated"),
    ],
)
def test_a_broken_plan(plan: cpattn.Plan, message: str) -> None:
    with pytest.raises(LayoutError, match=message) as found:
        check_layout(plan)
    # Planned again it is right, so that there is no smaller batch.
    assert found.value.batch == BATCH
    assert found.value.cp_size == 2


@pytest.mark.parametrize(
    ("name", "change", "message", "smallest"),
    [
        (
            "token_index",
            lambda x: x.roll(1),
            "row 0 of rank 0 is new token 0 of request 0: token 0 at position 0, not token 1 at 0",
            [(0, 2)],
        ),
        (
            "position_ids",
            lambda x: x + (x > 7),
            "row 8 of rank 0 is new token 8 of request 0: token 8 at position 8, not token 8 at 9",
            [(0, 9)],
        ),
        ("restore_index", lambda x: x.flip(0), "restore_index of rank 0 looks for new token 0 of request 0 in row 1 of rank 0", [(0, 2)]),
        ("k_len", lambda x: x - 1, "new token 0 of request 0 is at position 0 and sees 1 keys .*on rank 0 has 0 keys", [(0, 1)]),
        ("k_start", lambda x: x * 0, r"sees 1 keys of its request, from key 1 on; its span .* from key 0 on", [(0, 1), (0, 1)]),
        ("cu_seqlens_q", lambda x: x // 2, "the chunks of rank 0 have rows 0 to -1; it has tokens in rows 0 to 0", [(0, 1)]),
    ],
    ids=["token_index", "position_ids", "restore_index", "k_len", "k_start", "cu_seqlens_q"],
)
def test_broken_metadata_and_the_smallest_batch(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any], message: str, smallest: list[tuple[int, int]]
) -> None:
    right = cpattn.Plan.metadata

    class Wrong:
        """Metadata, but for one attribute."""

        def __init__(self, plan: cpattn.Plan, rank: int) -> None:
            self.right = right(plan, rank)

        def __getattr__(self, asked: str) -> Any:
            return change(getattr(self.right, asked)) if asked == name else getattr(self.right, asked)

    monkeypatch.setattr(cpattn.Plan, "metadata", lambda plan, rank: Wrong(plan, rank))
    with pytest.raises(LayoutError, match=message) as found:
        check_layout(cpattn.plan([(40, 13), (3, 9), (8, 16)], 3))
    assert (found.value.batch, found.value.cp_size) == (smallest, 1)
    assert f"The smallest batch found for which that is so: {smallest} over cp_size=1" in str(found.value)


# An engine's own.


def forgets_a_remainder(batch: Any, cp_size: int) -> cpattn.Chunks:
    """Of requests with more than 20 tokens."""
    table = []
    for request, (_, extend_len) in enumerate(batch.tolist()):
        each = -(-extend_len // cp_size) if extend_len <= 20 else extend_len // cp_size
        bounds = [min(r * each, extend_len) for r in range(cp_size + 1)]
        table += [(request, a, b - a, r) for r, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)) if b > a]  # noqa: RUF007
    return cpattn.Chunks(*np.array(table, dtype=np.int64).reshape(-1, 4).T)


def test_an_engines_partition_and_its_smallest_batch() -> None:
    with pytest.raises(
        LayoutError, match=r"partition forgets_a_remainder: request 0 is wrong: tokens 20 to 20 of its 21 are missing"
    ) as found:
        check_layout(forgets_a_remainder)
    assert (found.value.batch, found.value.cp_size) == ([(0, 21)], 2)
    check_layout(forgets_a_remainder, batches=[[(7, 20), (0, 3)], [(0, 24)]], cp_sizes=[2])


def test_what_a_layout_refuses_is_not_smaller() -> None:
    """An engine's own may serve neither every batch nor every group; it is asked about no group but those that are said."""
    asked: list[int] = []

    def drops_the_last(batch: Any, cp_size: int) -> cpattn.Chunks:
        asked.append(cp_size)
        if len(batch) != 1 or batch[0, 1] < 4:
            raise RuntimeError("never scheduled")
        return cpattn.Chunks(*np.array([[0], [0], [batch[0, 1] - 1], [0]]))

    with pytest.raises(LayoutError, match="tokens 3 to 3 of its 4 are missing") as found:
        check_layout(drops_the_last, batches=[[(7, 32)]], cp_sizes=[4, 2])
    assert (found.value.batch, found.value.cp_size) == ([(0, 4)], 2)
    assert set(asked) == {2}
    asked.clear()
    with pytest.raises(LayoutError):
        check_layout(drops_the_last, batches=[[(7, 32)]], cp_sizes=[4])
    assert set(asked) == {4}


def test_a_partition_that_changes_its_mind() -> None:
    turns: list[int] = []

    def by_turns(batch: Any, cp_size: int) -> cpattn.Chunks:
        turns.append(0)
        request = np.flatnonzero(batch[:, 1])
        return cpattn.Chunks(request, 0 * request, batch[request, 1], 0 * request + len(turns) % cp_size)

    with pytest.raises(LayoutError, match="gives another layout the second time; ranks that each work it out would disagree") as found:
        check_layout(by_turns)
    assert (found.value.batch, found.value.cp_size) == ([(0, 1)], 2)


def test_a_plan_of_another_batch() -> None:
    with pytest.raises(LayoutError, match="the plan is of 1 requests over cp_size=2, not of what was asked for"):
        check_layout(lambda batch, cp_size: cpattn.plan([(0, 1)], 2))


def test_what_is_no_layout() -> None:
    with pytest.raises(cpattn.CPError, match=r"layout is a list; pass a cpattn.Plan, or a function"):
        check_layout([(0, 1)])  # type: ignore[arg-type]

    def fails(batch: Any, cp_size: int) -> cpattn.Chunks:
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        check_layout(fails)


# The strategies. That pages hold what a step needs, docs/testing_your_engine.md shows.


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_caches_hold_each_prefix_token_where_the_rule_says(data: st.DataObject) -> None:
    plan = data.draw(strategies.plans())
    cache = data.draw(strategies.caches(plan))
    prefix = torch.arange(plan.num_prefix_tokens, dtype=torch.float64)[:, None, None]
    held = []
    for rank in range(plan.cp_size):
        pages = cache.filled(rank, prefix, -prefix)
        assert pages.v_pages is not None
        here = pages.k_pages[~pages.k_pages.isnan()]
        assert torch.equal(pages.v_pages[~pages.v_pages.isnan()], -here)
        assert len(here) == len(set(here.tolist())) == (plan.shard_lens[:, rank].sum() if plan.sharded else plan.num_prefix_tokens)
        held.append(here)
    copies = 1 if plan.sharded else plan.cp_size
    assert torch.equal(torch.cat(held).sort().values, prefix.flatten().repeat_interleave(copies))


def test_owner_rules_are_those_of_a_pool() -> None:
    @given(strategies.owner_rules())
    @settings(max_examples=10)
    def pools(owner: Any) -> None:
        assert cpattn.KVPool(1, 1, 1, 1, 8, owner=owner, cp_size=2).owner == owner

    pools()


def test_without_hypothesis_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "cpattn.testing.strategies")
    with pytest.raises(ImportError, match=r"needs Hypothesis: pip install 'cpattn\[testing\]'"):
        importlib.import_module("cpattn.testing.strategies")
