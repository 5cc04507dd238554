"""Pages in fp8 with scales, and in half precision beside other queries: what is computed, written, sent and refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from inputs.stored_cases import StoredCase
from programs import split_heads
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.attention.stored_keys import over_stored_keys
from cpattn.call.arguments import StrategyChoice
from cpattn.exchange.registry import find_strategy
from cpattn.exchange.schedule import bytes_sent
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.problem import Problem
from cpattn.testing import run_loopback

E4M3, E5M2, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32
# Prefill from nothing, a prefix-cache hit with a remainder, idle, decode, idle from nothing, a hit at a page's end.
MIXED = [(0, 21), (37, 18), (30, 0), (47, 1), (0, 0), (16, 5)]
FIRST = [(0, 21), (0, 18), (30, 0), (0, 1), (0, 0), (0, 9)]
EXCHANGES = [
    ("all_gather", "paged"),
    ("ring", "paged"),
    ("ring", "sharded"),
    ("pass_q", "sharded"),
    ("pass_q_ring", "sharded"),
    ("ring", "striped"),
    ("pass_q", "striped"),
    ("pass_q_ring", "striped"),
]
# Pages, scales, queries.
FORMS = [(E4M3, "token", BF16), (E4M3, "head", FP16), (E5M2, "one", FP32), (E5M2, "token", FP16), (BF16, None, FP16), (BF16, None, FP32)]


def check_on_ranks(case: StoredCase, plan: cpattn.Plan, strategy: StrategyChoice, backend: str, **options: Any) -> None:
    outputs = run_loopback(lambda c: case.on_rank(plan, c.rank, c, strategy, backend, **options), plan.cp_size)
    case.dequantised().check(outputs, plan, strategy, backend)


@pytest.mark.parametrize(
    ("strategy", "cache", "stored", "scales", "dtype"),
    [(*exchange, *form) for number, exchange in enumerate(EXCHANGES) for form in FORMS[number % 2 :: 2]],
    ids=str,
)
def test_all_see_what_the_pages_hold(strategy: str, cache: str, stored: torch.dtype, scales: str | None, dtype: torch.dtype) -> None:
    """And nothing more is lost: keys of this call, and of this rank, are seen as others see them."""
    kind: dict[str, Any] = {"stored": stored, "scales": scales, "dtype": dtype, "cache": cache, "page_size": 5, "head_dim": 18}
    for backend, v_in_k, cp_size in (("cpu", False, 3), ("reference", True, 2)):
        case = StoredCase(MIXED, v_head_dim=10 if v_in_k else 14, v_in_k=v_in_k, **kind)
        check_on_ranks(case, case.plan(cp_size, pad_to=4), strategy, backend)


@pytest.mark.parametrize("written", [False, True], ids=["", "written before"])
@pytest.mark.parametrize(
    ("cache", "window", "form"), [("striped", None, 0), ("striped", 9, 1), ("sharded", None, 3), ("ranked", 9, 2), ("ranked", None, 4)]
)
def test_queries_split_by_heads(cache: str, window: int | None, form: int, written: bool) -> None:
    """Each rank converts and writes what it holds, and the queries of all heads see what pages hold."""
    stored, scales, dtype = FORMS[form]
    kind: dict[str, Any] = {"stored": stored, "scales": scales, "dtype": dtype, "cache": cache, "window": window, "interleave": 3}
    for backend, v_in_k, cp_size in (("cpu" if window is None else "reference", False, 3), ("reference", True, 2), ("reference", False, 1)):
        case = StoredCase(MIXED, heads=6, head_dim=18, v_head_dim=10, v_in_k=v_in_k, page_size=5, **kind)
        plan = case.plan(cp_size, queries="all", pad_to=4)
        outputs = run_loopback(partial(_by_heads, case, plan, written, backend), cp_size)
        split_heads.check(case.dequantised(), plan, outputs, backend)


def _by_heads(case: StoredCase, plan: cpattn.Plan, written: bool, backend: str, group: cpattn.Transport) -> Any:
    return split_heads.call(case, plan.metadata(group.rank), group, written, backend=backend, check=True)


def test_what_others_keep_may_overflow() -> None:
    """Where each rank has the rows of all tokens it looks at those that it keeps: here 2 and 3 are rank 1's."""
    meta = cpattn.plan([(0, 6)], 2, owner=cpattn.Striped(2), queries="all")

    def program(group: cpattn.Transport) -> str:
        q, k = (torch.zeros(6, 2, 16, dtype=BF16) for _ in range(2))
        k[3 if group.rank == 0 else 5] = 1000
        call = partial(cpattn.cp_attention, q, k, k, meta.metadata(group.rank), group=group, kv_cache=cache_like())
        assert call(check=True).isfinite().all()
        if group.rank == 0:
            k[4] = 1000
        with pytest.raises(cpattn.CPError) as raised:
            call(check=True)
        return str(raised.value)

    own, _ = run_loopback(program, 2)
    assert "k goes to 1000 in head 0, but the pages are torch.float8_e4m3fn" in own


