"""cp_attention over pages: what it computes, what it writes, and what it refuses before anything is sent or written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from torch import Tensor

import cpattn
from cpattn.testing import run_loopback

# Prefill from nothing, a prefix-cache hit with a remainder, idle, decode, idle from nothing, a hit at a page's end.
MIXED = [(0, 21), (37, 18), (30, 0), (47, 1), (0, 0), (16, 5)]


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("cp_size", [1, 3])
def test_paged_equals_packed(page_size: int, strategy: str, backend: str, cp_size: int) -> None:
    """To the bit: the same keys in the same order, whether a backend reads the pages or a packed copy of them."""
    packed, paged = (AttentionCase(MIXED, cache=cache, page_size=page_size, sinks=True) for cache in ("packed", "paged"))
    plan = packed.plan(cp_size, pad_to=4)
    expected = run_loopback(lambda c: packed.on_rank(plan, c.rank, c, strategy, backend), cp_size)
    outputs = run_loopback(lambda c: paged.on_rank(plan, c.rank, c, strategy, backend), cp_size)
    paged.check(outputs, plan, strategy, backend)
    for (out, lse), (expected_out, expected_lse) in zip(outputs, expected, strict=True):
        assert torch.equal(out, expected_out)
        assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("strategy", ["pass_q", "pass_q_ring", "ring"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_sharded_equals_replicated(strategy: str, page_size: int) -> None:
    for cp_size, seed in ((1, 0), (2, 1), (3, 2), (5, 3)):
        case = AttentionCase(MIXED, cache="sharded", page_size=page_size, sinks=True, seed=seed)
        case.check_loopback(case.plan(cp_size, pad_to=4), strategy, "reference")


@pytest.mark.parametrize(
    "shards",
    [
        pytest.param([[35, 0, 0], [0, 0, 1]], id="all on one rank"),
        pytest.param([[0, 35, 0], [0, 1, 0]], id="all on another"),
        pytest.param([[0, 0, 35], [1, 0, 0]], id="each on its own"),
        pytest.param([[12, 12, 11], [0, 0, 1]], id="evenly"),
    ],
)
@pytest.mark.parametrize("strategy", ["pass_q", "pass_q_ring", "ring"])
def test_prefixes_on_some_ranks_only(strategy: str, shards: list[list[int]]) -> None:
    case = AttentionCase([(35, 2), (1, 1)], cache="sharded", page_size=4)
    case.check_loopback(cpattn.plan(case.batch, 3, prefix_shards=shards), strategy, "cpu")


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q", "pass_q_ring"])
def test_a_small_batch_after_a_large_one_sees_nothing_of_it(strategy: str) -> None:
    """Reused buffers hold the large batch, and then NaN."""
    cache = "sharded" if strategy.startswith("pass_q") else "paged"
    cases = [AttentionCase(batch, cache=cache, seed=i) for i, batch in enumerate(([(70, 60), (0, 31)], [(5, 3)], [(9, 1), (0, 2)]))]
    plans = [case.plan(3, pad_to=pad_to) for case, pad_to in zip(cases, (1, 16, 1), strict=True)]

    def program(communicator: cpattn.Communicator) -> list[tuple[Tensor, Tensor]]:
        outputs = []
        for case, plan in zip(cases, plans, strict=True):
            outputs.append(case.on_rank(plan, communicator.rank, communicator, strategy, "cpu"))
            for buffer in communicator.arena.blocks():
                buffer.fill_(255)
        return outputs

    for case, plan, *outputs in zip(cases, plans, *run_loopback(program, 3), strict=True):
        case.check(outputs, plan, strategy, "cpu")


def on_ranks(case: AttentionCase, plan: cpattn.Plan, **changes: Any) -> list[tuple[Tensor | str, int, bool]]:
    """Each rank's output or the error it raised, the bytes it sent, and whether its pages are as they were.

    ``changes`` are arguments of the call: a value, or a function of this rank's cache.
    """

    def program(communicator: cpattn.Communicator) -> tuple[Tensor | str, int, bool]:
        meta = plan.metadata(communicator.rank)
        cache = case.pages(plan, communicator.rank).cache
        before = [x.clone() for x in (cache.k_pages, cache.v_pages) if x is not None]
        arguments: dict[str, Any] = {name: cpattn.shard(getattr(case, name), meta) for name in "qkv"}
        arguments["kv_cache"] = cache
        arguments |= {name: change(cache) if callable(change) else change for name, change in changes.items()}
        result: Tensor | str
        try:
            result = cpattn.cp_attention(**arguments, meta=meta, group=communicator)
        except cpattn.CPError as error:
            result = f"{type(error).__name__}: {error}"
        after = [x for x in (cache.k_pages, cache.v_pages) if x is not None]
        unchanged = all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(after, before, strict=True))
        return result, communicator.bytes_sent, unchanged

    return run_loopback(program, plan.cp_size)


def outputs_of(case: AttentionCase, plan: cpattn.Plan, **changes: Any) -> list[Tensor]:
    outputs = [result for result, _, _ in on_ranks(case, plan, **changes)]
    assert all(isinstance(out, Tensor) for out in outputs), outputs
    return [out for out in outputs if isinstance(out, Tensor)]


def wider(cache: cpattn.PagedKV) -> cpattn.PagedKV:
    """With lines and entries that an engine has put on top: nobody is to look at them."""
    table = torch.full((len(cache.page_table) + 3, cache.page_table.shape[1] + 5), 2**30, dtype=cache.page_table.dtype)
    table[:-3, :-5] = cache.page_table
    return cpattn.PagedKV(cache.k_pages, cache.v_pages, table)


def strided(cache: cpattn.PagedKV) -> cpattn.PagedKV:
    """Pages as one layer's part of all layers', and a page table that is part of a larger one, transposed."""
    assert cache.v_pages is not None
    both = torch.stack([cache.k_pages, cache.v_pages], dim=2)
    return cpattn.PagedKV(both[:, :, 0], both[:, :, 1], cache.page_table.t().contiguous().t())


def int64(cache: cpattn.PagedKV) -> cpattn.PagedKV:
    """Entries beyond a request's pages hold what int32 would take for a page."""
    table = cache.page_table.long()
    return cpattn.PagedKV(cache.k_pages, cache.v_pages, torch.where((table < 0) | (table > 1000), 2**32, table))


