"""What check=True finds in a caller's kernel, and that it finds nothing where only rounding differs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from inputs.cases import AttentionCase
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.attention.ragged_rows import RaggedRows
from cpattn.attention.reference import reference_attention
from cpattn.attention.verify import chosen_queries, verified
from cpattn.keys import Keys
from cpattn.spans import Spans
from cpattn.testing import run_loopback

MIXED = [(0, 21), (37, 18), (30, 0), (47, 1), (0, 0), (16, 5)]


def kernel(
    q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, *, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return reference_attention(q, Keys(k, v, rows.page_table), rows, AttentionOptions(scale, window, softcap, sinks), out_dtype)


def problems_of(function: Any, case: AttentionCase, strategy: str = "ring", cp_size: int = 2, **options: Any) -> list[str]:
    """What is found in all launches of all ranks."""
    plan = case.plan(cp_size, pad_to=4)
    problems: list[str] = []
    backend = verified(cpattn.custom_backend(function, **options), problems)
    run_loopback(lambda c: case.on_rank(plan, c.rank, c, strategy, backend), cp_size)
    return problems


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As a tensor core takes it: in half precision rounded, in fp32 cut off after ten bits."""
    if dtype == torch.float32:
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return x.to(dtype).to(x.dtype)


def as_tensor_cores_do(
    q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, *, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rounds all that may be rounded: q times the scale, in fp32 also k and v, the weights, and the result."""
    dtype = q.dtype
    out = torch.zeros(*q.shape[:2], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf)
    group = q.shape[1] // k.shape[1]
    scaled = rounded(q.float() * scale, dtype)
    keys, values = (rounded(x.float(), dtype).repeat_interleave(group, 1) for x in (k, v))
    for q_start, q_len, k_start, k_len, diagonal in zip(*(column.tolist() for column in rows.host[:5]), strict=True):
        for j in range(q_len):
            seen = slice(k_start + max(0, diagonal + j - (window or 10**6)), k_start + min(max(diagonal + j, 0), k_len))
            scores = torch.einsum("hd,nhd->hn", scaled[q_start + j], keys[seen])
            if softcap is not None:
                scores = softcap * (torch.tanh(scores / softcap) * (1 + 2**-11))
            logits = scores if sinks is None else torch.cat([scores, sinks[:, None]], 1)
            if not scores.shape[1]:
                continue
            weights = torch.exp(logits - logits.amax(1, keepdim=True))
            total = weights.sum(1)
            lse[q_start + j] = logits.amax(1) + total.log()
            out[q_start + j] = torch.einsum("hn,nhd->hd", rounded(weights[:, : scores.shape[1]], dtype), values[seen]) / total[:, None]
    return rounded(out, dtype).to(out_dtype), lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "features",
    [{}, {"window": 7}, {"softcap": 2.0}, {"sinks": True}, {"scale": 2.0}, {"head_dim": 128, "heads": 8, "kv_heads": 1}],
    ids=["plain", "window", "softcap", "sinks", "large scores", "D 128"],
)
@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_rounding_is_no_problem(strategy: str, features: dict[str, Any], dtype: torch.dtype) -> None:
    cases = [AttentionCase(MIXED, dtype=dtype, seed=seed, **features) for seed in range(3)]
    plan = cases[0].plan(2, pad_to=4)
    problems: list[str] = []
    backend = verified(cpattn.custom_backend(as_tensor_cores_do), problems)
    for case in cases:

        def program(c: cpattn.Communicator, case: AttentionCase = case) -> None:
            meta = plan.metadata(c.rank)
            q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
            cpattn.cp_attention(q, k, v, meta, group=c, kv_cache=case.prefix, strategy=strategy, backend=backend, **case.options)  # type: ignore[call-overload]

        run_loopback(program, 2)
    assert problems == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["q", "v"])
@pytest.mark.parametrize("size", [1e-4, 1e-6], ids=str)
def test_the_rounding_of_small_numbers_is_no_problem(size: float, name: str, dtype: torch.dtype) -> None:
    """Below the smallest normal number, 6e-5 in fp16, an error is no share of the number that is rounded."""
    case = AttentionCase(MIXED, dtype=dtype)
    getattr(case, name).mul_(size)
    assert problems_of(as_tensor_cores_do, case, "all_gather") == []


@pytest.mark.parametrize(("strategy", "cache"), [("ring", "paged"), ("ring", "sharded"), ("pass_q", "sharded"), ("all_gather", "paged")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_the_reference_has_no_problem(strategy: str, cache: str, dtype: torch.dtype) -> None:
    case = AttentionCase(MIXED, cache=cache, dtype=dtype, softcap=5.0)
    assert problems_of(kernel, case, strategy, page_sizes=lambda size: True) == []


def test_nan_in_keys_is_no_problem() -> None:
    case = AttentionCase([(0, 40)])
    # The reference multiplies values by weights of 0 as well: those of later keys make its output NaN.
    case.k[7], case.v[3] = torch.nan, torch.nan
    plan = case.plan(2)
    problems: list[str] = []
    backend = verified(cpattn.custom_backend(kernel), problems)

    def program(c: cpattn.Communicator) -> None:
        meta = plan.metadata(c.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        cpattn.cp_attention(q, k, v, meta, group=c, strategy="ring", backend=backend)

    run_loopback(program, 2)
    assert problems == []


def test_padding_that_sees_nothing_but_a_sink_is_no_problem() -> None:
    """Kernels take the logarithm of a sink's power, and padding may be NaN."""
    problems: list[str] = []
    reference = cpattn.BACKENDS["reference"]

    def attend(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, lse = reference.attend(q, keys, spans, options, out_dtype)
        return out, lse * (1 + 2**-23)

    q, k = torch.full((3, 4, 8), torch.nan), torch.randn(1, 2, 8)
    q[0] = 1
    spans = Spans.build(*np.array([[1, 2], [0, 1], [1, 0], [1, 0]]))
    options = AttentionOptions(1.0, sinks=torch.tensor([1.5, -3.0, 0.1, 7.0]))
    verified(replace(reference, attend=attend), problems).attend(q, Keys(k, k), spans, options, q.dtype)
    assert problems == []


def one_key_too_many(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, rows = arguments
    host = rows.host
    return kernel(q, k, v, RaggedRows.build(host.q_len, host.k_start, host.k_len, host.diagonal + 1), **options)


def one_key_too_few(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, rows = arguments
    host = rows.host
    return kernel(q, k, v, RaggedRows.build(host.q_len, host.k_start, host.k_len, host.diagonal - 1), **options)


def last_row_missing(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, rows = arguments
    host = rows.host
    k_len = host.k_len.copy()
    k_len[np.flatnonzero(k_len)[-1:]] = 0
    return kernel(q, k, v, RaggedRows.build(host.q_len, host.k_start, k_len, host.diagonal), **options)


def nan_hidden(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, rows = arguments
    return kernel(q, k.nan_to_num(0), v, rows, **options)


@pytest.mark.parametrize("function", [one_key_too_many, one_key_too_few, last_row_missing])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_wrong_keys_are_found(function: Any, dtype: torch.dtype) -> None:
    case = AttentionCase([(0, 21), (3, 18)], dtype=dtype)
    problems = problems_of(function, case, "all_gather", 1) if function is not last_row_missing else wrong(function, dtype)
    assert problems
    assert problems[0].startswith(f"backend={function.__name__!r}: query ")


def wrong(function: Any, dtype: torch.dtype = torch.float32, heads: int = 4, **options: Any) -> list[str]:
    """What is found in one launch over two rows and a row without keys."""
    rows = RaggedRows.build(*np.array([(3, 0, 11, 9), (3, 11, 7, 5), (2, 0, 0, 0)]).T)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 16, generator=generator).to(dtype) for n, h in ((8, heads), (18, 2), (18, 2)))
    problems: list[str] = []
    verified(cpattn.custom_backend(function, **options), problems).run(q, k, v, rows, AttentionOptions(0.25), torch.float32)
    return problems


def test_a_line_says_where_and_by_how_much() -> None:
    (line,) = wrong(one_key_too_many)
    assert line.startswith("backend='one_key_too_many': query 0, number 0 of span 0, differs from the reference in head 0: LSE ")
    assert "(rounding explains " in line
    assert "out[" in line
    # Of 8 queries the last two of each row see as much as there is, and two see nothing, of which one is compared.
    assert line.endswith(" compared results differ")
    assert "lse_base" not in line


def base_two(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernel(*arguments, **options)
    return out, lse / math.log(2)


def exchanged(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernel(*arguments, **options)
    return out, lse.T


def test_an_lse_in_another_form_is_named() -> None:
    (line,) = wrong(base_two)
    assert line.endswith("; it fits as a log2: make the backend with custom_backend(..., lse_base=2)")
    (line,) = wrong(kernel, lse_base=2)
    assert line.endswith("; it fits as a natural logarithm: make the backend without lse_base=2")
    (line,) = wrong(exchanged, heads=8)
    assert line.endswith("; it fits with rows and heads exchanged: make the backend with the other lse_heads_first")
    (line,) = wrong(kernel, heads=8, lse_heads_first=True)
    assert line.endswith("make the backend with the other lse_heads_first")
    assert wrong(base_two, lse_base=2) == wrong(exchanged, lse_heads_first=True) == []


def test_hidden_nan_is_found() -> None:
    case = AttentionCase([(0, 40)])
    case.k[7] = torch.nan
    (line,) = problems_of(nan_hidden, case, "all_gather", 1)
    assert "LSE nan" not in line.split(" in place of ")[0]
    assert " in place of nan (rounding explains nan)" in line


def test_nan_from_beyond_the_range_is_found() -> None:
    def reads_on(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = kernel(q, k, v, rows, **options)
        return out + 0 * v[-1].repeat_interleave(2, 0), lse

    rows = RaggedRows.build(*np.array([(3, 0, 11, 9)]).T)
    q, k, v = torch.randn(3, 4, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 16)
    v[-1] = torch.nan
    problems: list[str] = []
    verified(cpattn.custom_backend(reads_on), problems).run(q, k, v, rows, AttentionOptions(0.25), torch.float32)
    assert len(problems) == 1
    assert "out[0] nan in place of " in problems[0]


def test_which_queries_are_compared() -> None:
    rows = RaggedRows.build(*np.array([(50, 0, 100, 51), (1, 0, 9, 9), (0, 3, 5, 1), (9, 0, 9, -3), (7, 0, 0, 0)]).T)
    sees = rows.sees_keys().numpy()
    chosen = chosen_queries(rows, sees)
    assert len(chosen) <= 8
    assert (sees[chosen]).sum() == len(chosen) - 1
    assert {0, 49, 59} <= set(chosen.tolist())
    assert chosen.tolist() == chosen_queries(rows, sees).tolist()
    few = RaggedRows.build(*np.array([(2, 0, 5, 4)]).T)
    assert chosen_queries(few, few.sees_keys().numpy()).tolist() == [0, 1]
    none = RaggedRows.build(*np.zeros((4, 0), dtype=np.int64))
    assert chosen_queries(none, none.sees_keys().numpy()).tolist() == []


def test_a_verified_backend_returns_the_same_and_does_not_merge_by_itself() -> None:
    problems: list[str] = []
    backend = verified(cpattn.BACKENDS["triton"], problems)
    assert (backend.name, backend.accumulate) == ("triton", None)
    rows = RaggedRows.build(*np.array([(3, 0, 5, 3)]).T)
    q = torch.randn(5, 2, 8)
    ours = cpattn.BACKENDS["cpu"]
    got = verified(ours, problems).run(q[:3], q, q, rows, AttentionOptions(1.0), torch.float32)
    for x, y in zip(got, ours.run(q[:3], q, q, rows, AttentionOptions(1.0), torch.float32), strict=True):
        assert torch.equal(x, y)
    assert problems == []
