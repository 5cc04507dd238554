"""KVPool: which pages a request gets, what forks share, and what is refused without a change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import cpattn


def pool_of(num_pages: int = 8, page_size: int = 4, num_layers: int = 1, **options: object) -> cpattn.KVPool:
    return cpattn.KVPool(num_pages, page_size, num_layers, kv_heads=2, head_dim=8, **options)  # type: ignore[arg-type]


def pages_of(pool: cpattn.KVPool, name: str) -> list[int]:
    """The pages that hold the request's tokens, where every rank holds all of them."""
    return pool.page_table([name])[0].tolist()[: -(-pool.length(name) // pool.page_size)]


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_a_request_takes_as_many_pages_as_its_tokens_need(page_size: int) -> None:
    pool = pool_of(200, page_size)
    pool.admit("a")
    for length in range(1, 131):
        plan = pool.plan([("a", 1)])
        assert plan.batch == ((length - 1, 1),)
        assert pool.free_pages == 200 - -(-length // page_size)
    assert len(set(pages_of(pool, "a"))) == -(-130 // page_size)


def test_layers_are_views_of_one_memory() -> None:
    pool = pool_of(num_layers=3, v_head_dim=16)
    table = pool.page_table([])
    assert table.shape == (0, 1)
    for layer in range(3):
        cache = pool.layer(layer, table)
        assert cache.k_pages.data_ptr() == pool.k_pages[layer].data_ptr()
        assert cache.v_pages is not None
        assert cache.v_pages.shape == (8, 4, 2, 16)
        assert cache.page_table is table
    assert pool_of(v_head_dim=0).layer(0, table).v_pages is None


@pytest.mark.parametrize("v_head_dim", [8, 0], ids=["k and v", "v in k"])
def test_a_fork_shares_whole_pages_and_copies_the_rest_of_every_layer(v_head_dim: int) -> None:
    pool = pool_of(num_layers=2, v_head_dim=v_head_dim)
    pool.admit("a")
    pool.plan([("a", 11)])
    pool.k_pages.copy_(torch.randn(pool.k_pages.shape))
    pool.fork("a", "b", 10)
    a, b = pages_of(pool, "a"), pages_of(pool, "b")
    assert a[:2] == b[:2]
    assert a[2] != b[2]
    assert torch.equal(pool.k_pages[:, a[2], :2], pool.k_pages[:, b[2], :2])
    assert pool.free_pages == 8 - 4
    pool.plan([("a", 5), ("b", 3)])
    a, b = pages_of(pool, "a"), pages_of(pool, "b")
    assert set(a) & set(b) == set(a[:2])
    pool.release("a")
    assert pool.free_pages == 8 - len(b)
    pool.release("b")
    assert pool.free_pages == 8


def test_a_fork_at_the_end_of_a_page_takes_none() -> None:
    pool = pool_of(num_pages=2)
    pool.admit("a")
    pool.plan([("a", 8)])
    assert pool.free_pages == 0
    pool.fork("a", "b", 8)
    pool.fork("b", "c", 4)
    pool.fork("c", "d", 0)
    assert pages_of(pool, "b") == pages_of(pool, "a")
    assert pages_of(pool, "c") == pages_of(pool, "a")[:1]
    for name, free in (("a", 0), ("b", 1), ("c", 2), ("d", 2)):
        pool.release(name)
        assert pool.free_pages == free


def test_page_tables_are_as_wide_on_every_rank() -> None:
    pools = [pool_of(cp_size=3, cp_rank=rank, sharded=True) for rank in range(3)]
    for pool in pools:
        pool.admit("a")
        pool.admit("b")
        pool.plan([("a", 1), ("b", 4)])
    assert {pool.page_table(["a", "b"]).shape for pool in pools} == {(2, 1)}
    for pool in pools:
        pool.plan([("b", 9)])
    assert {pool.page_table(["a", "b"]).shape for pool in pools} == {(2, 2)}


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ([("a", 27)], "the 27 new tokens of 1 requests need 7 pages of 4 tokens, but 6 are free; release requests"),
        ([("b", 13), ("a", 12)], "the 25 new tokens of 2 requests need 7 pages of 4 tokens, but 6 are free"),
        ([("c", 1)], "request 'c' is not in the pool; admit it first"),
        ([("a", 1), ("c", 1)], "request 'c' is not in the pool"),
        ([("a", 1), ("b", 1), ("a", 1)], "request 'a' is in the step twice"),
        ([("a", 1), ("b", -1)], "extend_len=-1; a length can not be negative"),
    ],
)
def test_a_step_that_is_refused_changes_nothing(extends: list[tuple[str, int]], message: str) -> None:
    pool = pool_of()
    pool.admit("a")
    pool.admit("b")
    pool.plan([("a", 6)])
    with pytest.raises(cpattn.CPError, match=message) as refusal:
        pool.plan(extends)
    assert isinstance(refusal.value, cpattn.PoolFullError) == ("pages" in message)
    assert (pool.length("a"), pool.length("b"), pool.free_pages) == (6, 0, 6)
    # To the last page it is usable as before: 2 tokens are still free in a's second page.
    assert pool.plan([("a", 26)]).batch == ((6, 26),)
    assert pool.free_pages == 0


def test_a_full_pool_of_a_sharded_cache_names_the_rank() -> None:
    pools = [pool_of(2, cp_size=2, cp_rank=rank, sharded=True) for rank in range(2)]
    for pool in pools:
        pool.admit("a")
        pool.plan([("a", 16)])
        with pytest.raises(cpattn.PoolFullError, match="need 1 pages of 4 tokens on rank 0, but 0 are free"):
            pool.plan([("a", 1)])
        assert pool.length("a") == 16


def test_requests_are_admitted_and_forked_under_new_names() -> None:
    pool = pool_of(num_pages=2)
    pool.admit("a")
    pool.plan([("a", 7)])
    again: list[Callable[[], None]] = [lambda: pool.admit("a"), lambda: pool.fork("a", "a", 1)]
    for use_name in again:
        with pytest.raises(cpattn.CPError, match="request 'a' is in the pool already; release it first"):
            use_name()
    for length in (8, -1):
        with pytest.raises(cpattn.CPError, match=f"request 'a' has 7 tokens in the cache, {length} can not be taken from it"):
            pool.fork("a", "b", length)
    with pytest.raises(cpattn.PoolFullError, match="the last page of a copy of request 'a' need 1 pages"):
        pool.fork("a", "b", 7)
    uses: list[Callable[[], object]] = [lambda: pool.release("b"), lambda: pool.length("b"), lambda: pool.page_table(["a", "b"])]
    for use in uses:
        with pytest.raises(cpattn.CPError, match="request 'b' is not in the pool; admit it first"):
            use()
    pool.release("a")
    pool.admit("a")
    assert (pool.length("a"), pool.free_pages) == (0, 2)


def test_a_page_table_of_a_buckets_shape() -> None:
    pool = cpattn.KVPool(num_pages=8, page_size=4, num_layers=1, kv_heads=1, head_dim=8)
    for name, tokens in (("a", 9), ("b", 2)):
        pool.admit(name)
        pool.plan([(name, tokens)])
    plain = pool.page_table(["a", "b"])
    table = pool.page_table(["a", "b"], shape=(5, 7))
    assert table.shape == (5, 7)
    assert torch.equal(table[:2, :3], plain)
    assert (table[2:] == 0).all()
    assert (table[:, 3:] == 0).all()
    with pytest.raises(cpattn.CPError, match=r"a page table of \(5, 2\) is too small for 2 requests of up to 3 pages"):
        pool.page_table(["a", "b"], shape=(5, 2))
    with pytest.raises(cpattn.CPError, match="too small"):
        pool.page_table(["a", "b"], shape=(1, 7))