@pytest.mark.parametrize("change", [wider, strided, int64])
@pytest.mark.parametrize(("strategy", "cache"), [("all_gather", "paged"), ("ring", "paged"), ("pass_q", "sharded"), ("ring", "sharded")])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_form_of_pages_and_table_changes_nothing(change: Any, strategy: str, cache: str, backend: str) -> None:
    case = AttentionCase(MIXED, cache=cache, page_size=3)
    plan = case.plan(2)
    expected = outputs_of(case, plan, strategy=strategy, backend=backend)
    for out, same in zip(outputs_of(case, plan, strategy=strategy, backend=backend, kv_cache=change), expected, strict=True):
        assert torch.equal(out, same)


def test_idle_requests_and_padding_on_top_change_nothing() -> None:
    """An engine pads its batch and its rows; neither moves a causal horizon or a page."""
    case = AttentionCase(MIXED, cache="paged")
    padded = AttentionCase([*MIXED, (0, 0), (0, 0)], cache="paged")
    plain, rounded = case.plan(2), padded.plan(2, pad_to=32)
    assert (plain.rows, rounded.rows) == (23, 32)
    for out, padded_out in zip(outputs_of(case, plain), outputs_of(padded, rounded), strict=True):
        assert torch.equal(out[:22], padded_out[:22])
        assert not padded_out[23:].any()


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_tokens_that_an_engine_rounds_up_change_nothing(strategy: str) -> None:
    """It pads q, k and v of the whole batch at their end, with whatever is there: NaN."""
    case, rounded = (AttentionCase(MIXED, cache="paged") for _ in range(2))
    plan = case.plan(2, pad_to=32)
    for name in "qkv":
        setattr(rounded, name, torch.nn.functional.pad(getattr(case, name), (0, 0, 0, 0, 0, 64 - plan.num_tokens), value=torch.nan))
    expected = outputs_of(case, plan, strategy=strategy)
    for out, same in zip(outputs_of(rounded, plan, strategy=strategy), expected, strict=True):
        assert torch.equal(out, same)


def change_cache(**changes: Any) -> Any:
    def change(cache: cpattn.PagedKV) -> cpattn.PagedKV:
        fields = vars(cache)
        return cpattn.PagedKV(**fields | {name: value(fields[name]) for name, value in changes.items()})

    return change


def with_page(page: int) -> Any:
    def change(table: Tensor) -> Tensor:
        table = table.clone()
        table[1, 2] = page
        return table

    return change


def same_page(entry: tuple[int, int], other: tuple[int, int]) -> Any:
    def change(table: Tensor) -> Tensor:
        table = table.clone()
        table[entry] = table[other]
        return table

    return change


