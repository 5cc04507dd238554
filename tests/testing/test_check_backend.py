"""check_backend: kernels that are right pass, and each that is wrong is caught, in the line that is about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.ragged_rows import RaggedRows
from cpattn.attention.reference import reference_attention
from cpattn.keys import Keys
from cpattn.spans import Spans
from cpattn.testing import BackendReport, check_backend, oracle_attention
from cpattn.testing.judge import Trial, Truth, spans_attention, why_wrong
from cpattn.testing.scenarios import SCENARIOS, Scenario, make_trial

REFERENCE = cpattn.BACKENDS["reference"]
CPU = torch.device("cpu")
NAMES = [scenario.name for scenario in SCENARIOS]


@pytest.fixture(scope="module", autouse=True)
def _truths_are_kept() -> Iterator[None]:
    """What is right is found query by query, which takes most of the time of a check, and is the same for every kernel."""
    known: dict[tuple[Scenario, torch.dtype], Truth] = {}
    asked: list[tuple[Scenario, torch.dtype]] = []

    def make(scenario: Scenario, device: torch.device, dtype: torch.dtype) -> Trial:
        asked[:] = [(scenario, dtype)]
        return make_trial(scenario, device, dtype)

    def truth(trial: Trial) -> Truth:
        if asked[0] not in known:
            known[asked[0]] = spans_attention(trial)
        return known[asked[0]]

    with pytest.MonkeyPatch.context() as patch:
        # The package has a function of the module's name.
        module = import_module("cpattn.testing.check_backend")
        patch.setattr(module, "make_trial", make)
        patch.setattr(module, "spans_attention", truth)
        yield


def verdicts(report: BackendReport) -> dict[str, str]:
    return {row.name: row.verdict for row in report.rows}


def failing(report: BackendReport) -> set[str]:
    return {row.name for row in report.rows if row.verdict == "fails"}


def kernel(
    q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, *, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return reference_attention(q, Keys(k, v, rows.page_table), rows, AttentionOptions(scale, window, softcap, sinks), out_dtype)


# What is right.


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_built_in_backends_pass(name: str, dtype: torch.dtype | None) -> None:
    report = check_backend(name, dtype=dtype)
    assert report.ok, str(report)
    assert report.dtype == (dtype or torch.float32)
    not_claimed = {row.name for row in report.rows if row.verdict == "not claimed"}
    if name == "reference":
        assert not_claimed == {"merges by itself (accumulate)"}
    else:
        assert {"window", "softcap", "sinks", "pages of 16"} <= not_claimed
        assert verdicts(report)["any diagonal"] == "holds"


def test_a_function_passes_with_what_it_says_of_itself() -> None:
    report = check_backend(kernel)
    assert report.ok, str(report)
    assert report.backend == "kernel"
    assert verdicts(report)["pages of 16"] == "not claimed"
    paged = check_backend(cpattn.custom_backend(kernel, page_sizes=lambda size: size % 16 == 0))
    not_claimed = {name for name, verdict in verdicts(paged).items() if verdict == "not claimed"}
    fp8 = {"fp8 keys, scales of heads", "fp8 in pages, scales of tokens"}
    assert not_claimed == {"pages of 1", "merges by itself (accumulate)"} | fp8
    assert check_backend(kernel, dtype=torch.float64).ok
    causal = check_backend(cpattn.custom_backend(kernel, alignments={"bottom_right"}))
    assert causal.ok
    assert verdicts(causal)["any diagonal"] == verdicts(causal)["merged halves are the whole"] == "not claimed"


def test_a_kernel_may_refuse_what_it_has_no_flag_for() -> None:
    def plain(*arguments: Any, window: int | None, softcap: float | None, sinks: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        if (window, softcap, sinks) != (None, None, None):
            raise NotImplementedError("no window, softcap or sinks")
        return kernel(*arguments, window=None, softcap=None, sinks=None, **options)

    report = check_backend(plain)
    assert report.ok, str(report)
    assert {name for name, verdict in verdicts(report).items() if verdict == "refuses"} == {
        "window", "window, any diagonal", "softcap", "sinks", "sinks beside empty key ranges", "window, softcap and sinks",
    }  # fmt: skip
    assert next(row.detail for row in report.rows if row.name == "softcap") == "NotImplementedError: no window, softcap or sinks"

    def always(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    assert not check_backend(always).ok


def test_a_backend_that_merges_by_itself() -> None:
    def accumulate(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, acc: Tensor, lse: Tensor) -> None:
        cpattn.attention.merge.merge_(acc, lse, *reference_attention(q, keys, spans, options, torch.float32))

    assert verdicts(check_backend(replace(REFERENCE, accumulate=accumulate)))["merges by itself (accumulate)"] == "holds"
    forgets = replace(REFERENCE, accumulate=lambda q, keys, spans, options, acc, lse: None)
    assert failing(check_backend(forgets)) == {"merges by itself (accumulate)"}


# What is wrong.


def changed(name: str, **changes: Any) -> Any:
    """A kernel that is right but for the options that it looks at."""

    def function(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return kernel(*arguments, **options | changes)

    function.__name__ = name
    return function


def base_two(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernel(*arguments, **options)
    return out, lse / math.log(2)


def heads_first(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernel(*arguments, **options)
    return out, lse.T


def rounded_lse(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernel(*arguments, **options)
    return out, lse.half().float()


def half_lse(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernel(*arguments, **options)
    return out, lse.half()


def one_query_left_out(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernel(*arguments, **options)
    out[-1] = 0
    return out, lse


def one_head_off(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernel(*arguments, **options)
    out[0, 1] *= 1.001
    return out, lse


def one_key_too_many(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, **options: Any) -> tuple[Tensor, Tensor]:
    h = rows.host
    later = RaggedRows.build(h.q_len, h.k_start, h.k_len, h.diagonal + 1, request=h.request)
    return kernel(q, k, v, later if rows.page_table is None else later.with_pages(rows.page_table, k.shape[1]), **options)


def rows_for_requests(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, **options: Any) -> tuple[Tensor, Tensor]:
    """Takes a row's number for that of its request."""
    if rows.page_table is None:
        return kernel(q, k, v, rows, **options)
    h = rows.host
    table = rows.page_table[[0, 1, 2, 0]].clamp(max=k.shape[0] - 1)
    wrong = RaggedRows.build(h.q_len, h.k_start, h.k_len, h.diagonal, request=range(len(rows)))  # type: ignore[arg-type]
    return kernel(q, k, v, wrong.with_pages(table, k.shape[1]), **options)