@pytest.mark.parametrize("scales", ["head", "token"])
def test_windows_sinks_groups_of_heads_and_one_rank(scales: str) -> None:
    changes: dict[str, Any]
    for cp_size, strategy, cache, changes in (
        (3, "all_gather", "paged", {"window": 9, "overlap": 2, "sinks": True}),
        (3, "all_gather", "striped", {"window": 9}),
        (2, "pass_q", "striped", {"window": 9, "interleave": 4}),
        (1, "all_gather", "paged", {"softcap": 5.0}),
        (4, cpattn.two_level(2), "paged", {"sinks": True}),
    ):
        case = StoredCase(MIXED, cache=cache, page_size=4, scales=scales, dtype=BF16, **changes)
        check_on_ranks(case, case.plan(cp_size), strategy, "reference", check=True)


@pytest.mark.parametrize(("scales", "window"), [("head", None), ("token", None), ("token", 20)])
def test_what_is_needed_comes_first(scales: str, window: int | None) -> None:
    """And between keys that a window reaches nothing may be NaN, scales included."""
    case = StoredCase([(9, 30), *[(9, 8)] * 9], cache="paged", page_size=4, scales=scales, dtype=BF16, window=window)
    plan = case.plan(3, partition="whole")
    assert traveling_keys(case.problem(plan), plan).what == "needed"
    check_on_ranks(case, plan, "all_gather", "reference")


