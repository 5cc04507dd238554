"""A prepared call gives what cp_attention gives, to whoever holds it, and says where it does not fit."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from torch import Tensor

import cpattn
from cpattn.testing import SoloCommunicator, run_loopback
from cpattn.transports.transport import living_transports

EXCHANGES = [
    ("all_gather", "packed"), ("all_gather", "paged"), ("ring", "packed"), ("ring", "sharded"), ("pass_q", "sharded"),
    ("pass_q_ring", "packed"),
]  # fmt: skip


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)
@pytest.mark.parametrize("cp_size", [1, 3])
def test_it_gives_what_cp_attention_gives(strategy: str, cache: str, cp_size: int, sinks: bool) -> None:
    case = AttentionCase([(5, 12), (0, 1), (9, 4)], cache=cache, sinks=sinks)
    plan = case.plan(cp_size)

    def program(group: cpattn.Communicator) -> None:
        meta = plan.metadata(group.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        kv_cache = case.prefix if cache == "packed" else case.pages(plan, group.rank).cache
        options: dict[str, Any] = {"strategy": strategy, "backend": "reference", "kv_cache": kv_cache, "return_lse": True}
        layer_sinks: Any = case.options["sinks"]
        held = cpattn.prepare(q, k, v, meta, group=group, **options, sinks=layer_sinks)
        for layer in range(3):
            given = q + layer, k - layer, v * (layer + 1)
            more = None if layer_sinks is None else layer_sinks - layer
            expected = cpattn.cp_attention(*given, meta, group=group, **options, sinks=more)
            out, lse = held(*given, kv_cache, more)
            assert torch.equal(out, expected[0])
            assert torch.equal(lse, expected[1])

    run_loopback(program, cp_size)


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_out_is_written_and_returned(strategy: str) -> None:
    case = AttentionCase([(5, 12), (0, 1)])
    plan = case.plan(2, pad_to=8)

    def program(group: cpattn.Communicator) -> None:
        meta = plan.metadata(group.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        expected = cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=case.prefix, strategy=strategy)
        wide = torch.full((meta.rows, case.heads, case.head_dim + 8), torch.nan, dtype=q.dtype)
        out = wide[..., : case.head_dim]
        got = cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=case.prefix, strategy=strategy, out=out)
        assert got is out
        assert torch.equal(out, expected)
        assert wide[..., case.head_dim :].isnan().all()
        # Also where it is the queries' own memory.
        assert torch.equal(cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=case.prefix, strategy=strategy, out=q), expected)

    run_loopback(program, 2)


def test_attend_writes_to_out_too() -> None:
    case = AttentionCase([(5, 4)], cache="paged")
    plan = case.plan(1)
    meta, cache = plan.metadata(0), case.pages(plan, 0).cache
    cpattn.write_kv(case.k, case.v, cache, cpattn.slot_mapping(meta, cache.page_table, cache.page_size))
    out = torch.empty_like(case.q)
    assert cpattn.attend(case.q, cache, meta, out=out) is out
    assert torch.equal(out, cpattn.attend(case.q, cache, meta))


X, META = torch.randn(6, 2, 8), cpattn.build_metadata([(0, 6)], 1, 0)
WRONG_OUT: dict[str, tuple[Any, str]] = {
    "no tensor": ([], r"out is a list; pass a tensor \(6, 2, 8\)"),
    "shape": (torch.empty(6, 2, 4), r"out is \(6, 2, 4\) torch.float32 on cpu; the result is \(6, 2, 8\) torch.float32 on cpu"),
    "dtype": (torch.empty(6, 2, 8).half(), "out is .*float16"),
    "device": (torch.empty(6, 2, 8, device="meta"), "out is .* on meta"),
    "expanded": (torch.empty(1, 2, 8).expand(6, 2, 8), "several results lie in the same memory"),
}


@pytest.mark.parametrize(("out", "message"), list(WRONG_OUT.values()), ids=list(WRONG_OUT))
def test_memory_that_the_result_does_not_fit_is_refused(out: Any, message: str) -> None:
    with pytest.raises(cpattn.TensorMismatchError, match=message):
        cpattn.cp_attention(X, X, X, META, out=out)


def test_out_of_inference_mode_is_refused_outside_of_it() -> None:
    with torch.inference_mode():
        out = torch.empty_like(X)
        assert cpattn.cp_attention(X, X, X, META, out=out) is out
    with pytest.raises(cpattn.TensorMismatchError, match=r"out was made under torch.inference_mode\(\)"):
        cpattn.cp_attention(X, X, X, META, out=out)


def test_out_that_needs_a_gradient_is_refused() -> None:
    with pytest.raises(cpattn.UnsupportedError, match="out requires a gradient"):
        cpattn.cp_attention(X, X, X, META, out=torch.empty(6, 2, 8, requires_grad=True))


OTHERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "q": ((X.half(), X, X), r"q is \(6, 2, 8\) torch.float16 on cpu .*, but this call was prepared with \(6, 2, 8\) torch.float32"),
    "k strides": ((X, torch.empty(6, 2, 16)[..., :8], X), r"k is .* with strides \(32, 16, 1\), but .* strides \(16, 8, 1\)"),
    "no v": ((X, X, None), r"v is None, but this call was prepared with \(6, 2, 8\)"),
    "cache": ((X, X, X, cpattn.PackedKV(X[:0], X[:0])), "kv_cache is a PackedKV, but this call was prepared with None"),
    "sinks": ((X, X, X, None, torch.zeros(2)), "sinks is .*, but this call was prepared with None"),
    "out": ((X, X, X, None, None, torch.empty_like(X)), "out is .*, but this call was prepared with None"),
    "no tensor": (([], X, X), "the tensors are not of the kinds that this call was prepared with"),
}


@pytest.mark.parametrize(("given", "message"), list(OTHERS.values()), ids=list(OTHERS))
def test_tensors_of_another_layout_are_refused(given: tuple[Any, ...], message: str) -> None:
    held = cpattn.prepare(X, X, X, META)
    with pytest.raises(cpattn.TensorMismatchError, match=f"{message}.*; prepare a call for such tensors with cpattn.prepare"):
        held(*given)
    assert held(X, X, X).shape == X.shape  # type: ignore[union-attr]


def test_a_gradient_is_refused_by_both() -> None:
    q = torch.randn(6, 2, 8, requires_grad=True)
    with pytest.raises(cpattn.UnsupportedError, match="q requires a gradient"):
        cpattn.prepare(q, X, X, META)
    held = cpattn.prepare(X, X, X, META)
    with pytest.raises(cpattn.UnsupportedError, match="q requires a gradient"):
        held(q, X, X)
    with torch.no_grad():
        held(q, X, X)


def test_what_cp_attention_refuses_it_refuses() -> None:
    with pytest.raises(cpattn.OptionError, match="window=0"):
        cpattn.prepare(X, X, X, META, window=0)
    with pytest.raises(cpattn.GroupError, match="the group has 2 ranks"):
        cpattn.prepare(X, X, X, META, group=SoloCommunicator(0, 2))
    with pytest.raises(cpattn.OptionError, match="causal"):
        cpattn.prepare(X, X, X, META, causal=True)


def test_check_compares_the_ranks_once() -> None:
    plan = cpattn.plan([(0, 8)], 2)

    def program(group: cpattn.Communicator) -> None:
        meta, x = plan.metadata(group.rank), torch.randn(4, 1, 8)
        with pytest.raises(cpattn.DisagreementError, match="arguments"):
            cpattn.prepare(x, x, x, meta, group=group, check=True, window=group.rank + 1)
        held = cpattn.prepare(x, x, x, meta, group=group, check=True)
        held(x, x, x)

    run_loopback(program, 2)


def test_over_a_bucket_it_serves_the_batches_that_come_later() -> None:
    bucket = cpattn.Bucket(max_requests=4, max_rows=16, max_chunks=16)
    meta = cpattn.build_metadata([(0, 10)], 1, 0, bucket=bucket)
    x = torch.randn(16, 2, 8)
    held = cpattn.prepare(x, x, x, meta)
    assert "whatever batch" in repr(held)
    for batch in ([(0, 3), (0, 13)], [(0, 1)], [(0, 16)]):
        meta.copy_(cpattn.plan(batch, 1))
        out = held(x, x, x)
        assert isinstance(out, Tensor)
        assert torch.equal(out, cpattn.cp_attention(x, x, x, cpattn.build_metadata(batch, 1, 0, bucket=bucket)))


def test_released_memory_is_made_anew() -> None:
    plan = cpattn.plan([(0, 24)], 2)

    def program(group: cpattn.Communicator) -> None:
        meta, x = plan.metadata(group.rank), torch.randn(12, 2, 8)
        held = cpattn.prepare(x, x, x, meta, group=group, strategy="ring")
        first = held(x, x, x)
        blocks = [weakref.ref(block) for block in group.arena.blocks()]
        assert blocks
        cpattn.release(group)
        assert not any(block() is not None for block in blocks)
        # A larger call of another kind takes the memory that this one had.
        wide = torch.randn(12, 8, 64)
        cpattn.cp_attention(wide, wide, wide, meta, group=group, strategy="ring")
        assert torch.equal(held(x, x, x), first)  # type: ignore[arg-type]

    run_loopback(program, 2)


def test_neither_metadata_nor_memory_outlive_their_holders() -> None:
    """What is remembered of a batch ends with its metadata, without waiting for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        group = SoloCommunicator(0, 2)
        meta = cpattn.build_metadata([(0, 12)], 2, 0)
        x = torch.randn(6, 2, 8)
        cpattn.cp_attention(x, x, x, meta, group=group)
        alive = weakref.ref(meta)
        del meta
        assert alive() is None
        meta = cpattn.build_metadata([(0, 12)], 2, 0)
        held = cpattn.prepare(x, x, x, meta, group=group)
        alive = weakref.ref(meta)
        del meta
        assert alive() is not None
        held(x, x, x)
        del held
        assert alive() is None
    finally:
        gc.enable()


