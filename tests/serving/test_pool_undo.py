"""KVPool.undo: a step that failed leaves nothing behind; what cannot be taken back is refused without a change."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from engines.model_engine import ModelEngine, bookkeeping

import cpattn


def pool_of(num_pages: int = 8, page_size: int = 4, num_layers: int = 2, **options: Any) -> cpattn.KVPool:
    pool = cpattn.KVPool(num_pages, page_size, num_layers, kv_heads=2, head_dim=8, **options)
    for name in "ab":
        pool.admit(name)
    return pool


def refused(pool: cpattn.KVPool, plan: Any, message: str) -> None:
    before = bookkeeping(pool)
    pages = pool.k_pages.clone()
    with pytest.raises(cpattn.CPError, match=message):
        pool.undo(plan)
    assert bookkeeping(pool) == before
    assert torch.equal(pool.k_pages, pages)


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize("cp_size", [1, 3])
def test_the_next_step_reads_nothing_of_a_failed_one(cp_size: int, sharded: bool) -> None:
    """A step fails on every rank but rank 0, which has written NaN; its requests, and others, go on as if it had not been."""
    engine = ModelEngine(cp_size, "computed" if sharded else "replicated", num_pages=16, page_size=4)
    for name in "abc":
        engine.admit(name)
    engine.step([("a", 23), ("b", 5), ("c", 6)])
    engine.release("c")  # its pages are taken next, with its tokens in them
    engine.plan([("a", 3), ("b", 21)])
    engine.undo(spoiled_ranks=[0])
    assert [engine.length(name) for name in "ab"] == [23, 5]
    engine.step([("b", 21), ("a", 3)])


def test_a_step_planned_again_takes_the_same_pages() -> None:
    pool = pool_of(num_pages=12)
    pool.plan([("a", 6), ("b", 3)])
    step = [("b", 9), ("a", 11)]
    books = bookkeeping(pool).rsplit(",", 1)[0]
    plan = pool.plan(step)
    table = pool.page_table(["a", "b"])
    pool.undo(plan)
    assert bookkeeping(pool).rsplit(",", 1)[0] == books  # to the order of the free pages
    assert pool.plan(step) == plan
    assert torch.equal(pool.page_table(["a", "b"]), table)


@pytest.mark.parametrize("v_head_dim", [8, 0], ids=["k and v", "v in k"])
def test_what_a_step_may_have_written_becomes_zeros(v_head_dim: int) -> None:
    """In all layers; what lies before it, and other requests' pages, stay as they are."""
    pool = pool_of(v_head_dim=v_head_dim)
    pool.plan([("a", 6), ("b", 3)])
    plan = pool.plan([("a", 7)])
    (first, second, third, fourth), (of_b, *_) = pool.page_table(["a", "b"]).tolist()
    for pages in (pool.k_pages, pool.v_pages):
        if pages is not None:
            pages.fill_(torch.nan)
    pool.undo(plan)
    for pages in (pool.k_pages, pool.v_pages):
        if pages is not None:
            assert (pages[:, [third, fourth]] == 0).all()
            assert (pages[:, second, 2:] == 0).all()
            assert pages[:, second, :2].isnan().all()
            assert pages[:, [first, of_b]].isnan().all()


def test_each_rank_of_a_sharded_cache_clears_its_own() -> None:
    pools = [pool_of(cp_size=3, cp_rank=rank, sharded=True) for rank in range(3)]
    for pool in pools:
        pool.plan([("a", 13)])  # 5, 4 and 4
    for rank, pool in enumerate(pools):
        plan = pool.plan([("a", 3)])
        assert plan.rank_extends.tolist() == [[1, 1, 1]]
        first, second = pool.page_table(["a"])[0].tolist()
        pool.k_pages.fill_(torch.nan)
        pool.undo(plan)
        assert pool.k_pages[:, first].isnan().all()
        expected = torch.zeros(2, 4, 2, 8)
        expected[:, : 1 if rank == 0 else 0] = torch.nan
        torch.testing.assert_close(pool.k_pages[:, second], expected, equal_nan=True)
    assert len(set(map(bookkeeping, pools))) == 1


def test_two_steps_are_undone_one_after_the_other() -> None:
    pool = pool_of()
    pool.plan([("a", 2)])
    first = pool.plan([("a", 7), ("b", 1)])
    second = pool.plan([("b", 5), ("a", 1)])
    refused(pool, first, "this plan is not of the last step: 1 came after it and still stand; undo the last step first")
    pool.undo(second)
    assert (pool.length("a"), pool.length("b"), pool.free_pages) == (9, 1, 4)
    pool.undo(first)
    assert (pool.length("a"), pool.length("b"), pool.free_pages) == (2, 0, 7)


