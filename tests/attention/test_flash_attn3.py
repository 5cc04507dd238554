"""FlashAttention-3 over builds that differ, where there is no GPU: what each is asked for, and what is refused in words."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from devices.fa3_builds import FORWARD_LACKS, FULL_LACKS, SCHEMA, FakeBuild, installed
from inputs.problems import CAUSAL, problem

import cpattn
from cpattn.attention import fa3_build, flash_attn3
from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.ragged_rows import RaggedRows
from cpattn.keys import Keys
from cpattn.problem import Problem
from cpattn.spans import Spans
from cpattn.testing import check_backend

SINKS = ",Tensor? sinks = None"
FORWARD = FakeBuild("fa3_fwd", FORWARD_LACKS)
FULL = FakeBuild("flash_attn", FULL_LACKS, more=SINKS)
NUMBER = count()


def installed_as(fake: FakeBuild, monkeypatch: pytest.MonkeyPatch, operator: bool) -> Any:
    fake = replace(fake, calls=[])
    return installed(monkeypatch, fake, f"cpattn_fa3_{next(NUMBER)}", SCHEMA.format(more=fake.more) if operator else None)


@pytest.fixture(
    params=[
        pytest.param((FORWARD, True), id="fa3-fwd"),
        pytest.param((FULL, True), id="tokenspeed-fa3"),
        pytest.param((FULL, False), id="tokenspeed-fa3 without an operator"),
        pytest.param((replace(FORWARD, has_config=False), True), id="fa3-fwd without a configuration"),
        pytest.param((replace(FULL, has_config=False), False), id="tokenspeed-fa3 without either"),
    ]
)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBuild]:
    monkeypatch.setattr("cpattn.attention.flash_varlen.capability", lambda device: (9, 0))
    fake, operator = request.param
    with installed_as(fake, monkeypatch, operator) as made:
        yield made


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBuild]:
    monkeypatch.setattr("cpattn.attention.flash_varlen.capability", lambda device: (9, 0))
    with installed_as(FULL, monkeypatch, operator=True) as made:
        yield made


def on_any_device() -> Backend:
    return replace(flash_attn3.BACKEND, device_types=None)


def asked(**changes: Any) -> Problem:
    plain: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 128, "v_head_dim": 128}
    return problem(**plain | changes)


def test_each_build_does_all_that_it_claims(build: FakeBuild) -> None:
    report = check_backend(on_any_device(), "cpu", dtype=torch.bfloat16)
    assert report.ok, str(report)
    verdicts = {row.name: row.verdict for row in report.rows}
    full = build.lacks == FULL_LACKS
    assert verdicts["window"] == ("holds" if full else "not claimed")
    assert verdicts["softcap"] == ("not claimed" if full else "holds")
    assert verdicts["pages of 256"] == ("holds" if full else "not claimed")
    assert verdicts["Dv is not D"] == ("not claimed" if full and build.has_config else "holds")
    assert {row.verdict for row in check_backend(on_any_device(), "cpu", dtype=torch.float16).rows} == (
        {"holds", "not claimed"} if full else {"not claimed"}
    )


@pytest.mark.parametrize(
    ("fake", "changes", "reason"),
    [
        (FORWARD, {"dtype": torch.float16}, r"this build of FlashAttention-3 \(fa3_fwd_interface\) has no fp16"),
        (FORWARD, {"window": True}, r"this build of FlashAttention-3 \(fa3_fwd_interface\) has no sliding window"),
        (FULL, {"softcap": True}, r"this build of FlashAttention-3 \(flash_attn_interface\) has no softcap"),
        (FULL, {"head_dim": 192}, r"has one head_dim for q, k and v \(128 is not 192\)"),
        (FULL, {"head_dim": 64, "v_head_dim": 512}, r"has one head_dim for q, k and v \(512 is not 64\)"),
        (FULL, {"v_head_dim": 64}, "of head dims that differ it takes up to 64 and 512, or 136 to 192 and 104 to 128, not 128 and 64"),
        (FULL, {"head_dim": 264, "v_head_dim": 264}, "it takes head dims up to 256, not 264"),
        (FULL, {"head_dim": 60, "v_head_dim": 60}, "it takes head dims that are multiples of 8, not 60 and 60"),
        (replace(FULL, lacks="HDIM256"), {"head_dim": 200, "v_head_dim": 200}, "has head dims up to 192, not 200"),
        (replace(FULL, lacks="VARLEN"), {}, "has no ragged batches"),
        (replace(FORWARD, has_config=False), {"window": True}, "no configuration, and a try failed: This flash .* local attention"),
    ],
)
def test_what_a_build_lacks_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, fake: FakeBuild, changes: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr("cpattn.attention.flash_varlen.capability", lambda device: (9, 0))
    with installed_as(fake, monkeypatch, operator=True), pytest.raises(AssertionError, match=reason):
        raise AssertionError(on_any_device().why_not(asked(**changes), CAUSAL))


def test_what_a_build_has_is_not_refused(full: FakeBuild) -> None:
    for changes in ({}, {"dtype": torch.float16}, {"window": True}, {"head_dim": 96, "v_head_dim": 96}, {"page_size": 64, "fixed": True}):
        assert on_any_device().why_not(asked(**changes), CAUSAL) is None


def test_it_is_for_hopper_alone(full: FakeBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpattn.attention.flash_varlen.capability", lambda device: (10, 0))
    assert on_any_device().why_not(asked(), CAUSAL) == "it is for compute capability 9, this GPU has 10"
    assert not full.calls


def test_features_are_tried_once_where_there_is_no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpattn.attention.flash_varlen.capability", lambda device: (9, 0))
    with installed_as(replace(FULL, has_config=False), monkeypatch, operator=True) as fake:
        for _ in range(3):
            assert on_any_device().why_not(asked(window=3), CAUSAL) is None
            assert on_any_device().reads_pages(asked(page_size=64))
        assert len(fake.calls) == 2
        monkeypatch.setattr(fa3_build, "is_capturing", lambda device: True)
        reason = on_any_device().why_not(asked(softcap=3.0), CAUSAL)
        assert reason is not None
        assert "cannot be tried while a CUDA graph captures; make the call once before" in reason
        assert len(fake.calls) == 2


def test_a_result_that_is_wrong_in_a_try_is_no_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpattn.attention.flash_varlen.capability", lambda device: (9, 0))

    class IgnoresWindows(FakeBuild):
        def forward(self, **given: Any) -> Any:
            return super().forward(**given | {"window_size_left": -1})

    with installed_as(IgnoresWindows("flash_attn", "", has_config=False), monkeypatch, operator=True):
        assert "a try failed: its result is wrong" in str(on_any_device().why_not(asked(window=3), CAUSAL))


def test_a_module_that_passes_on_another_builds_functions_is_that_build(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed_as(FORWARD, monkeypatch, operator=True):
        inner = fa3_build.NAMES[0]
        outer = ModuleType("flash_attn_interface_of_a_kit")
        outer.flash_attn_varlen_func = sys.modules[inner.interface].flash_attn_varlen_func  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, outer.__name__, outer)
        monkeypatch.setattr(fa3_build, "NAMES", (fa3_build.Names(outer.__name__, "no_such_config", "no_such_operators"), inner))
        fa3_build._find_build.cache_clear()
        found = fa3_build.find_build()
        assert found.is_operator
        assert not found.has("FP16")


def test_a_build_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "broken_fa3.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("cpattn.attention.flash_varlen.capability", lambda device: (9, 0))
    monkeypatch.setattr(fa3_build, "NAMES", (fa3_build.Names("broken_fa3", "broken_fa3_config", "broken_fa3"),))
    fa3_build._find_build.cache_clear()
    try:
        assert on_any_device().unavailable() is None
        reason = on_any_device().why_not(asked(), CAUSAL)
        assert reason is not None
        assert reason.startswith("broken_fa3 cannot be imported (OSError: libcudart.so.13: cannot open shared object file); pip install")
    finally:
        fa3_build._find_build.cache_clear()


def rows_of(*table: tuple[int, int], pages: int | None = None, dtype: torch.dtype = torch.int32) -> RaggedRows:
    q_len, k_len = np.array(table).T
    rows = RaggedRows.build(q_len, 0 * k_len, k_len, k_len - q_len + 1, request=np.arange(len(table)))
    if pages is None:
        return rows
    width = -(-int(k_len.max()) // pages)
    return rows.with_pages(torch.arange(len(table) * width, dtype=dtype).reshape(len(table), width), pages)


def attend(rows: RaggedRows, heads: int = 4, kv_heads: int = 2, **options: Any) -> None:
    q = torch.randn(rows.num_queries, heads, 64, dtype=torch.bfloat16)
    if rows.page_table is None:
        lead: tuple[int, ...] = (int((rows.host.k_start + rows.host.k_len).max()),)
    else:
        lead = (rows.page_table.numel(), -(-rows.max_seqlen_k // rows.page_table.shape[1]))
    k, v = (torch.randn(*lead, kv_heads, 64, dtype=torch.bfloat16) for _ in range(2))
    flash_attn3.flash_attn3_attention(q, Keys(k, v, rows.page_table), rows, AttentionOptions(0.1, **options), torch.bfloat16)


def test_pages_are_read_through_the_requests_own_lines(full: FakeBuild) -> None:
    rows = rows_of((3, 40), (1, 64), pages=16)
    attend(rows)
    (given,) = full.calls
    # No line is copied, and nothing is said of where keys begin: a tile never lies in one page.
    assert given["page_table"] is rows.page_table
    assert given["kv_batch_idx"] is rows.request
    assert given["leftpad_k"] is None
    assert given["pack_gqa"] is None
    attend(rows_of((3, 40), (1, 64), pages=16, dtype=torch.int64))
    assert full.calls[1]["page_table"].dtype == torch.int32


@pytest.mark.parametrize("page_size", [64, 80, 112, 128, 256])
def test_pages_of_whole_tiles_are_loaded_row_by_row(full: FakeBuild, page_size: int) -> None:
    rows = rows_of((100, 2 * page_size), (1, page_size), pages=page_size)
    attend(rows)
    assert full.calls[0]["leftpad_k"].tolist() == [0, 0]


def test_the_heads_of_short_chunks_are_packed(monkeypatch: pytest.MonkeyPatch, full: FakeBuild) -> None:
    for length, kv_heads in ((1, 2), (512, 2), (1, 4)):
        attend(rows_of((length, 512)), kv_heads=kv_heads)
    assert [given["pack_gqa"] for given in full.calls] == [True, False, None]
    with installed_as(replace(FULL, lacks="PACKGQA"), monkeypatch, operator=True) as fake:
        attend(rows_of((1, 512)))
        assert fake.calls[0]["pack_gqa"] is False


@pytest.mark.parametrize("operator", [True, False])
def test_a_result_is_written_to_its_place(monkeypatch: pytest.MonkeyPatch, operator: bool) -> None:
    """By the operator itself; what its functions return is copied."""
    q, k, v = (torch.randn(3, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    spans, options = Spans.build(np.array([3]), np.array([0]), np.array([3]), np.array([1])), AttentionOptions(0.125)
    out, lse = torch.zeros(3, 4, 64, dtype=torch.bfloat16), torch.zeros(3, 4)
    with installed_as(FULL, monkeypatch, operator) as fake:
        flash_attn3.flash_attn3_attend_into(q, Keys(k, v), spans, options, out[:, 1:3], lse[:, 1:3])
        expected = flash_attn3.flash_attn3_attention(q, Keys(k, v), spans, options, torch.bfloat16)
    assert (fake.calls[0].get("out") is not None) == operator
    assert torch.equal(out[:, 1:3], expected[0])
    assert torch.equal(lse[:, 1:3], expected[1])
    assert not out[:, [0, 3]].any()
    assert not lse[:, [0, 3]].any()


LONG = 2**17


@pytest.mark.parametrize(
    ("table", "splits"),
    [
        pytest.param([(1, LONG)], 17, id="one long row on 132 processors and 8 heads"),
        pytest.param([(1, 8192)] * 256, 1, id="tiles for all"),
        pytest.param([(1, LONG)] + [(1, 1024)] * 31, 14, id="one long row beside short ones"),
        pytest.param([(1, 2**15)] + [(1, 2**15 // 8)] * 120, 2, id="a row of a little more than its share"),
        pytest.param([(1, 2048)], 4, id="parts are not too short"),
        pytest.param([(4096, LONG)], 1, id="a chunk of a prefill"),
        pytest.param([(0, LONG), (1, 400)], 1, id="a row without queries"),
        pytest.param([(1, 0)], 1, id="no keys"),
    ],
)
def test_into_how_many_parts_rows_are_split(table: list[tuple[int, int]], splits: int) -> None:
    assert flash_attn3.num_splits(rows_of(*table), 32, 8, 128, None, 132) == splits


def test_a_window_leaves_little_to_split_and_memory_limits_the_parts() -> None:
    assert flash_attn3.num_splits(rows_of((1, LONG)), 32, 8, 128, 1000, 132) == 1
    rows = rows_of((8192, LONG), (1, 64 * LONG))
    assert flash_attn3.num_splits(rows, 32, 1, 128, None, 10**6) == 1


def test_rows_are_not_split_where_the_build_cannot(monkeypatch: pytest.MonkeyPatch, full: FakeBuild) -> None:
    monkeypatch.setattr(flash_attn3, "multiprocessors", lambda device: 132)
    attend(rows_of((1, 4096)))
    assert full.calls[0]["num_splits"] == 8
    assert full.calls[0]["pack_gqa"] is None
    with installed_as(replace(FULL, lacks="SPLIT"), monkeypatch, operator=True) as fake:
        attend(rows_of((1, 4096)))
        assert fake.calls[0]["num_splits"] == 1


def test_what_it_says_of_itself(monkeypatch: pytest.MonkeyPatch, full: FakeBuild) -> None:
    lacks = "BACKWARD, HDIM96, HDIMDIFF192, HDIMDIFF64, SM8x, SOFTCAP"
    assert on_any_device().describe() == f"flash_attn_interface, called by its operator; made without {lacks}"
    with installed_as(replace(FULL, has_config=False), monkeypatch, operator=False):
        assert on_any_device().describe() == (
            "flash_attn_interface, called by its Python functions, as its operator is not one that cpattn knows; "
            "it has no configuration, so features are tried"
        )
    monkeypatch.setattr(fa3_build, "NAMES", (fa3_build.Names("no_such_fa3", "", ""),))
    assert on_any_device().describe() is None


def fp8_call(kv_heads: int = 2, dim: int = 64) -> tuple[torch.Tensor, cpattn.PagedKV, cpattn.CPMetadata]:
    """Queries and pages of 16 in e4m3, the latter with a scale a head."""
    meta = cpattn.build_metadata([(37, 3), (0, 20), (15, 1)], 1, 0)
    shape = 12, 16, kv_heads, dim
    k, v = (torch.randn(shape).to(torch.float8_e4m3fn) for _ in range(2))
    k_scale, v_scale = torch.linspace(0.5, 0.7, kv_heads), torch.linspace(2.0, 1.0, kv_heads)
    q = torch.randn(meta.rows, 4, dim).to(torch.float8_e4m3fn)
    return q, cpattn.PagedKV(k, v, torch.randperm(12).int().view(3, 4), k_scale=k_scale, v_scale=v_scale), meta


@pytest.mark.parametrize(
    ("fake", "operator"), [(FULL, True), (FULL, False), (FORWARD, True)], ids=["operator", "functions", "a build that reads no pages"]
)
def test_queries_in_fp8(monkeypatch: pytest.MonkeyPatch, fake: FakeBuild, operator: bool) -> None:
    """Over pages as they are, with a descale for each sequence and head; the result is in bf16."""
    monkeypatch.setattr("cpattn.attention.flash_varlen.capability", lambda device: (9, 0))
    q, cache, meta = fp8_call()
    options: dict[str, Any] = {"window": 30 if fake is FULL else None, "sinks": torch.zeros(4)}
    for given in (cache, replace(cache, k_scale=torch.tensor(0.6), v_scale=torch.tensor([1.5]))):
        want, want_lse = cpattn.attend(q.bfloat16(), given, meta, backend="reference", return_lse=True, **options)
        into = torch.empty_like(want)
        with installed_as(fake, monkeypatch, operator) as build:
            out, lse = cpattn.attend(q, given, meta, backend=on_any_device(), check=True, out=into, return_lse=True, **options)
            with pytest.raises(cpattn.TensorMismatchError, match=r"the result is \(24, 4, 64\) torch.bfloat16 on cpu"):
                cpattn.attend(q, given, meta, backend=on_any_device(), out=into.float())
        (call,) = build.calls
        assert call["k"].dtype == call["q"].dtype == torch.float8_e4m3fn
        assert call["k"].ndim == (4 if fake is FULL else 3)
        assert out is into
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(lse, want_lse)


def test_queries_in_fp8_that_no_kernel_is_for(monkeypatch: pytest.MonkeyPatch, full: FakeBuild) -> None:
    q, cache, meta = fp8_call()
    assert cache.v_pages is not None
    half = cpattn.PagedKV(cache.k_pages.bfloat16(), cache.v_pages.bfloat16(), cache.page_table)
    of_tokens = replace(cache, k_scale=torch.ones(12, 16, 2), v_scale=torch.ones(12, 16, 2))
    rule = "queries in fp8 are float8_e4m3fn, over pages in that dtype with one scale or one a head, .* pass q in bf16 or fp16"
    mistakes: list[tuple[Any, Any, Any, str]] = [
        (q, cache, "auto", f"q is torch.float8_e4m3fn, and backend is 'auto'; {rule}"),
        (q, half, "flash_attn3", f"q is torch.float8_e4m3fn, kv_cache.k_pages torch.bfloat16 with no scales; {rule}"),
        (q, of_tokens, "flash_attn3", f"kv_cache.k_pages torch.float8_e4m3fn with scales of tokens; {rule}"),
        (q.to(torch.float8_e5m2), cache, "flash_attn3", f"q is torch.float8_e5m2, kv_cache.k_pages torch.float8_e4m3fn with .*; {rule}"),
        (q, cache, "reference", "backend='reference' cannot serve this call: it takes no queries in float8_e4m3fn; none could"),
    ]
    for queries, pages, backend, words in mistakes:
        with pytest.raises(cpattn.UnsupportedError, match=words):
            cpattn.attend(queries, pages, meta, backend=backend)
    sharded = cpattn.plan([(37, 3), (0, 20), (15, 1)], 2, owner=cpattn.Striped(1)).metadata(0)
    with pytest.raises(cpattn.UnsupportedError, match=f"the cache is sharded over ranks, so that queries travel; {rule}"):
        cpattn.attend(q[: sharded.rows], cache, sharded, group=cpattn.testing.SoloCommunicator(0, 2), backend="flash_attn3")
    k = torch.randn(24, 2, 64)
    with pytest.raises(cpattn.UnsupportedError, match=r"cpattn.attend takes queries in fp8 over those, with backend='flash_attn3'"):
        cpattn.cp_attention(q, k.to(q.dtype), k.to(q.dtype), meta, kv_cache=cache, backend="flash_attn3")
    in_fp8 = {"q_dtype": torch.float8_e4m3fn, "kv_dtype": torch.float8_e4m3fn, "scales": "head", "page_size": 16}
    assert on_any_device().why_not(asked(**in_fp8), CAUSAL) is None
    reason = on_any_device().why_not(asked(**in_fp8, head_dim=72, v_head_dim=72), CAUSAL)
    assert reason == "with queries in fp8 it takes one head_dim for q, k and v, a multiple of 16, not 72 and 72"
    for has_config, words in ((True, "has no fp8"), (False, "a try failed: This flash attention build does not support FP8")):
        with installed_as(replace(FULL, lacks="FP8", has_config=has_config), monkeypatch, operator=True):
            assert words in str(on_any_device().why_not(asked(**in_fp8), CAUSAL))