def test_it_can_be_looked_at() -> None:
    held = cpattn.prepare(X, X, X, META, strategy="ring", backend="reference")
    assert (held.strategy.name, held.backend.name, held.problem.q_heads) == ("ring", "reference", 2)
    assert [hop.keys for hop in held.schedule] == [0]
    assert repr(held) == "PreparedCall(strategy='ring', backend='reference', 6 rows; valid for the batch of its metadata)"


BUCKET = cpattn.Bucket(max_requests=2, max_rows=8, max_chunks=4, max_seqlen=64)


@pytest.mark.parametrize("strategy", ["auto", "ring"])
def test_a_batch_that_comes_later_is_looked_at(strategy: str) -> None:
    meta, x = cpattn.build_metadata([(0, 8)], 1, 0, bucket=BUCKET), torch.randn(8, 2, 8)
    held = cpattn.prepare(x, x, x, meta, strategy=strategy)
    held(x, x, x)
    meta.copy_(cpattn.plan([(5, 8)], 1))
    with pytest.raises(cpattn.PrefixError, match="the batch has 5 prefix tokens, but kv_cache is None"):
        held(x, x, x)
    meta.copy_(cpattn.plan([(0, 3)], 1))
    held(x, x, x)


def test_a_table_that_a_later_batch_does_not_fit_is_refused() -> None:
    meta, x = cpattn.build_metadata([(0, 8)], 1, 0, bucket=BUCKET), torch.randn(8, 2, 8)
    cache = cpattn.PagedKV(torch.zeros(4, 4, 2, 8), torch.zeros(4, 4, 2, 8), torch.arange(4, dtype=torch.int32).view(2, 2))
    held = cpattn.prepare(x, x, x, meta, kv_cache=cache, backend="reference")
    held(x, x, x, cache)
    meta.copy_(cpattn.plan([(20, 8)], 1))
    with pytest.raises(cpattn.PageTableError, match="has 2 pages of 4 tokens for each request, 8 in all, but request 0 has 28"):
        held(x, x, x, cache)