MISTAKES: dict[str, tuple[Any, str]] = {
    "table too narrow": (
        change_cache(page_table=lambda x: x[:, :3]),
        "PageTableError: kv_cache.page_table has 3 pages of 16 tokens for each request, 48 in all, but request 1 has 55 with its new ones; "
        "widen the table",
    ),
    "too few lines": (change_cache(page_table=lambda x: x[:5]), "has 5 lines, one a request, but the batch has 6 requests"),
    "table of int16": (change_cache(page_table=lambda x: x.to(torch.int16)), "torch.int16; pass an int32 or int64 tensor"),
    "table of one axis": (change_cache(page_table=lambda x: x[0]), r"kv_cache.page_table is (5,) torch.int32; pass an int32"),
    "table is a list": (change_cache(page_table=lambda x: x.tolist()), "kv_cache.page_table is a list; pass an int32 or int64 tensor"),
    "table elsewhere": (change_cache(page_table=lambda x: x.to("meta")), "kv_cache.page_table is on meta, but the metadata is on cpu"),
    "page that is not there": (
        change_cache(page_table=with_page(99)),
        "page_table[1, 2] is 99, but there are pages 0 to 15; request 1 needs 4 ",
    ),
    "negative page": (change_cache(page_table=with_page(-1)), "page_table[1, 2] is -1, but there are pages 0 to 15"),
    "pages of three axes": (change_cache(k_pages=lambda x: x[0]), "kv_cache.k_pages has shape (16, 2, 16); pass a tensor [num_pages,"),
    "other page size": (change_cache(v_pages=lambda x: x[:, :8]), "k_pages has (16, 16) pages of tokens, v_pages (16, 8); they must agree"),
    "last axis strided": (change_cache(k_pages=lambda x: x[..., ::2]), "the last must be 1, as rows are written in place"),
    "other heads": (change_cache(k_pages=lambda x: x[:, :, :1]), "kv_cache.k_pages is (16, 16, 1, 16) torch.float32 on cpu, but k is"),
    "other dtype": (
        change_cache(v_pages=lambda x: x.bfloat16()),
        "is torch.float32, v_pages torch.bfloat16; both must be of one dtype",
    ),
    "no v_pages": (change_cache(v_pages=lambda x: None), "of v and kv_cache.v_pages one is None and the other is not"),
    "slot of two new tokens": (
        change_cache(page_table=same_page((5, 1), (0, 0))),
        "kv_cache.page_table puts new token 0 of request 0 and new token 16 of request 5 into the same slot, place 0 of page ",
    ),
    "slot of a new and a cached token": (
        change_cache(page_table=same_page((2, 0), (0, 1))),
        "puts new token 16 of request 0 and cached token 0 of request 2 into the same slot, place 0 of page ",
    ),
    "slot in the middle of a page": (
        change_cache(page_table=same_page((3, 2), (1, 2))),
        "puts new token 37 of request 1 and cached token 37 of request 3 into the same slot, place 5 of page ",
    ),
    "page twice in a line": (
        change_cache(page_table=same_page((1, 3), (1, 0))),
        "puts new token 48 of request 1 and cached token 0 of request 1 into the same slot, place 0 of page ",
    ),
    "K is V": (
        lambda cache: cpattn.PagedKV(cache.k_pages, cache.k_pages, cache.page_table),
        "PageTableError: kv_cache.k_pages and v_pages have elements in common, so that K and V overwrite each other; pass",
    ),
    "V is a part of K": (
        lambda cache: cpattn.PagedKV(cache.k_pages[1:], cache.k_pages[:-1], cache.page_table % 15),
        "kv_cache.k_pages and v_pages have elements in common",
    ),
    "expanded K": (
        change_cache(k_pages=lambda x: x[:1].expand(16, -1, -1, -1)),
        "kv_cache.k_pages has shape (16, 16, 2, 16) and strides (0, 32, 16, 1), so that several tokens lie in the same memory",
    ),
    "overlapping V": (
        change_cache(v_pages=lambda x: x.as_strided(x.shape, (16, 32, 16, 1))),
        "kv_cache.v_pages has shape (16, 16, 2, 16) and strides (16, 32, 16, 1), so that several tokens lie in the same memory",
    ),
    "gradient": (change_cache(k_pages=lambda x: x.requires_grad_()), "kv_cache.k_pages requires a gradient"),
    "no cache": (lambda cache: None, "PrefixError: the batch has 130 prefix tokens, but kv_cache is None"),
    "tuple": (
        lambda cache: (cache.k_pages, cache.v_pages),
        "kv_cache is a tuple; pass a PackedKV(k, v) with the batch's 130 prefix tokens",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=[name.replace(" ", "-") for name in MISTAKES])
@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_mistakes_raise_on_every_rank_before_anything_is_sent_or_written(change: Any, message: str, strategy: str) -> None:
    case = AttentionCase(MIXED, cache="paged")
    for error, sent, unchanged in on_ranks(case, case.plan(2), kv_cache=change, strategy=strategy):
        assert isinstance(error, str)
        assert message in error
        assert sent == 0
        assert unchanged


def test_a_table_that_is_too_narrow_for_one_rank_raises_on_all() -> None:
    """Each rank's table is wide enough for what it holds itself, but all must raise, or the others would wait."""
    case = AttentionCase([(40, 4), (3, 1)], cache="sharded")
    plan = cpattn.plan(case.batch, 2, prefix_shards=[[35, 5], [0, 3]])
    narrow = change_cache(page_table=lambda x: x[:, :2])
    for error, sent, unchanged in on_ranks(case, plan, kv_cache=narrow):
        assert isinstance(error, str)
        assert "2 pages of 16 tokens for each request, 32 in all, but request 0 has 37 with its new ones, on the rank that holds" in error
        assert sent == 0
        assert unchanged


@pytest.mark.parametrize("strategy", ["pass_q", "pass_q_ring", "ring"])
def test_a_slot_of_two_tokens_of_a_sharded_cache_raises_before_anything_is_written(strategy: str) -> None:
    case = AttentionCase([(37, 18), (20, 9)], cache="sharded")
    results = on_ranks(case, case.plan(2), kv_cache=change_cache(page_table=torch.zeros_like), strategy=strategy)
    for error, sent, unchanged in results:
        assert isinstance(error, str)
        assert re.search(r"puts new token \d+ of request \d \(counted on this rank\) and .* into the same slot, place \d+ of page 0", error)
        # A rank sees its own table alone, and what it owes the others is sent.
        assert sent > 0
        assert unchanged


@pytest.mark.parametrize(
    ("strategy", "cache"),
    [("pass_q", "striped"), ("pass_q_ring", "sharded"), ("ring", "striped"), ("all_gather", "ranked"), ("attend", "striped")],
)
def test_ranks_do_not_wait_for_one_that_refuses_its_own_table(strategy: str, cache: str) -> None:
    """They get NaN, in some rows at least, and the group works. In a striped cache the same table may be right on one rank and wrong on
    another, which holds a token more."""
    case = AttentionCase([(37, 18), (20, 9)], cache=cache, window=9 if strategy == "all_gather" else None)
    plan = case.plan(3)

    def program(group: cpattn.Transport) -> tuple[str, bool]:
        meta, pages = plan.metadata(group.rank), case.pages(plan, group.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))

        def call(given: cpattn.PagedKV) -> Tensor:
            if strategy == "attend":
                return cpattn.attend(q, given, meta, group=group)
            return cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=given, strategy=strategy, window=case.window)

        said, found_nan = "", False
        wrong = cpattn.PagedKV(pages.cache.k_pages.clone(), pages.cache.v_pages, pages.cache.page_table.clone())
        if group.rank == 1:
            wrong.page_table[1, 0] = -1
        try:
            found_nan = bool(call(wrong).isnan().any())
        except cpattn.PageTableError as error:
            said = str(error)
            assert torch.equal(wrong.k_pages.nan_to_num(7.0), pages.cache.k_pages.nan_to_num(7.0))
        if strategy != "attend":
            assert call(case.pages(plan, group.rank).cache).isfinite().all()
        return said, found_nan

    for rank, (said, found_nan) in enumerate(run_loopback(program, 3, timeout=20)):
        assert said.startswith("kv_cache.page_table[1, 0] is -1, but there are pages 0 to") == (rank == 1)
        assert found_nan == (rank != 1)


