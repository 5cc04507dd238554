"""Whichever build of FlashAttention-3 this machine has: what it claims holds, and what it lacks is refused in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from inputs.paged_caches import RankPages
from inputs.problems import CAUSAL, problem

import cpattn
from cpattn.attention import fa3_build, flash_attn3
from cpattn.problem import Problem
from cpattn.testing import check_backend

BACKEND = cpattn.BACKENDS["flash_attn3"]


@pytest.fixture(autouse=True)
def build() -> Iterator[fa3_build.Build]:
    reason = BACKEND.unavailable()
    if reason:
        pytest.skip(reason)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("it is for compute capability 9")
    fa3_build._find_build.cache_clear()
    yield fa3_build.find_build()
    fa3_build._find_build.cache_clear()
    fa3_build._tried.cache_clear()


def asked(**changes: Any) -> Problem:
    plain: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 128, "v_head_dim": 128}
    return problem(torch.device("cuda", 0), **plain | changes)


FEATURES: dict[str, tuple[dict[str, Any], str]] = {
    "FP16": ({"dtype": torch.float16}, "no fp16"),
    "LOCAL": ({"window": 3}, "no sliding window"),
    "SOFTCAP": ({"softcap": 3.0}, "no softcap"),
    "HDIMDIFF192": ({"head_dim": 192}, "one head_dim"),
    "HDIMDIFF64": ({"head_dim": 64, "v_head_dim": 256}, "one head_dim"),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_what_the_build_lacks_is_refused_in_words(build: fa3_build.Build, feature: str) -> None:
    changes, words = FEATURES[feature]
    reason = BACKEND.why_not(asked(**changes), CAUSAL)
    if build.has(feature):
        assert reason is None
    else:
        assert reason is not None
        assert words in reason


@pytest.mark.parametrize("feature", [*FEATURES, "PAGEDKV"])
def test_a_try_finds_what_the_configuration_says(build: fa3_build.Build, monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    """But for head dims that differ, for which a build may have larger kernels that do."""
    had = build.has(feature)
    monkeypatch.setattr(fa3_build, "_left_out", lambda config: None)
    fa3_build._find_build.cache_clear()
    if feature == "PAGEDKV":
        assert BACKEND.reads_pages(asked(page_size=64)) == had
    else:
        reason = BACKEND.why_not(asked(**FEATURES[feature][0]), CAUSAL)
        assert reason is None or not had
        assert reason is not None or had or "HDIMDIFF" in feature


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("by", ["operator", "functions"])
def test_both_ways_of_calling_it_pass(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, by: str) -> None:
    if by == "functions":
        monkeypatch.setattr(fa3_build, "_operator", lambda namespace: None)
        fa3_build._find_build.cache_clear()
    elif not fa3_build.find_build().is_operator:
        pytest.skip("its operator is not as cpattn knows it")
    if BACKEND.why_not(asked(dtype=dtype), CAUSAL):
        pytest.skip(str(BACKEND.why_not(asked(dtype=dtype), CAUSAL)))
    report = check_backend("flash_attn3", "cuda", dtype=dtype)
    # It loads whole tiles of keys, and multiplies those after a range by 0. Strategies give it no NaN there.
    assert {row.name for row in report.rows if not row.passes} <= {"NaN in keys of no range"}, str(report)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("page_size", [48, 64, 112, 128, 192, 256])
def test_nan_after_the_last_token_of_a_page_does_not_matter(head_dim: int, page_size: int) -> None:
    """Also where a tile lies in one page and there are enough queries for it to be loaded whole."""
    batch = [(0, 777), (640, 300), (0, 3), (997, 1), (page_size - 1, 2)]
    case = AttentionCase(
        batch, heads=8, kv_heads=2, head_dim=head_dim, dtype=torch.bfloat16, device="cuda", cache="paged", page_size=page_size
    )
    if not BACKEND.reads_pages(asked(page_size=page_size)):
        pytest.skip("this build reads no pages")
    for window in (None, 100):
        case.options["window"] = case.window = window
        vars(case).pop("expected", None)
        case.check_loopback(case.plan(2, pad_to=16), "all_gather", "flash_attn3")


DECODE = [(20000, 1), (37, 1), (0, 1), (5000, 3)]


@pytest.mark.parametrize(("strategy", "cache"), [("all_gather", "packed"), ("all_gather", "paged"), ("pass_q", "sharded")])
@pytest.mark.parametrize("page_size", [1, 64, 128])
def test_rows_that_are_split_are_exact(monkeypatch: pytest.MonkeyPatch, strategy: str, cache: str, page_size: int) -> None:
    splits: list[int] = []
    launch = flash_attn3.launch

    def recorded(*arguments: Any) -> Any:
        splits.append(arguments[4])
        return launch(*arguments)

    monkeypatch.setattr(flash_attn3, "launch", recorded)
    case = AttentionCase(
        DECODE, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda", cache=cache, page_size=page_size, sinks=True
    )
    for cp_size in (1, 3):
        case.check_loopback(case.plan(cp_size, pad_to=4), strategy, "flash_attn3", rounded_partials=strategy != "all_gather")
    if fa3_build.find_build().has("SPLIT"):
        assert max(splits) > 8


def test_a_graph_whose_rows_were_split_replays_other_batches() -> None:
    """As many parts as there were at the capture, at most; the kernel takes fewer for rows that are shorter."""
    if not BACKEND.reads_pages(asked(page_size=16)):
        pytest.skip("this build reads no pages")
    bucket = cpattn.Bucket(max_requests=8, max_rows=16, max_chunks=16, max_seqlen=20480)
    meta = cpattn.plan([(20000, 1)], 1).metadata(0, "cuda", bucket=bucket)
    batches = [[(20000, 1)], [(37, 1), (15000, 1), (0, 4)], [], [(9, 8), (8, 8)], DECODE]
    cases = [
        AttentionCase(batch, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda", page_size=16) for batch in batches
    ]
    caches = [
        RankPages(cpattn.plan(case.batch, 1), 0, case.prefix_k, case.prefix_v, case.k, case.v, 16, 0, max_requests=8) for case in cases
    ]
    most = max(len(pages.cache.k_pages) for pages in caches)
    width = max(pages.cache.page_table.shape[1] for pages in caches)
    k_pages, v_pages = (torch.zeros(most, 16, 2, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    table = torch.zeros(8, width, dtype=torch.int32, device="cuda")
    q, k, v = (torch.zeros(16, heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (8, 2, 2))

    def fill(case: AttentionCase, pages: RankPages) -> None:
        for x, given in ((k_pages, pages.cache.k_pages), (v_pages, pages.cache.v_pages)):
            assert given is not None
            x.fill_(torch.nan)[: len(given)] = given
        table.zero_()[:, : pages.cache.page_table.shape[1]] = pages.cache.page_table
        meta.copy_(cpattn.plan(case.batch, 1))
        for x, given in ((q, case.q), (k, case.k), (v, case.v)):
            x.copy_(cpattn.shard(given, meta))

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        return cpattn.cp_attention(
            q, k, v, meta, kv_cache=cpattn.PagedKV(k_pages, v_pages, table), backend="flash_attn3", strategy="all_gather", return_lse=True
        )

    fill(cases[0], caches[0])
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend()
        attend()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend()
    for case, pages in zip(cases, caches, strict=True):
        fill(case, pages)
        graph.replay()
        tokens = len(case.q)
        case.check([(out[:tokens], lse[:tokens])], cpattn.plan(case.batch, 1), "all_gather", "flash_attn3")
        assert (out[tokens:] == 0).all()
        assert (lse[tokens:] == -torch.inf).all()