def test_it_serves_the_steps_of_a_pool() -> None:
    """Each step's table says other things of its lines, which are looked at for every table."""
    pool = cpattn.KVPool(num_pages=8, page_size=4, num_layers=2, kv_heads=2, head_dim=8)
    pool.admit("a")
    meta = cpattn.build_metadata([(0, 6)], 1, 0, bucket=BUCKET)
    held = None
    for extend in (6, 1, 1):
        meta.copy_(pool.plan([("a", extend)]))
        table, x = pool.page_table(["a"], shape=(2, 4)), torch.randn(8, 2, 8)
        held = held or cpattn.prepare(x, x, x, meta, kv_cache=pool.layer(0, table), backend="reference")
        expected = cpattn.cp_attention(x, x, x, meta, kv_cache=pool.layer(1, table), backend="reference")
        assert torch.equal(held(x, x, x, pool.layer(0, table)), expected)  # type: ignore[arg-type]
    assert held is not None
    before = table
    meta.copy_(pool.plan([("a", 4)]))
    with pytest.raises(cpattn.PageTableError, match=r"line 0 of kv_cache\.page_table has pages for 8 tokens"):
        held(x, x, x, pool.layer(0, before))


def test_a_cache_that_needs_a_gradient_is_refused() -> None:
    meta = cpattn.build_metadata([(2, 6)], 1, 0)
    cached = torch.randn(2, 2, 8)
    held = cpattn.prepare(X, X, X, meta, kv_cache=cpattn.PackedKV(cached, cached))
    needing = cached.clone().requires_grad_()
    with pytest.raises(cpattn.UnsupportedError, match=r"kv_cache\.k requires a gradient"):
        held(X, X, X, cpattn.PackedKV(needing, cached))