@pytest.mark.parametrize(
    ("batch", "partition"), [(MIXED, "zigzag"), (FIRST, "zigzag"), (FIRST, "uncut")], ids=["mixed", "first chunks", "whole first chunks"]
)
@pytest.mark.parametrize("scales", ["one", "head", "token"])
def test_a_packed_copy_has_the_bits_of_the_pages(scales: str, batch: list[tuple[int, int]], partition: str) -> None:
    """Whatever a backend reads, keys are the same numbers in q's dtype; also where they are attended to before they are in the pages."""
    case = StoredCase(batch, cache="paged", page_size=3, scales=scales, dtype=BF16, overlap=2)
    reference = cpattn.BACKENDS["reference"]
    seen = []

    def spy(q: Tensor, keys: cpattn.Keys, spans: cpattn.Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        seen.append(keys)
        return reference.attend(q, keys, spans, options, out_dtype)

    copied = replace(reference, name="copied", attend=spy, reads_stored=lambda problem: False)
    plan = case.plan(2, partition=partition)
    outputs = [
        run_loopback(partial(lambda backend, c: case.on_rank(plan, c.rank, c, "all_gather", backend), backend), 2)
        for backend in (reference, copied)
    ]
    assert {(keys.k.dtype, keys.v.dtype, keys.k_scale, keys.page_table) for keys in seen} == {(BF16, BF16, None, None)}
    for (out, lse), (other, other_lse) in zip(*outputs, strict=True):
        assert torch.equal(out, other)
        assert torch.equal(lse, other_lse)


@pytest.mark.parametrize(("scales", "strategy", "cache"), [("token", "all_gather", "paged"), ("head", "ring", "sharded")])
def test_bytes_travel(scales: str, strategy: str, cache: str) -> None:
    sent = []
    for stored in (E4M3, BF16):
        is_fp8 = stored == E4M3
        case = StoredCase(
            [(7, 40), (0, 9)], cache=cache, head_dim=128, page_size=16, stored=stored, scales=scales if is_fp8 else None,
            dtype=BF16 if is_fp8 else FP16,
        )  # fmt: skip
        plan = case.plan(3)

        def program(c: cpattn.Communicator, case: StoredCase = case, plan: cpattn.Plan = plan) -> int:
            meta = plan.metadata(c.rank)
            q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
            pages = case.pages(plan, c.rank).cache
            call = cpattn.prepare(q, k, v, meta, kv_cache=pages, strategy=strategy, group=c)
            call(q, k, v, kv_cache=pages)
            assert c.bytes_sent == bytes_sent(call.schedule)[c.rank]
            return c.bytes_sent

        sent.append(run_loopback(program, 3))
    assert all(fp8 <= 0.52 * half for fp8, half in zip(*sent, strict=True))


@pytest.mark.parametrize(("stored", "scales", "dtype"), [*FORMS, (FP32, None, FP32)], ids=str)
def test_the_pieces_are_cp_attention(stored: torch.dtype, scales: str | None, dtype: torch.dtype) -> None:
    """write_kv converts as a call does, and attend reads what it has written."""
    case = StoredCase(MIXED, cache="paged", page_size=3, stored=stored, scales=scales, dtype=dtype)
    plan = case.plan(1)
    meta, (whole, pieces) = plan.metadata(0), (case.pages(plan, 0) for _ in range(2))
    expected = cpattn.cp_attention(case.q, case.k, case.v, meta, kv_cache=whole.cache)
    slots = cpattn.slot_mapping(meta, pieces.cache.page_table, 3)
    cpattn.write_kv(case.k, case.v, pieces.cache, slots)
    pieces.check_written()
    assert torch.equal(cpattn.attend(case.q, pieces.cache, meta), expected)


def test_rows_that_an_engine_has_converted_travel_and_are_written_as_they_are() -> None:
    case = StoredCase([(0, 9), (0, 4)], cache="paged", page_size=4, scales="head", dtype=BF16, head_dim=6)
    plan = case.plan(2)

    def program(c: cpattn.Communicator) -> None:
        meta, pages = plan.metadata(c.rank), case.pages(plan, c.rank)
        assert case.new.v is not None
        k, v = (cpattn.shard(x.view(torch.uint8), meta).view(E4M3) for x in (case.new.k, case.new.v))
        k, v = cpattn.gather_kv(k, v, meta, group=c)  # type: ignore[assignment]
        cpattn.write_kv(k, v, pages.cache, cpattn.slot_mapping(meta, pages.cache.page_table, 4))
        pages.check_written()

    run_loopback(program, 2)


def test_each_layer_has_scales_of_its_own() -> None:
    case = StoredCase([(0, 12)], cache="paged", page_size=4, scales="head", dtype=BF16)
    plan = case.plan(1)
    meta, cache = plan.metadata(0), case.pages(plan, 0).cache
    call = cpattn.prepare(case.q, case.k, case.v, meta, kv_cache=cache)
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    # Powers of two change no rounding.
    other = replace(
        cache, k_pages=cache.k_pages.clone(), v_pages=cache.k_pages.clone(), k_scale=2 * cache.k_scale, v_scale=4 * cache.v_scale
    )
    out, same = (call(case.q, case.k, case.v, kv_cache=given) for given in (cache, other))
    assert isinstance(out, Tensor)
    assert isinstance(same, Tensor)
    assert torch.equal(same, out)
    assert not torch.equal(other.k_pages.view(torch.uint8), cache.k_pages.view(torch.uint8))
    with pytest.raises(cpattn.TensorMismatchError, match=r"kv_cache.k_scale is .* but this call was prepared with"):
        call(case.q, case.k, case.v, kv_cache=replace(cache, k_scale=torch.ones(()), v_scale=torch.ones(())))


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(("stored", "scales"), [(E4M3, "head"), (E5M2, "one"), (BF16, None)])
def test_what_overflows_is_refused_on_a_cpu(stored: torch.dtype, scales: str | None, check: bool) -> None:
    """By the rank that has it. The others get NaN, or, in a checked call, hear of it; and all go on."""
    case = StoredCase([(0, 24)], cache="paged", page_size=4, stored=stored, scales=scales, dtype=FP32)
    plan = case.plan(2)
    most = torch.finfo(stored).max
    top = most * (1.0 if case.of_heads is None else float(case.of_heads[0].reshape(-1)[-1]))

    def program(c: cpattn.Communicator) -> tuple[str, bool]:
        meta, pages = plan.metadata(c.rank), case.pages(plan, c.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        if c.rank == 1:
            # The largest of fp32 overflows in bf16.
            k[2, -1, 0] = -min(1.1 * top, torch.finfo(FP32).max)
        said, has_nan = "", False
        try:
            has_nan = bool(cpattn.cp_attention(q, k, v, meta, kv_cache=pages.cache, group=c, check=check).isnan().any())
        except cpattn.CPError as error:
            said = str(error)
        # That is rounded to the largest, and the group works. (With the largest of bf16 scores would be infinite.)
        k[2, -1, 0] = -1.01 * top if stored != BF16 else 1
        again = cpattn.cp_attention(q, k, v, meta, kv_cache=case.pages(plan, c.rank).cache, group=c)
        assert again.isfinite().all()
        return said, has_nan

    (other, has_nan), (own, _) = run_loopback(program, 2)
    assert f"head 1, but the pages are {stored}, whose largest number is {most:g}" in own
    fix = "; pass pages in torch.float32, as k is" if scales is None else " times k_scale; k_scale must be at least the largest |k| / "
    assert f"{most:g}{fix}" in own
    assert ("rank 1" in other) if check else (has_nan and not other)


def cache_like(**changes: Any) -> cpattn.PagedKV:
    pages = torch.zeros(4, 8, 2, 16).to(E4M3)
    fields: dict[str, Any] = {"k_pages": pages, "v_pages": pages.clone(), "k_scale": torch.ones(2), "v_scale": torch.ones(2)}
    return cpattn.PagedKV(**(fields | {"page_table": torch.zeros(1, 1, dtype=torch.int32)} | changes))


OF_TOKENS = {"k_scale": torch.ones(4, 8, 2), "v_scale": torch.ones(4, 8, 2)}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": ({"v_scale": None}, "v_pages is torch.float8_e4m3fn, but kv_cache.v_scale is None; pass v_scale="),
    "a number": ({"k_scale": 0.5}, "k_scale is a float; pass an fp32 tensor on the pages' device: one number"),
    "of query heads": ({"k_scale": torch.ones(4)}, "k_scale has shape (4,); pass one number [] or [1], one a KV head [2], or one a token"),
    "of pages alone": ({"k_scale": torch.ones(4, 1, 1)}, "k_scale has shape (4, 1, 1); pass one number"),
    "in bf16": ({"v_scale": torch.ones(2).bfloat16()}, "v_scale is torch.bfloat16 on cpu; it must be torch.float32 on"),
    "elsewhere": ({"v_scale": torch.ones(2, device="meta")}, "v_scale is torch.float32 on meta; it must be"),
    "of two kinds": ({"k_scale": torch.ones(4, 8, 2)}, "either both are of tokens and heads, or neither"),
    "without need": ({name: torch.zeros(4, 8, 2, 16).half() for name in ("k_pages", "v_pages")}, "scales are for pages in fp8: leave"),
    "of v in k": ({"v_pages": None}, "v_scale is given, but kv_cache.v_pages is None"),
    "fnuz": ({name: torch.zeros(4, 8, 2, 16).to(torch.float8_e4m3fnuz) for name in ("k_pages", "v_pages")}, "of fp8 pages may be in"),
    "expanded": (OF_TOKENS | {"k_scale": torch.ones(()).expand(4, 8, 2)}, "has a scale for each token and head, which calls write, but"),
    "negative": ({"k_scale": torch.tensor([1.0, -1.0])}, "k_scale is [1.0, -1.0]; a scale is a positive, finite number"),
    "wider pages": ({name: torch.zeros(4, 8, 2, 16).double() for name in ("k_pages", "v_pages")} | {"k_scale": None, "v_scale": None},
                    "k_pages is torch.float64, but k is torch.bfloat16; pages are in k's dtype, in bf16 or fp16, or in fp8 with scales"),
}  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("call", ["decode", "nothing new", "attend", "prepared"])
def test_scales_of_heads_are_looked_at_wherever_they_are_read(call: str, scale: float) -> None:
    """They are alike on all ranks, so that also those without a new token refuse them, and nothing is sent."""

    def program(group: cpattn.Transport) -> int:
        meta = cpattn.plan([(5, 0 if call == "nothing new" else 1)], 2, owner=cpattn.Striped(2)).metadata(group.rank)
        cache = cache_like()
        q, k = torch.zeros(meta.rows, 4, 16, dtype=BF16), torch.zeros(meta.rows, 2, 16, dtype=BF16)
        calls: dict[str, Any] = {
            "attend": partial(cpattn.attend, q, cache, meta, group=group),
            "prepared": partial(cpattn.prepare(q, k, k, meta, group=group, kv_cache=cache), q, k, k, kv_cache=cache),
        }
        assert cache.v_scale is not None
        cache.v_scale[1] = scale
        with pytest.raises(cpattn.TensorMismatchError, match=r"v_scale is \[1.0, .*\]; a scale is a positive, .*: pass what values"):
            calls.get(call, partial(cpattn.cp_attention, q, k, k, meta, group=group, kv_cache=cache))()
        return group.bytes_sent

    assert run_loopback(program, 2, timeout=20) == [0, 0]


def test_scales_of_heads_are_looked_at_where_rows_are_written_as_they_are() -> None:
    rows, cache = torch.zeros(2, 2, 16).to(E4M3), cache_like(k_scale=torch.tensor(0.0))
    with pytest.raises(cpattn.TensorMismatchError, match=r"kv_cache.k_scale is 0.0; a scale is a positive, finite number"):
        cpattn.write_kv(rows, rows, cache, torch.tensor([0, 1]))


def test_what_is_infinite_is_no_matter_of_scales() -> None:
    """Nor of what pages could hold: those in half precision have such numbers."""
    x = torch.full((6, 2, 16), torch.inf, dtype=BF16)
    half = torch.zeros(2, 4, 2, 16, dtype=torch.float16)
    in_half = cpattn.PagedKV(half, half.clone(), torch.tensor([[0, 1]], dtype=torch.int32))
    for cache, most in ((cache_like(), 448), (cache_like(**OF_TOKENS), 448), (in_half, 65504)):
        with pytest.raises(cpattn.TensorMismatchError, match=rf"k goes to inf in head 0, .* is {most}; none of k may be infinite"):
            cpattn.cp_attention(x, x, x, cpattn.build_metadata([(0, 6)], 1, 0), kv_cache=cache)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    changes, message = MISTAKES[name]
    q, k = torch.zeros(6, 4, 16, dtype=BF16), torch.zeros(6, 2, 16, dtype=BF16)
    v, v_dim = (None, 8) if "v_pages" in changes and changes["v_pages"] is None else (k, None)
    with pytest.raises(cpattn.CPError) as raised:
        cpattn.cp_attention(q, k, v, cpattn.build_metadata([(0, 6)], 1, 0), v_dim=v_dim, kv_cache=cache_like(**changes))
    assert message in str(raised.value)


def test_written_rows_need_what_the_pages_need() -> None:
    rows, slots = torch.zeros(3, 2, 16), torch.tensor([0, 1, -1])
    with pytest.raises(cpattn.TensorMismatchError, match="in which the pages have a scale for each token and head; pass rows in bf16"):
        cpattn.write_kv(rows.to(E4M3), rows.to(E4M3), cache_like(**OF_TOKENS), slots)
    with pytest.raises(cpattn.TensorMismatchError, match=r"k is torch.float8_e5m2, the pages are torch.float8_e4m3fn; pass rows in"):
        cpattn.write_kv(rows.to(E5M2), rows.to(E5M2), cache_like(), slots)
    large = rows + 500
    with pytest.raises(cpattn.TensorMismatchError, match=r"k goes to 500 in head 0, but the pages are torch.float8_e4m3fn"):
        cpattn.write_kv(large, rows, cache_like(), slots)
    # Rows that are skipped do not count.
    large[:2] = 1
    cpattn.write_kv(large, rows, cache_like(), slots)


def test_explain_says_who_reads_what() -> None:
    q, k = torch.zeros(6, 4, 16, dtype=BF16), torch.zeros(6, 2, 16, dtype=BF16)
    explained = cpattn.explain(q, k, k, cpattn.build_metadata([(0, 6)], 1, 0), kv_cache=cache_like())
    assert explained["cpu"] == "chosen, reads a packed copy of the pages of 8 in bfloat16"
    assert explained["reference"] == "able, reads the pages in float8_e4m3fn"
    over_two = cpattn.explain(q[:3], k[:3], k[:3], cpattn.build_metadata([(0, 6)], 2, 0), kv_cache=cache_like(**OF_TOKENS))
    assert "a rank receives all of them, 240 B in float8_e4m3fn" in over_two["keys"]


@pytest.mark.parametrize(("strategy", "cache"), [("all_gather", "paged"), ("ring", "sharded")])
@pytest.mark.parametrize("scales", ["head", "token"])
def test_a_callers_kernel_is_given_pages_and_scales(strategy: str, cache: str, scales: str) -> None:
    reference, given = cpattn.BACKENDS["reference"], set()

    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, **named: Any) -> tuple[Tensor, Tensor]:
        k_scale, v_scale = named["k_scale"], named["v_scale"]
        given.add((k.dtype, k.ndim, tuple(k_scale.shape) == ((2,) if scales == "head" else tuple(k.shape[:-1]))))
        options = AttentionOptions(named["scale"], named["window"], named["softcap"], named["sinks"])
        return reference.attend(q, cpattn.Keys(k, v, rows.page_table, k_scale, v_scale), rows, options, named["out_dtype"])

    case = StoredCase(MIXED, cache=cache, page_size=4, scales=scales, dtype=BF16)
    backend = cpattn.custom_backend(kernel, page_sizes=lambda page_size: True, reads_stored=True)
    plan = case.plan(2)
    outputs = run_loopback(lambda c: case.on_rank(plan, c.rank, c, strategy, backend, check=True), 2)
    case.dequantised().check(outputs, plan, strategy, "reference")
    assert given == {(E4M3, 4 if cache == "paged" else 3, True)}