def hides_nan(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, **options: Any) -> tuple[Tensor, Tensor]:
    return kernel(q, k.nan_to_num(0), v.nan_to_num(0), rows, **options)


def reads_on(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, **options: Any) -> tuple[Tensor, Tensor]:
    """Multiplies values after the last range by 0."""
    out, lse = kernel(q, k, v, rows, **options)
    return out + 0 * v[-1].repeat_interleave(q.shape[1] // v.shape[-2], -2) if rows.page_table is None else out, lse


def own_scale(q: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Has no scale but the usual one."""
    return kernel(q, *arguments, **options | {"scale": q.shape[2] ** -0.5})


def with_table(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, table: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return kernel(q, k, v, rows.with_pages(table.clamp(0, len(k) - 1), k.shape[1]), **options)


def int32_table(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, **options: Any) -> tuple[Tensor, Tensor]:
    """Takes whatever lies at the table's address for int32."""
    if rows.page_table is None:
        return kernel(q, k, v, rows, **options)
    lines, width = rows.page_table.shape
    return with_table(q, k, v, rows, rows.page_table.view(torch.int32).as_strided((lines, width), rows.page_table.stride()), **options)


def as_if_whole(x: Tensor) -> Tensor:
    """What a kernel without strides reads at a tensor's address."""
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


def whole_table(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, **options: Any) -> tuple[Tensor, Tensor]:
    if rows.page_table is None:
        return kernel(q, k, v, rows, **options)
    return with_table(q, k, v, rows, as_if_whole(rows.page_table), **options)


def whole_pages(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, **options: Any) -> tuple[Tensor, Tensor]:
    if rows.page_table is None:
        return kernel(q, k, v, rows, **options)
    return kernel(q, as_if_whole(k), as_if_whole(v), rows, **options)


EVERYWHERE = set(NAMES)
WINDOWS = {"window", "window, any diagonal", "window, softcap and sinks"}
SINKS = {"sinks", "sinks beside empty key ranges", "window, softcap and sinks"}
PAGES = {name for name in NAMES if name.startswith("pages")}
FIRST = {NAMES[0]}


@pytest.mark.parametrize(
    ("function", "lines", "exactly", "detail"),
    [
        pytest.param(base_two, EVERYWHERE, True, "it fits as a log2: make the backend with custom_backend(..., lse_base=2)", id="base 2"),
        pytest.param(heads_first, EVERYWHERE, True, "make it with custom_backend(..., lse_heads_first=True)", id="heads first"),
        pytest.param(half_lse, EVERYWHERE, True, "returned lse in torch.float16 for q in torch.float32", id="half LSE"),
        pytest.param(rounded_lse, FIRST, False, "off by ", id="rounded LSE"),
        pytest.param(one_query_left_out, FIRST, False, " of query 36, head ", id="a query left out"),
        pytest.param(one_head_off, FIRST, False, " of query 0, head 1, is ", id="one head off"),
        pytest.param(one_key_too_many, FIRST | {"any diagonal"}, False, " is right (query ", id="off by one"),
        pytest.param(changed("no_window", window=None), WINDOWS, True, "LSE ", id="no window"),
        pytest.param(changed("no_softcap", softcap=None), {"softcap", "window, softcap and sinks"}, True, "LSE ", id="no softcap"),
        pytest.param(changed("no_sinks", sinks=None), SINKS, True, "LSE ", id="no sinks"),
        pytest.param(own_scale, {"scale is not D ** -0.5"}, True, "LSE ", id="no scale"),
        pytest.param(int32_table, {"pages, int64 table"}, True, "results are not finite: one has", id="int32 table"),
        pytest.param(whole_table, {"pages, sliced table"}, True, " is right (query ", id="contiguous table"),
        pytest.param(whole_pages, {"pages of one pool"}, True, "", id="contiguous pages"),
        pytest.param(rows_for_requests, PAGES, True, " is right (query ", id="rows for requests"),
        pytest.param(hides_nan, {"NaN in a key gives NaN"}, True, "of 128 results over keys with NaN are not NaN: one has", id="hides NaN"),
        pytest.param(reads_on, {"NaN in keys of no range"}, True, "100 of 100 results are not finite", id="reads on"),
    ],
)
def test_a_broken_kernel_is_caught(function: Any, lines: set[str], exactly: bool, detail: str) -> None:
    report = check_backend(cpattn.custom_backend(function, page_sizes=lambda size: True))
    assert not report.ok
    claimed = {row.name for row in report.rows if row.verdict != "not claimed"}
    caught = failing(report)
    assert caught == lines & claimed if exactly else lines <= caught, str(report)
    assert detail in next(row.detail for row in report.rows if row.name in lines)


def direct(run: Any) -> Backend:
    """A backend whose results nothing evens out, as that of a function's are."""

    def as_backend(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> Any:
        return run(q, spans.sees_keys(options.window), *reference_attention(q, keys, spans, options, out_dtype))

    return replace(REFERENCE, attend=as_backend)


EMPTY = {"empty key ranges among others", "spans of a bucket", "all keys in the past", "any diagonal", "sinks beside empty key ranges"}


def test_what_queries_without_keys_get_is_checked() -> None:
    zero_lse = check_backend(direct(lambda q, sees, out, lse: (out, torch.where(sees[:, None], lse, 0))))
    assert failing(zero_lse) >= EMPTY
    row = next(row for row in zero_lse.rows if row.name == "empty key ranges among others")
    assert row.detail == "a query that sees no key has LSE 0, which must be -inf"
    nan_out = check_backend(direct(lambda q, sees, out, lse: (out.masked_fill(~sees[:, None, None], torch.nan), lse)))
    assert failing(nan_out) >= EMPTY
    row = next(row for row in nan_out.rows if row.name == "empty key ranges among others")
    assert row.detail == "a query that sees no key has out nan, which must be 0"
    # 0 times what padding holds.
    padding = check_backend(direct(lambda q, sees, out, lse: (out + 0 * q.sum(-1, keepdim=True), lse)))
    assert failing(padding) == {"NaN in padding queries"}


def test_flash_attention_s_lse_of_nan_is_caught_unless_it_is_said() -> None:
    flash = direct(lambda q, sees, out, lse: (out, lse.nan_to_num(-torch.inf, neginf=-torch.inf)))
    assert failing(check_backend(flash)) == {"NaN in a key gives NaN"}
    assert verdicts(check_backend(replace(flash, propagates_nan=False)))["NaN in a key gives NaN"] == "not claimed"


def test_another_dtype_than_asked_for_is_caught() -> None:
    rounded = replace(REFERENCE, attend=lambda q, keys, spans, options, out_dtype: reference_attention(q, keys, spans, options, q.dtype))
    report = check_backend(rounded, dtype=torch.bfloat16)
    assert failing(report) == {"out in fp32", "merged halves are the whole"}
    detail = next(row.detail for row in report.rows if row.name == "out in fp32")
    assert "returned out in torch.bfloat16, where it was asked for torch.float32" in detail


def test_torch_has_one_thread_meanwhile() -> None:
    """Tiny operations over a pool of threads took 30 times as long on a busy machine."""
    seen = set()

    def odd(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        seen.add(torch.get_num_threads())
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyboardInterrupt):
            check_backend(odd)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


# The report, and what judges.


def test_the_report_is_a_table_of_at_most_100_columns() -> None:
    lines = str(check_backend(base_two)).splitlines()
    assert lines[0].startswith("backend='base_two' on cpu in float32: NOT ok (")
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("  one request, causal") and "fails" in line for line in lines)
    assert str(check_backend("cpu")).startswith("backend='cpu' on cpu in float32: ok (20 holds, 17 not claimed)")


def test_a_backend_of_another_device_claims_nothing() -> None:
    report = check_backend("triton")
    assert not report.ok
    assert {(row.verdict, row.detail) for row in report.rows} == {("not claimed", "it runs on cuda tensors, not on cpu ones")}


def test_what_is_no_backend_is_refused() -> None:
    with pytest.raises(cpattn.OptionError, match="backend='auto' is a choice among kernels; pass the one that is to be checked"):
        check_backend("auto")
    with pytest.raises(cpattn.UnknownNameError, match="backend='fast' is unknown; choose one of"):
        check_backend("fast")


@pytest.mark.parametrize("features", [{}, {"window": 5}, {"softcap": 2.0}, {"sinks": True}], ids=str)
def test_the_judge_is_the_oracle_where_rows_are_requests(features: dict[str, Any]) -> None:
    rows = ((21, 0, 30, 10), (13, 30, 13, 1), (1, 43, 8, 8))
    problem = make_trial(Scenario("requests", rows, **features), CPU, torch.float64)
    q, (k, v, *_), _, options, _ = problem
    batch = [(9, 21), (0, 13), (7, 1)]
    prefix, extend = [*range(9), *range(43, 50)], [*range(9, 30), *range(30, 43), 50]
    want = oracle_attention(
        q, k[extend], v[extend], batch, prefix_k=k[prefix], prefix_v=v[prefix], scale=options.scale, window=options.window,
        softcap=options.softcap, sinks=options.sinks,
    )  # fmt: skip
    truth = spans_attention(problem)
    torch.testing.assert_close((truth.out, truth.lse), want, rtol=1e-12, atol=1e-12)
    assert why_wrong(problem, truth, *want) is None


def test_half_precision_hides_no_query_left_out() -> None:
    """Its output is 0, where a mean over 37 values is small: rounding explains a share of that mean, not of the values."""
    assert failing(check_backend(one_query_left_out, dtype=torch.bfloat16)) >= FIRST


@pytest.mark.parametrize("size", [1e-6, 1e-4], ids=str)
def test_half_precision_results_below_the_normal_numbers_are_right(size: float) -> None:
    """A grid of fixed width, not of a relative one, is what they are rounded to."""
    problem = make_trial(Scenario("requests", ((21, 0, 30, 10),)), CPU, torch.float16)
    problem = problem._replace(keys=problem.keys._replace(v=problem.keys.v * size))
    truth = spans_attention(problem)
    assert why_wrong(problem, truth, truth.out.half(), truth.lse.float()) is None
    out = truth.out.half()
    out[3, 1, 5] += 4 * max(2**-24, 2e-3 * size)
    wrong = why_wrong(problem, truth, out, truth.lse.float())
    assert wrong
    assert wrong.startswith("out[5] of query 3, head 1, is ")


def test_scenarios_are_what_their_names_say() -> None:
    assert len(set(NAMES)) == len(NAMES)
    problems = {scenario.name: make_trial(scenario, CPU, torch.float32) for scenario in SCENARIOS}
    alignments = {name: problem.spans.alignment for name, problem in problems.items()}
    assert alignments["all keys in the past"] == "full"
    assert alignments["any diagonal"] == "any"
    assert {alignment for name, alignment in alignments.items() if "any diagonal" not in name and "past" not in name} == {"bottom_right"}
    assert [part.alignment for part in problems["merged halves are the whole"].parts] == ["full", "bottom_right"]
    assert problems["spans of a bucket"].spans.fixed
    assert not problems["strided q, k and v"].q.is_contiguous()
    view = problems["V is a view of K"].keys
    assert view.v.data_ptr() == view.k.data_ptr()
    paged = problems["pages of 16"].keys
    assert paged.page_table is not None
    assert int(paged.page_table.max()) > len(paged.k)
    assert paged.k.isnan().any()
    tables = {name: problem.keys.page_table for name, problem in problems.items()}
    int64, sliced, pool = tables["pages, int64 table"], tables["pages, sliced table"], problems["pages of one pool"].keys
    assert int64 is not None
    assert sliced is not None
    assert (int64.dtype, sliced.dtype, int64.is_contiguous(), sliced.is_contiguous()) == (torch.int64, torch.int32, True, False)
    assert torch.equal(int64, sliced.long())
    assert not pool.k.is_contiguous()
    assert pool.v.data_ptr() - pool.k.data_ptr() == pool.k[0].nbytes
    assert problems["scale is not D ** -0.5"].options.scale == 0.3
    for name, problem in problems.items():
        assert problem.spans.num_queries == len(problem.q), name
        assert problem.q.isnan().any() == (name == "NaN in padding queries"), name
