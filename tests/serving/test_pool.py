"""KVPool: which pages a request gets, what forks share, what truncate drops, and what is refused without a change."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines.model_engine import bookkeeping

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


def fill(pool: cpattn.KVPool) -> None:
    """Random keys and values in all pages."""
    for pages in (pool.k_pages, pool.v_pages):
        if pages is not None:
            pages.copy_(torch.randn(pages.shape))


def tokens_of(pool: cpattn.KVPool, name: str) -> torch.Tensor:
    """The keys of the request's tokens in all layers, where every rank holds all of them."""
    return pool.k_pages[:, pages_of(pool, name)].flatten(1, 2)[:, : pool.length(name)]


@pytest.mark.parametrize("v_head_dim", [8, 0], ids=["k and v", "v in k"])
def test_a_fork_shares_its_pages_until_a_step_writes_to_the_last(v_head_dim: int) -> None:
    pool = pool_of(num_layers=2, v_head_dim=v_head_dim)
    pool.admit("a")
    pool.plan([("a", 11)])
    fill(pool)
    before = pages_of(pool, "a")
    keys = tokens_of(pool, "a")
    values = pool.k_pages[:, before[2], :2].clone() if pool.v_pages is None else pool.v_pages[:, before[2], :2].clone()
    pool.fork("a", "b", 10)
    assert pages_of(pool, "b") == before
    assert pool.free_pages == 8 - 3
    # b writes first: it gets a copy of the last page's tokens, in all layers. Then a has its page alone, and keeps it.
    pool.plan([("b", 1), ("a", 1)])
    a, b = pages_of(pool, "a"), pages_of(pool, "b")
    assert a == before
    assert b[:2] == before[:2]
    assert b[2] not in before
    assert pool.free_pages == 8 - 4
    assert torch.equal(tokens_of(pool, "a")[:, :11], keys)
    assert torch.equal(tokens_of(pool, "b")[:, :10], keys[:, :10])
    if pool.v_pages is not None:
        assert torch.equal(pool.v_pages[:, b[2], :2], values)
    pool.release("a")
    assert pool.free_pages == 8 - len(b)
    pool.release("b")
    assert pool.free_pages == 8


def test_three_requests_share_a_page_and_the_last_to_write_keeps_it() -> None:
    pool = pool_of(num_pages=4, num_layers=2)
    pool.admit("a")
    pool.plan([("a", 6)])
    fill(pool)
    keys = tokens_of(pool, "a")
    pool.fork("a", "b", 5)
    pool.fork("b", "c", 5)
    first, shared = pages_of(pool, "a")
    assert pages_of(pool, "b") == pages_of(pool, "c") == [first, shared]
    # Two pages are free, and two copies are all that it takes; c keeps the page, as the last one.
    pool.plan([("a", 1), ("b", 3), ("c", 1)])
    assert pool.free_pages == 0
    assert pages_of(pool, "c") == [first, shared]
    assert {pages_of(pool, name)[0] for name in "abc"} == {first}
    assert len({pages_of(pool, name)[1] for name in "abc"}) == 3
    for name, length in (("a", 6), ("b", 5), ("c", 5)):
        assert torch.equal(tokens_of(pool, name)[:, :length], keys[:, :length]), name
    # Another turn writes to pages that no one shares.
    pool.plan([("a", 1), ("c", 2)])
    assert pool.free_pages == 0


def test_only_a_request_that_writes_to_a_shared_page_gets_a_copy() -> None:
    pool = pool_of(num_pages=6)
    pool.admit("a")
    pool.plan([("a", 8)])
    pool.fork("a", "b", 6)
    pool.fork("a", "c", 6)
    _, shared = pages_of(pool, "a")
    # a's last page is full, so its new token goes to another; c gets no token.
    pool.plan([("a", 1), ("c", 0)])
    assert pages_of(pool, "a")[1] == pages_of(pool, "b")[1] == pages_of(pool, "c")[1] == shared
    assert pool.free_pages == 3
    pool.plan([("b", 1)])
    assert pages_of(pool, "b")[1] != shared
    assert pages_of(pool, "a")[1] == pages_of(pool, "c")[1] == shared
    pool.release("a")
    pool.plan([("c", 1)])
    assert pages_of(pool, "c")[1] == shared