@pytest.mark.parametrize(
    ("strategy", "cache"),
    [("all_gather", "paged"), ("ring", "paged"), ("pass_q", "sharded"), ("pass_q_ring", "sharded"), ("ring", "sharded")],
)
def test_a_table_that_is_wrong_on_one_rank_raises_on_all_with_check(strategy: str, cache: str) -> None:
    case = AttentionCase([(37, 18), (20, 9)], cache=cache)
    plan = case.plan(3)

    def program(communicator: cpattn.Communicator) -> tuple[str, bool]:
        meta = plan.metadata(communicator.rank)
        pages = case.pages(plan, communicator.rank)
        given, before = pages.cache, pages.cache.k_pages.clone()
        if communicator.rank == 1:
            given = cpattn.PagedKV(given.k_pages, given.v_pages, torch.zeros_like(given.page_table))
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        with pytest.raises(cpattn.CPError) as raised:
            cpattn.cp_attention(q, k, v, meta, group=communicator, kv_cache=given, strategy=strategy, check=True)
        return f"{raised.type.__name__}: {raised.value}", torch.equal(given.k_pages.nan_to_num(7.0), before.nan_to_num(7.0))

    for rank, (error, unchanged) in enumerate(run_loopback(program, 3)):
        refused = "" if rank == 1 else "rank 1 refused this call: "
        assert error.startswith(f"PageTableError: {refused}kv_cache.page_table puts new token")
        assert unchanged


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize(
    ("batch", "shared"),
    [
        pytest.param([(37, 5), (40, 3)], 2, id="whole pages"),
        pytest.param([(37, 0), (37, 8)], 3, id="a page in which one reads and the other goes on"),
        pytest.param([(20, 0), (20, 0), (0, 7)], 2, id="pages of idle requests"),
    ],
)
def test_pages_that_requests_only_read_may_be_shared(batch: list[tuple[int, int]], shared: int, strategy: str) -> None:
    case = AttentionCase(batch, cache="paged")
    tokens = min(16 * shared, batch[0][0])
    for prefix in (case.prefix_k, case.prefix_v):
        prefix[batch[0][0] :][:tokens] = prefix[:tokens]

    def share(table: Tensor) -> Tensor:
        table = table.clone()
        table[1, :shared] = table[0, :shared]
        return table

    plan = case.plan(2)
    expected = outputs_of(case, plan, strategy=strategy)
    for out, same in zip(outputs_of(case, plan, strategy=strategy, kv_cache=change_cache(page_table=share)), expected, strict=True):
        assert torch.equal(out, same)