def test_a_strategy_that_does_not_know_them_is_refused() -> None:
    ring = find_strategy("ring")
    q, k = torch.zeros(6, 4, 16, dtype=BF16), torch.zeros(6, 2, 16, dtype=BF16)
    mine = replace(ring, name="mine", stored=False)
    with pytest.raises(cpattn.UnsupportedError, match=r"strategy='mine' .*it takes pages in q's dtype alone, torch.bfloat16, not"):
        cpattn.cp_attention(q, k, k, cpattn.build_metadata([(0, 6)], 1, 0), kv_cache=cache_like(), strategy=mine)


@pytest.mark.parametrize("strategy", ["ulysses", cpattn.hybrid(2, "all_gather")], ids=str)
def test_ranks_that_divide_heads_have_no_scales_of_others(strategy: StrategyChoice) -> None:
    q, k = torch.zeros(4, 4, 16, dtype=BF16), torch.zeros(4, 2, 16, dtype=BF16)
    group = cpattn.LoopbackGroup(2).transport(0)
    meta = cpattn.build_metadata([(0, 8)], 2, 0)
    with pytest.raises(
        cpattn.UnsupportedError,
        match=r"new heads travel in q's dtype, since who sends one has no scales of the pages that it goes to; pass pages in "
        r"torch.bfloat16, not torch.float8_e4m3fn; 'all_gather', 'ring' could",
    ):
        cpattn.cp_attention(q, k, k, meta, group=group, kv_cache=cache_like(), strategy=strategy)
    assert group.bytes_sent == 0