def test_a_copy_that_there_is_no_page_for_is_refused_without_a_change() -> None:
    pool = pool_of(num_pages=3)
    pool.admit("a")
    pool.plan([("a", 6)])
    for child in ("b", "c"):
        pool.fork("a", child, 5)
    fill(pool)
    keys, tables = pool.k_pages.clone(), pool.page_table(["a", "b", "c"])
    message = "the 3 new tokens of 3 requests, and copies of pages that they share, need 2 pages of 4 tokens, but 1 are free; release"
    with pytest.raises(cpattn.PoolFullError, match=message):
        pool.plan([("a", 1), ("b", 1), ("c", 1)])
    assert torch.equal(pool.k_pages, keys)
    assert torch.equal(pool.page_table(["a", "b", "c"]), tables)
    assert (pool.length("a"), pool.length("b"), pool.free_pages) == (6, 5, 1)
    pool.plan([("a", 1)])
    assert pool.free_pages == 0


def test_a_fork_before_the_layers_have_written_gets_what_they_write() -> None:
    """The copy is made by the step that needs it, when the parent's tokens are there."""
    pool = pool_of()
    pool.admit("a")
    pool.plan([("a", 6)])
    pool.fork("a", "b", 6)
    fill(pool)  # stands for the layers
    keys = tokens_of(pool, "a")
    pool.plan([("b", 1), ("a", 1)])
    assert pages_of(pool, "a") != pages_of(pool, "b")
    assert torch.equal(tokens_of(pool, "a")[:, :6], keys)
    assert torch.equal(tokens_of(pool, "b")[:, :6], keys)


def test_ranks_of_a_sharded_cache_copy_their_own_pages() -> None:
    """Three ranks with 5, 4 and 4 of 13 tokens: rank 0's last page is part-filled, the others' are full."""
    pools = [pool_of(cp_size=3, cp_rank=rank, sharded=True, num_layers=2) for rank in range(3)]
    for pool in pools:
        pool.admit("a")
        assert pool.plan([("a", 13)]).rank_tokens == (5, 4, 4)
        fill(pool)
        pool.fork("a", "b", 13)
    tables = [pool.page_table(["a", "b"]).tolist() for pool in pools]
    keys = [pool.k_pages.clone() for pool in pools]
    plans = [pool.plan([("a", 3)]) for pool in pools]
    assert plans[0].rank_extends.tolist() == [[1, 1, 1]]
    for rank, pool in enumerate(pools):
        (a, b), (before, _) = pool.page_table(["a", "b"]).tolist(), tables[rank]
        assert b[:2] == before
        assert a[0] == before[0]
        own = a[1]
        assert own not in before[: 2 if rank == 0 else 1]
        written = keys[rank].clone()
        if rank == 0:
            written[:, own, :1] = keys[rank][:, before[1], :1]
        assert torch.equal(pool.k_pages, written)
    assert {pool.free_pages for pool in pools} == {5}


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
        ([("a", 1), ("b", -1)], r"request 'b' gets -1 new tokens \(int\); pass an integer of at least 0"),
        ([("a", True)], r"request 'a' gets True new tokens \(bool\); pass an integer of at least 0"),
        ([("a", 1.0)], r"request 'a' gets 1.0 new tokens \(float\)"),
        ([("a", "1")], r"request 'a' gets '1' new tokens \(str\)"),
        ([("a", 2**31)], "the limit is 2147483647"),
        ([("a", 1), "b1"], r"entry 1 of the step is 'b1', which is not a pair; pass \(request, new tokens\) pairs, such as \[\('a', 512\)"),
        ([("a", 1, 2)], r"entry 0 of the step is \('a', 1, 2\), which is not a pair"),
        (["a", 1], "entry 0 of the step is 'a', which is not a pair"),
        ([3], "entry 0 of the step is 3, which is not a pair"),
        ([(["a"], 1)], r"request \['a'\] is a list, which has no hash; name requests by strings"),
        ({"a": 1}, r"the step is a dict; pass \(request, new tokens\) pairs, .*: list\(step.items\(\)\)"),
        ({("a", 1)}, r"the step is \{\('a', 1\)\} \(set\); pass \(request, new tokens\) pairs"),
        ("a", r"the step is 'a' \(str\); pass \(request, new tokens\) pairs"),
        (None, r"the step is None \(NoneType\); pass"),
    ],
)
def test_a_step_that_is_refused_changes_nothing(extends: Any, message: str) -> None:
    pool = pool_of()
    pool.admit("a")
    pool.admit("b")
    pool.plan([("a", 6)])
    before = bookkeeping(pool)
    with pytest.raises(cpattn.CPError, match=message) as refusal:
        pool.plan(extends)
    assert isinstance(refusal.value, cpattn.PoolFullError) == ("pages" in message)
    assert bookkeeping(pool) == before
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
    assert pool.free_pages == 0
    pool.fork("a", "c", 7)
    pool.release("c")
    uses: list[Callable[[], object]] = [lambda: pool.release("b"), lambda: pool.length("b"), lambda: pool.truncate("b", 0)]
    uses += [lambda: pool.page_table(["a", "b"]), lambda: pool.fork("b", "c", 0)]
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