def test_only_the_very_plan_of_a_step_undoes_it() -> None:
    pool, other = pool_of(), pool_of()
    plan = pool.plan([("a", 5)])
    equal = other.plan([("a", 5)])
    assert plan == equal
    message = (
        "this plan is not of a step that the pool can take back: .*; pass the same Plan object that the last call of pool.plan returned"
    )
    wrong: Any
    for wrong in (equal, copy.copy(plan), cpattn.plan([(0, 5)], cp_size=1)):
        refused(pool, wrong, message)
    for wrong in (None, "a", [("a", 5)]):
        refused(pool, wrong, f"undo got a {type(wrong).__name__}; pass the Plan that the last call of pool.plan returned")
    pool.undo(plan)
    refused(pool, plan, message)
    again = pool.plan([("a", 5)])
    refused(pool, plan, message)
    pool.undo(again)


def all_nan(pool: cpattn.KVPool) -> None:
    for pages in (pool.k_pages, pool.v_pages):
        assert pages is not None
        pages.fill_(torch.nan)


@pytest.mark.parametrize("admitted_again", [False, True])
def test_a_released_request_leaves_no_nan_in_its_pages(admitted_again: bool) -> None:
    pool = pool_of()
    pool.plan([("a", 6)])
    plan = pool.plan([("b", 1), ("a", 5)])
    (_, second, third), _ = pool.page_table(["a", "b"]).tolist()
    all_nan(pool)
    pool.release("a")
    if admitted_again:
        pool.admit("a")
    pool.undo(plan)
    assert (pool.k_pages[:, third] == 0).all()
    assert (pool.k_pages[:, second, 2:] == 0).all()
    assert pool.k_pages[:, second, :2].isnan().all()
    assert (pool.free_pages, pool.length("b")) == (8, 0)
    if admitted_again:
        assert pool.length("a") == 0


@pytest.mark.parametrize(("length", "left"), [(9, 6), (6, 6), (3, 3)])
def test_a_truncated_request_keeps_what_it_had_before_the_step_at_most(length: int, left: int) -> None:
    pool = pool_of()
    pool.plan([("a", 6)])
    plan = pool.plan([("a", 5)])
    _, second, third = pool.page_table(["a"])[0].tolist()
    all_nan(pool)
    pool.truncate("a", length)
    pool.undo(plan)
    assert pool.length("a") == left
    assert (pool.k_pages[:, third] == 0).all()
    assert (pool.k_pages[:, second, 2:] == 0).all()
    assert pool.k_pages[:, second, :2].isnan().all()


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_a_fork_with_tokens_of_the_step_has_to_go_first(sharded: bool) -> None:
    pool = pool_of(cp_size=2, sharded=sharded)
    pool.plan([("a", 6)])
    plan = pool.plan([("b", 1), ("a", 5)])
    pool.fork("a", "prefix", 6)
    pool.fork("a", "c", 11)
    pool.fork("c", "d", 8)
    pool.release("a")
    message = "request {!r} was forked from tokens of this step, and would keep them; release it first, or truncate it to the tokens from"
    refused(pool, plan, message.format("c"))
    pool.release("c")
    refused(pool, plan, message.format("d"))
    pool.truncate("d", 6)
    pool.undo(plan)
    assert [pool.length(name) for name in ("b", "d", "prefix")] == [0, 6, 6]


def test_a_fork_that_has_copied_the_steps_tokens_has_to_go_too() -> None:
    """The later step is undone, but the copy that it made stays."""
    pool = pool_of()
    first = pool.plan([("a", 3)])
    pool.fork("a", "c", 3)
    pool.undo(pool.plan([("c", 1), ("a", 0)]))
    refused(pool, first, "request 'c' was forked from tokens of this step")
    pool.truncate("c", 0)
    pool.plan([("c", 3)])
    pool.release("c")


def test_a_copy_kept_by_a_later_step_is_not_cleared_with_an_earlier_one() -> None:
    pool = pool_of(num_pages=6)
    pool.admit("c")
    pool.plan([("c", 6)])
    pool.fork("c", "d", 6)
    first = pool.plan([("a", 4)])
    (page,) = pool.page_table(["a"])[0].tolist()
    pool.release("a")
    pool.k_pages.fill_(1.0)
    second = pool.plan([("d", 1)])
    assert pool.page_table(["d"])[0].tolist()[1] == page
    pool.undo(second)
    pool.undo(first)
    assert (pool.k_pages[:, page, :2] == 1).all()
    assert (pool.k_pages[:, page, 2:] == 0).all()