@pytest.mark.parametrize(
    ("cache", "changes", "message"),
    [
        ("sharded", {"kv_cache": lambda cache: None}, "the plan has prefix_shards, but kv_cache is None; pass this rank's pages"),
        (
            "sharded",
            {"kv_cache": lambda cache: cpattn.PackedKV(cache.k_pages[0], None)},
            "kv_cache is a PackedKV, which every rank has whole",
        ),
        (
            "sharded",
            {"window": 5},
            "each rank holds, but not which, and a window needs their positions: pass prefix_ranks",
        ),
        (
            "sharded",
            {"strategy": "all_gather"},
            "it would bring the whole of a sharded cache to every rank; 'ring', 'pass_q', 'pass_q_ring'",
        ),
        (
            "paged",
            {"strategy": "pass_q"},
            "it moves no keys, and pages that every rank holds whole want all of them; shard the cache (owner,",
        ),
    ],
    ids=["no cache", "packed", "window", "all_gather", "pass_q"],
)
def test_what_a_kind_of_cache_can_not_do(cache: str, changes: dict[str, Any], message: str) -> None:
    case = AttentionCase([(0, 9), (0, 4)] if "kv_cache" in changes else MIXED, cache=cache)
    for error, sent, unchanged in on_ranks(case, case.plan(2), **changes):
        assert isinstance(error, str)
        assert message in error
        assert sent == 0
        assert unchanged


def test_who_attends_has_named_no_strategy() -> None:
    case = AttentionCase([(9, 4)], cache="sharded")
    plan = case.plan(2)

    def attend(group: cpattn.Transport, window: int | None, softcap: float) -> None:
        cache = case.pages(plan, group.rank).cache
        q = torch.zeros(plan.rows, 4, 16)
        cpattn.attend(q, cache, plan.metadata(group.rank), group=group, window=window, softcap=softcap, check=window is None)

    def program(group: cpattn.Transport) -> None:
        with pytest.raises(cpattn.UnsupportedError, match=r"^attend cannot serve this call: prefix_shards say how .* pass prefix_ranks in"):
            attend(group, 5, 1.0)
        assert group.bytes_sent == 0
        with pytest.raises(cpattn.DisagreementError, match=r"rank 0: attend, 4/2 heads of .*, softcap=1.0, .* rank 1: attend, 4/2 heads"):
            attend(group, None, 1.0 + group.rank)

    run_loopback(program, 2, timeout=20)