# Truncation.


@pytest.mark.parametrize("length", range(12))
def test_truncating_drops_tokens_and_frees_pages(length: int) -> None:
    pool = pool_of()
    pool.admit("a")
    pool.plan([("a", 11)])
    fill(pool)
    keys, pages = tokens_of(pool, "a"), pages_of(pool, "a")
    pool.truncate("a", length)
    kept = -(-length // 4)
    assert pool.length("a") == length
    assert pages_of(pool, "a") == pages[:kept]
    assert pool.free_pages == 8 - kept
    assert torch.equal(tokens_of(pool, "a"), keys[:, :length])
    # The next tokens go where the dropped ones were.
    assert pool.plan([("a", 11 - length)]).batch == ((length, 11 - length),)
    assert pages_of(pool, "a") == pages


def test_drafts_in_a_full_pool_are_dropped_and_written_over() -> None:
    pool = pool_of(num_pages=2)
    pool.admit("a")
    pool.plan([("a", 8)])
    pool.truncate("a", 6)
    assert pool.plan([("a", 2)]).batch == ((6, 2),)


def test_truncating_leaves_what_others_share_as_it_is() -> None:
    pool = pool_of(num_layers=2)
    pool.admit("a")
    pool.plan([("a", 10)])
    fill(pool)
    keys, pages = tokens_of(pool, "a"), pages_of(pool, "a")
    pool.fork("a", "b", 10)
    pool.truncate("a", 6)
    assert pool.free_pages == 8 - 3
    assert (pages_of(pool, "a"), pages_of(pool, "b")) == (pages[:2], pages)
    # b has the second page too, to the end: a's next tokens go to a copy.
    pool.plan([("a", 1)])
    assert pages_of(pool, "a")[1] not in pages
    assert torch.equal(tokens_of(pool, "a")[:, :6], keys[:, :6])
    assert torch.equal(tokens_of(pool, "b"), keys)
    pool.release("b")
    assert pool.free_pages == 8 - 2


def test_truncating_a_sharded_request_counts_each_ranks_tokens() -> None:
    pools = [pool_of(cp_size=3, cp_rank=rank, sharded=True) for rank in range(3)]
    for pool in pools:
        pool.admit("a")
        plan = pool.plan([("a", 30)], partition="zigzag")
        # Zigzag: ranks 0, 1, 2, 2, 1, 0 have 5 tokens each. Of the first 17, ranks 0 and 1 have 5 and rank 2 has 7.
        assert [chunk.rank for chunk in plan.chunks] == [0, 1, 2, 2, 1, 0]
        assert pool.free_pages == 8 - 3
        pool.truncate("a", 17)
        assert pool.length("a") == 17
        assert pool.free_pages == 8 - 2
        assert pool.plan([("a", 0)]).shard_lens.tolist() == [[5, 5, 7]]
        pool.truncate("a", 3)
        assert pool.plan([("a", 0)]).shard_lens.tolist() == [[3, 0, 0]]
    assert {pool.page_table(["a"]).shape for pool in pools} == {(1, 1)}
    assert {pool.free_pages for pool in pools} == {7}


@pytest.mark.parametrize("length", [8, -1, True, 3.0, "3", None])
def test_lengths_that_a_request_does_not_have_are_refused(length: Any) -> None:
    pool = pool_of()
    pool.admit("a")
    pool.plan([("a", 7)])
    before = bookkeeping(pool)
    message = f"request 'a' has 7 tokens in the cache, but length={length!r}; pass an integer from 0 to 7"
    uses: list[Callable[[], None]] = [lambda: pool.fork("a", "b", length), lambda: pool.truncate("a", length)]
    for use in uses:
        with pytest.raises(cpattn.CPError, match=re.escape(message)):
            use()
    assert bookkeeping(pool) == before


@pytest.mark.parametrize(("owner", "bytes_a_token"), [("replicated", 0), (cpattn.Striped(3), 0), ("computed", 2)])
def test_a_decode_of_a_long_context_makes_little_memory(owner: Any, bytes_a_token: int) -> None:
    """Whoever decodes plans such a step for each token. What it looks at, or copies, of all that are cached is slow."""
    length = 1 << 20
    pool = cpattn.KVPool(2, length, 1, kv_heads=1, head_dim=1, dtype=torch.float16, cp_size=2, owner=owner)
    pool.admit("a")
    pool.plan([("a", length - 2)])
    tracemalloc.start()
    pool.plan([("a", 1)])
    pool.page_table(["a"])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < bytes_a_token * length + length // 4