def test_what_happens_to_other_requests_does_not_matter() -> None:
    pool = pool_of()
    pool.plan([("a", 5), ("b", 6)])
    pool.fork("b", "c", 6)
    plan = pool.plan([("a", 9)])
    pool.truncate("b", 5)
    pool.fork("c", "d", 6)
    pool.release("c")
    pool.undo(plan)
    assert [pool.length(name) for name in "abd"] == [5, 5, 6]
    assert pool.free_pages == 8 - 4


def test_a_copy_that_a_step_made_stays() -> None:
    """The page that it was copied from may be another's by then."""
    pool = pool_of(num_pages=6)
    pool.plan([("a", 6)])
    pool.k_pages.copy_(torch.randn(pool.k_pages.shape))
    pool.fork("a", "c", 6)
    first, shared = pool.page_table(["a"])[0].tolist()
    keys = pool.k_pages[:, shared, :2].clone()
    step = [("c", 4), ("b", 1)]
    plan = pool.plan(step)
    table = pool.page_table(["c", "b"])
    own = int(table[0, 1])
    assert own != shared
    pool.release("a")
    pool.undo(plan)
    assert pool.page_table(["c"]).tolist() == [[first, own]]
    assert torch.equal(pool.k_pages[:, own, :2], keys)
    assert (pool.k_pages[:, own, 2:] == 0).all()
    assert pool.free_pages == 4
    pool.plan(step)
    assert torch.equal(pool.page_table(["c", "b"]), table)


def test_steps_that_do_nothing_are_undone_too() -> None:
    pool = pool_of()
    pool.plan([("a", 5)])
    for step in ([], [("a", 0), ("b", 0)]):
        pool.undo(pool.plan(step))
    assert (pool.length("a"), pool.length("b"), pool.free_pages) == (5, 0, 6)


def test_an_idle_requests_page_is_left_to_those_that_share_it() -> None:
    pool = pool_of()
    pool.plan([("a", 8)])
    pool.fork("a", "c", 6)
    pool.k_pages.fill_(1.0)
    pool.undo(pool.plan([("c", 0), ("b", 1)]))
    assert (pool.k_pages[:, pool.page_table(["a"])[0].tolist()] == 1).all()


def test_a_refused_step_leaves_the_one_before_to_be_undone() -> None:
    pool = pool_of(num_pages=2)
    plan = pool.plan([("a", 5)])
    with pytest.raises(cpattn.PoolFullError):
        pool.plan([("a", 9)])
    pool.undo(plan)
    assert (pool.length("a"), pool.free_pages) == (0, 2)


# How much is remembered.


def test_steps_whose_plans_are_gone_are_forgotten() -> None:
    pool = pool_of(num_pages=100)
    first = pool.plan([("a", 1)])
    for _ in range(50):
        plan = pool.plan([("a", 1), ("b", 1)])
        assert len(pool._history) <= 3  # the first, the one before, and this
    refused(pool, first, "not of the last step|not of a step that the pool can take back")
    pool.undo(plan)
    assert pool.length("a") == 50


def test_steps_whose_plans_are_kept_can_all_be_undone() -> None:
    pool = pool_of(num_pages=100)
    plans = [pool.plan([("a", 1), ("b", 2)]) for _ in range(50)]
    assert len(pool._history) == 50
    while plans:
        pool.undo(plans.pop())
        assert (pool.length("a"), pool.length("b")) == (len(plans), 2 * len(plans))
    assert pool.free_pages == 100
    assert len(pool._history) == 0
    plans = [pool.plan([("a", 1)]) for _ in range(50)]
    del plans[:]
    pool.plan([("a", 1)])
    assert len(pool._history) == 1


def test_no_step_before_one_whose_plan_is_gone_is_undone() -> None:
    pool = pool_of()
    first = pool.plan([("a", 1)])
    pool.plan([("a", 1)])
    refused(pool, first, "this plan is not of the last step: 1 came after it")
    third = pool.plan([("a", 1)])
    pool.undo(third)
    refused(pool, first, "a later step's plan is gone")


def test_a_pool_keeps_no_plan_alive_and_a_plan_no_pool() -> None:
    pool = pool_of()
    plan = pool.plan([("a", 5)])
    alive = weakref.ref(pool), weakref.ref(plan)
    del pool
    gc.collect()
    assert alive[0]() is None
    del plan
    assert alive[1]() is None