def test_inference_mode_may_be_entered_after_it_was_prepared() -> None:
    held = cpattn.prepare(X, X, X, META)
    expected = held(X, X, X)
    with torch.inference_mode():
        assert torch.equal(held(X, X, X), expected)  # type: ignore[arg-type]
        pages = torch.zeros(2, 4, 2, 8)
    table = torch.arange(2, dtype=torch.int32)[None]
    outside = cpattn.PagedKV(torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8), table)
    held = cpattn.prepare(X, X, X, META, kv_cache=outside)
    with pytest.raises(cpattn.TensorMismatchError, match=r"kv_cache\.k is"):
        held(X, X, X, cpattn.PagedKV(pages, pages.clone(), table))


def test_calls_without_new_keys_are_attend_s_alone() -> None:
    cache = cpattn.PagedKV(torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8), torch.arange(2, dtype=torch.int32)[None])
    none: Any = None
    for make in (cpattn.cp_attention, cpattn.prepare):
        with pytest.raises(cpattn.TensorMismatchError, match="k is a NoneType"):
            make(X, none, None, META, kv_cache=cache)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ((X, X), "kv_cache is a tuple, but this call was prepared with a PagedKV"),
        (cpattn.PackedKV(X[:0], X[:0]), "kv_cache is a PackedKV, but this call was prepared with a PagedKV"),
        (
            cpattn.PagedKV(torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8), torch.zeros(1, 3, dtype=torch.int32)),
            r"kv_cache.page_table is \(1, 3\)",
        ),
        (cpattn.PagedKV(torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 16)[..., :8], torch.zeros(1, 2, dtype=torch.int32)), "kv_cache.v is"),
    ],
    ids=["tuple", "packed", "table", "v"],
)
def test_of_a_cache_the_part_that_differs_is_named(cache: Any, message: str) -> None:
    held = cpattn.prepare(
        X, X, X, META, kv_cache=cpattn.PagedKV(torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8), torch.arange(2, dtype=torch.int32)[None])
    )
    with pytest.raises(cpattn.TensorMismatchError, match=message):
        held(X, X, X, cache)


def test_what_refers_to_metadata_does_not_keep_them() -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, *, meta: cpattn.CPMetadata, **options: Any) -> Any:
        out_dtype = options.pop("out_dtype")
        return cpattn.BACKENDS["reference"].run(q, k, v, rows, cpattn.AttentionOptions(**options), out_dtype)

    meta = cpattn.build_metadata([(0, 6)], 1, 0)
    cpattn.cp_attention(X, X, X, meta, backend=partial(kernel, meta=meta))
    alive = weakref.ref(meta)
    del meta
    gc.collect()
    assert alive() is None