def test_problems_that_no_call_could_have() -> None:
    plan = cpattn.plan([(0, 64)], 2)
    problem = Problem(torch.device("cuda"), BF16, plan.rows, 8, 2, 128, 128, cache="paged", page_size=64, kv_dtype=E4M3, scales="token")
    half = replace(problem, kv_dtype=None, scales=None)
    assert problem.key_bytes <= 0.52 * half.key_bytes
    assert cpattn.plan([(0, 64)], 2, partition="auto", problem=problem).num_tokens == 64
    for changes, message in (
        ({"scales": None}, "problem.scales=None for keys in torch.float8_e4m3fn; it must be 'head' or 'token'"),
        ({"kv_dtype": None}, "problem.scales='token' for keys in torch.bfloat16; it must be None"),
        ({"kv_dtype": FP32}, "problem.kv_dtype=torch.float32 with cache='paged'; it is for pages"),
        ({"cache": None, "page_size": None}, "with cache=None; it is for pages"),
    ):
        with pytest.raises(cpattn.OptionError) as raised:
            cpattn.plan([(0, 64)], 2, partition="auto", problem=replace(problem, **changes))
        assert message in str(raised.value)


def test_a_bucket_holds_any_batch() -> None:
    bucket = cpattn.Bucket(max_requests=4, max_rows=32, max_chunks=8, max_seqlen=64)
    meta: cpattn.CPMetadata | None = None
    for seed, batch in enumerate([[(0, 21), (7, 3)], [(30, 1), (0, 1), (5, 9)], []]):
        case = StoredCase(batch, cache="paged", page_size=8, dtype=BF16, seed=seed)
        plan = case.plan(1)
        meta = plan.metadata(0, bucket=bucket) if meta is None else meta.copy_(plan) or meta
        output = case.on_rank(plan, 0, None, "all_gather", "reference", meta=meta)
        case.dequantised().check([output], plan, "all_gather", "reference")


