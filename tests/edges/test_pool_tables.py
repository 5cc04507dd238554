"""A pool knows whose tokens its page tables hold: a plan that does not go with a table is refused, on every rank alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cpattn
from cpattn.testing import SoloCommunicator, run_loopback


def pool_of(cp_size: int = 1, cp_rank: int = 0, sharded: bool = False) -> cpattn.KVPool:
    pool = cpattn.KVPool(16, 4, 1, 2, 8, cp_size=cp_size, cp_rank=cp_rank, sharded=sharded)
    pool.admit("long")
    pool.admit("short")
    return pool


def attend(pool: cpattn.KVPool, plan: cpattn.Plan, table: Tensor, rank: int = 0, group: Any = None) -> Tensor:
    meta = plan.metadata(rank)
    q, k = torch.zeros(meta.rows, 4, 8), torch.zeros(meta.rows, 2, 8)
    return cpattn.cp_attention(q, k, k, meta, group=group, kv_cache=pool.layer(0, table))


def attend_alone(pool: cpattn.KVPool, plan: cpattn.Plan, table: Tensor, rank: int) -> Tensor:
    meta = plan.metadata(rank)
    return cpattn.attend(torch.zeros(meta.rows, 4, 8), pool.layer(0, table), meta)


STEP = [("long", 21), ("short", 2)]


def test_a_sharded_pool_is_planned_by_itself() -> None:
    """Without prefix_shards every rank would read its own tokens as if they were the whole prefix."""

    def program(group: cpattn.Communicator) -> list[str]:
        pool = pool_of(2, group.rank, sharded=True)
        step = pool.plan(STEP)
        table = pool.page_table(["long", "short"])
        by_hand = cpattn.plan(step.batch, 2)
        said = []
        for alone in (False, True):
            with pytest.raises(cpattn.PrefixError) as raised:
                attend_alone(pool, by_hand, table, group.rank) if alone else attend(pool, by_hand, table, group.rank, group)
            said.append(str(raised.value))
        attend(pool, step, table, group.rank, group)
        return said

    for said in run_loopback(program, 2):
        for message in said:
            assert "comes from a sharded KVPool, but the plan has no prefix_shards" in message
            assert "let pool.plan make the plan of each step" in message


def test_a_replicated_pool_has_no_shards() -> None:
    pool = pool_of(2)
    batch = pool.plan(STEP).batch
    sharded = cpattn.plan(batch, 2, prefix_shards=[[0, 0], [0, 0]])
    with pytest.raises(cpattn.PrefixError, match="in which every rank has all tokens, but the plan has prefix_shards"):
        attend(pool, sharded, pool.page_table(["long", "short"]), group=SoloCommunicator(0, 2))


def test_a_pool_of_another_owner() -> None:
    batch, rule = [(0, 21), (0, 2)], cpattn.Striped(2)
    none, step = [[0, 0], [0, 0]], pool_of(2).plan(STEP)
    for owner, plan, message in (
        (
            "computed",
            cpattn.plan(batch, 2, owner=rule),
            r"a KVPool with owner='computed', but the plan has owner=Striped\(interleave=2\); ",
        ),
        (rule, cpattn.plan(batch, 2, prefix_shards=none), r"a KVPool with owner=Striped\(interleave=2\), but the plan has prefix_shards; "),
        (rule, cpattn.plan(batch, 2, owner=cpattn.Striped(3)), r"but the plan has owner=Striped\(interleave=3\); let pool.plan make"),
        (rule, step, "from a sharded KVPool, but the plan has no prefix_shards and no owner"),
    ):
        pool = cpattn.KVPool(16, 4, 1, 2, 8, cp_size=2, owner=owner)
        for name, _ in STEP:
            pool.admit(name)
        assert pool.sharded
        assert pool.owner == owner
        pool.plan(STEP)
        with pytest.raises(cpattn.PrefixError, match=message):
            attend(pool, plan, pool.page_table(["long", "short"]), group=SoloCommunicator(0, 2))


def test_a_sharded_pool_of_another_number_of_ranks() -> None:
    pool = pool_of(2, sharded=True)
    batch = pool.plan(STEP).batch
    plan = cpattn.plan(batch, 3, prefix_shards=[[0, 0, 0], [0, 0, 0]])
    with pytest.raises(cpattn.PrefixError, match="a KVPool of 2 ranks, but the plan has cp_size=3"):
        attend(pool, plan, pool.page_table(["long", "short"]), group=SoloCommunicator(0, 3))


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_two_requests_in_another_order_than_the_table(sharded: bool) -> None:
    def program(group: cpattn.Communicator) -> str:
        pool = pool_of(2, group.rank, sharded)
        plan = pool.plan(STEP)
        with pytest.raises(cpattn.PageTableError) as raised:
            attend(pool, plan, pool.page_table(["short", "long"]), group.rank, group)
        return str(raised.value)

    first, second = run_loopback(program, 2)
    # The same on every rank: one that went on would wait.
    assert first == second
    assert first.startswith("line 0 of kv_cache.page_table has pages for ")
    assert "name the requests to pool.page_table in the order of the plan, after pool.plan" in first


def test_a_table_made_before_the_plan_is_refused() -> None:
    pool = pool_of()
    table = pool.page_table(["long", "short"], shape=(2, 8))
    with pytest.raises(cpattn.PageTableError, match="pages for 0 tokens, but request 0 of the batch has 21 with its new ones"):
        attend(pool, pool.plan(STEP), table)


def test_steps_may_be_planned_ahead() -> None:
    """A table that was made when further steps were planned already has pages for more."""
    pool = pool_of()
    first, second = pool.plan(STEP), pool.plan([("long", 1), ("short", 1)])
    table = pool.page_table(["long", "short"])
    for plan in (first, second):
        attend(pool, plan, table)


@pytest.mark.parametrize("inference", [False, True])
def test_a_table_of_a_fixed_address_is_what_was_last_put_into_it(inference: bool) -> None:
    """As a CUDA graph needs it: made once, and written to before each replay. What was known of it holds no more."""
    with torch.inference_mode(inference):
        pool = pool_of()
        fixed = pool.page_table([], shape=(4, 8))
        bucket = cpattn.Bucket(max_requests=4, max_rows=32, max_chunks=16)
        plan = pool.plan(STEP)
        fixed.copy_(pool.page_table(["long", "short"], shape=(4, 8)))
        assert pool.layer(0, fixed).lines is None
        meta = plan.metadata(0, bucket=bucket)
        q, k = torch.zeros(32, 4, 8), torch.zeros(32, 2, 8)
        cpattn.cp_attention(q, k, k, meta, kv_cache=pool.layer(0, fixed))


def test_an_engines_own_table_is_taken_as_it_is() -> None:
    pool = pool_of()
    plan = pool.plan(STEP)
    table = pool.page_table(["long", "short"])
    assert pool.layer(0, table).lines is not None
    assert pool.layer(0, table.clone()).lines is None
    attend(pool, plan, table.long())