def test_calls_within_calls_are_not_kept() -> None:
    inner, before = cpattn.build_metadata([(0, 6)], 1, 0), len(living_transports())

    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, **options: Any) -> Any:
        cpattn.cp_attention(X, X, X, inner, strategy="ring", backend="reference")
        out_dtype = options.pop("out_dtype")
        return cpattn.BACKENDS["reference"].run(q, k, v, rows, cpattn.AttentionOptions(**options), out_dtype)

    for _ in range(5):
        cpattn.cp_attention(X, X, X, META, backend=kernel)
    gc.collect()
    assert len(living_transports()) <= before + 1


def test_a_kernel_s_own_memory_is_not_merged_into() -> None:
    kept: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def attend(*arguments: Any, **more: Any) -> tuple[Tensor, Tensor]:
        out, lse = cpattn.BACKENDS["reference"].attend(*arguments, **more)
        mine = kept.setdefault(out.shape, (torch.empty_like(out), torch.empty_like(lse)))
        return mine[0].copy_(out), mine[1].copy_(lse)

    own = replace(cpattn.BACKENDS["reference"], name="own", attend=attend)
    meta, cached = cpattn.build_metadata([(9, 6)], 1, 0), torch.randn(9, 2, 8)
    options: dict[str, Any] = {"kv_cache": cpattn.PackedKV(cached, cached), "strategy": "ring"}
    torch.testing.assert_close(
        cpattn.cp_attention(X, X, X, meta, backend=own, **options), cpattn.cp_attention(X, X, X, meta, backend="reference", **options)
    )


def starts_one_too_many(held: Any, io: Any, attend: Any) -> None:
    cpattn.STRATEGIES["ring"].forward(held, io, attend)
    io.start()


def waits_for_none(held: Any, io: Any, attend: Any) -> None:
    for _ in held.transfers:
        io.start()


FORGETFUL: dict[str, tuple[Any, str]] = {
    "one start too many": (starts_one_too_many, "has started more transfers than it announced"),
    "no wait": (waits_for_none, "has not waited for all the transfers that it started"),
    "no start": (lambda held, io, attend: None, "has not started all the transfers that it announced"),
}


@pytest.mark.parametrize(("forward", "message"), list(FORGETFUL.values()), ids=list(FORGETFUL))
def test_a_strategy_that_miscounts_its_transfers_is_found_out(forward: Any, message: str) -> None:
    wrong = replace(cpattn.STRATEGIES["ring"], name="wrong", forward=forward)

    def program(group: cpattn.Transport) -> None:
        meta, x = cpattn.build_metadata([(0, 12)], 2, group.rank), torch.randn(6, 2, 8)
        with pytest.raises(AssertionError, match=message):
            cpattn.cp_attention(x, x, x, meta, group=group, strategy=wrong)
        cpattn.cp_attention(x, x, x, meta, group=group, strategy="ring")

    run_loopback(program, 2, timeout=5)


def test_a_strategy_that_attends_more_often_than_it_says_is_found_out() -> None:
    ring = cpattn.STRATEGIES["ring"]
    wrong = replace(ring, schedule=lambda problem, plan: ring.schedule(problem, plan)[:1])
    with pytest.raises(cpattn.CPError, match="has attended twice with the same queries"):
        cpattn.cp_attention(X, X, X, cpattn.build_metadata([(0, 12)], 2, 0), group=SoloCommunicator(0, 2), strategy=wrong)


def test_a_strategy_that_prepares_nothing_is_found_out() -> None:
    nothing: Any = lambda setup: None  # noqa: E731
    wrong = replace(cpattn.STRATEGIES["ring"], prepare=nothing)
    with pytest.raises(cpattn.CPError, match="strategy='ring' prepared a NoneType; return an object with transfers"):
        cpattn.cp_attention(X, X, X, META, strategy=wrong)