def test_a_backend_over_stored_keys_merges_as_before() -> None:
    """A backend's own way of merging is given the copy as well."""
    given = []

    def accumulate(q: Tensor, keys: Any, spans: Any, options: Any, acc: Tensor, lse: Tensor) -> None:
        given.append(keys.k.dtype)

    backend = over_stored_keys(replace(cpattn.BACKENDS["cpu"], accumulate=accumulate))
    keys = cpattn.Keys(torch.zeros(3, 1, 8).to(E5M2), torch.zeros(3, 1, 8).to(E5M2), None, torch.ones(1), torch.ones(1))
    assert backend.accumulate is not None
    backend.accumulate(torch.zeros(3, 2, 8), keys, None, None, None, None)  # type: ignore[arg-type]
    assert given == [FP32]


def test_one_tensor_for_both_scales_of_tokens_is_refused() -> None:
    """Those of V would be written over those of K."""
    pages = torch.zeros(2, 4, 4, 2, 16).to(torch.float8_e4m3fn)
    scale, x = torch.zeros(4, 4, 2), torch.randn(9, 2, 16)
    cache = cpattn.PagedKV(pages[0], pages[1], torch.tensor([[2, 0, 1]]), k_scale=scale, v_scale=scale)
    with pytest.raises(cpattn.PageTableError, match="k_scale and v_scale have elements in common"):
        cpattn.cp_attention(x, x, x, cpattn.build_metadata([(0, 9)], 1, 0), kv_cache=cache)


@pytest.mark.parametrize("cache", ["paged", "sharded"])
def test_check_compares_the_scales_of_heads(cache: str) -> None:
    """To the bit, on all ranks; one scale for all heads is that of each."""
    case = StoredCase(MIXED, cache=cache, page_size=4, scales="head", dtype=BF16)
    plan = case.plan(2)

    def program(c: cpattn.Communicator, scale_of_rank_1: Tensor) -> str:
        pages = case.pages(plan, c.rank).cache
        scale = scale_of_rank_1 if c.rank else torch.tensor(0.25)
        mine = cpattn.PagedKV(pages.k_pages, pages.v_pages, pages.page_table, k_scale=scale, v_scale=torch.ones(2))
        meta = plan.metadata(c.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        try:
            cpattn.cp_attention(q, k, v, meta, group=c, kv_cache=mine, strategy="ring", check=True)
        except cpattn.DisagreementError as disagreement:
            return str(disagreement)
        return ""

    assert run_loopback(partial(program, scale_of_rank_1=torch.tensor([0.25, 0.25])), 2) == ["", ""]
    nearly = torch.tensor([0.25, 0.25]).nextafter(torch.tensor([0.25, 1.0]))
    for message in run_loopback(partial(program, scale_of_rank_1=nearly), 2):
        for words in (
            "rank 0: ",
            "with scales of head, k_scale=0.25, v_scale=1",
            "rank 1: ",
            "k_scale=0.25 to 0.25000003 (those of all heads: ",
        ):
            assert words in message
