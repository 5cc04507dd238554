"""An engine's own kernel as the backend of a call."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from inputs.cases import AttentionCase
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.testing import run_loopback

MIXED = [(0, 21), (37, 18), (30, 0), (47, 1), (0, 0), (16, 5)]


def kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: cpattn.RaggedRows,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The reference, as an engine would call it."""
    return cpattn.BACKENDS["reference"].run(q, k, v, rows, AttentionOptions(scale, window, softcap, sinks), out_dtype)


def odd_where_nothing_is_seen(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """As FlashAttention 2 does: LSE +inf for a query without keys; and whatever was in memory as its output."""
    out, lse = kernel(*arguments, **options)
    nothing = lse == -torch.inf
    return torch.where(nothing[..., None], torch.nan, out), torch.where(nothing, torch.inf, lse)


class Recorded:
    """Calls a kernel and keeps what it was called with."""

    def __init__(self, function: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.function = function
        self.rows: list[cpattn.RaggedRows] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, **options: Any) -> tuple[Tensor, Tensor]:
        self.rows.append(rows)
        self.options.append(options)
        return self.function(q, k, v, rows, **options)


@pytest.mark.parametrize("function", [kernel, odd_where_nothing_is_seen])
@pytest.mark.parametrize(
    ("strategy", "cache"),
    [
        ("all_gather", "packed"),
        ("all_gather", "paged"),
        ("ring", "packed"),
        ("ring", "sharded"),
        ("pass_q", "sharded"),
        ("pass_q_ring", "packed"),
    ],
)
def test_a_function_computes_what_the_reference_does(function: Any, strategy: str, cache: str) -> None:
    case = AttentionCase(MIXED, cache=cache, sinks=True, softcap=5.0, dtype=torch.bfloat16)
    plan = case.plan(3, pad_to=8)
    expected = run_loopback(lambda c: case.on_rank(plan, c.rank, c, strategy, "reference"), 3)
    outputs = run_loopback(lambda c: case.on_rank(plan, c.rank, c, strategy, function), 3)
    for output, same in zip(outputs, expected, strict=True):
        assert torch.equal(output[0], same[0])
        assert torch.equal(output[1], same[1])


@pytest.mark.parametrize("paged", [False, True], ids=["packed copy", "pages"])
def test_pages_are_given_to_a_kernel_that_reads_their_size(paged: bool) -> None:
    case = AttentionCase(MIXED, cache="paged", page_size=16)
    recorded = Recorded(kernel)
    backend = cpattn.custom_backend(recorded, name="mine", page_sizes=lambda size: size == (16 if paged else 256))
    plan = case.plan(1)
    case.check([case.on_rank(plan, 0, None, "all_gather", backend)], plan, "all_gather", "reference")
    assert [rows.page_table is not None for rows in recorded.rows] == [paged]


def test_what_a_kernel_is_told() -> None:
    case = AttentionCase(MIXED, window=9, softcap=3.0, scale=0.25, sinks=True)
    recorded = Recorded(kernel)
    plan = case.plan(1)
    case.on_rank(plan, 0, None, "all_gather", recorded)
    (options,) = recorded.options
    assert (options["scale"], options["window"], options["softcap"], options["out_dtype"]) == (0.25, 9, 3.0, torch.float32)
    assert options["sinks"] is case.options["sinks"]
    assert recorded.rows[0].alignment == "bottom_right"


def test_partial_results_are_asked_for_in_fp32_and_without_sinks() -> None:
    case = AttentionCase(MIXED, dtype=torch.bfloat16, sinks=True)
    recorded = Recorded(kernel)
    plan = case.plan(2)
    case.check(run_loopback(lambda c: case.on_rank(plan, c.rank, c, "ring", recorded), 2), plan, "ring", "reference")
    assert {options["out_dtype"] for options in recorded.options} == {torch.float32}
    assert {options["sinks"] for options in recorded.options} == {None}


def test_a_kernel_that_knows_one_alignment_is_kept_from_the_others() -> None:
    case = AttentionCase(MIXED)
    plan = case.plan(2)
    backend = cpattn.custom_backend(kernel, name="causal only", alignments=frozenset({"bottom_right"}))
    case.check(run_loopback(lambda c: case.on_rank(plan, c.rank, c, "all_gather", backend), 2), plan, "all_gather", "reference")

    def program(communicator: cpattn.Communicator) -> int:
        message = "backend='causal only' cannot serve this call: the strategy has spans of alignment 'full', which it cannot express"
        with pytest.raises(cpattn.UnsupportedError, match=message):
            case.on_rank(plan, communicator.rank, communicator, "ring", backend)
        return communicator.bytes_sent

    assert run_loopback(program, 2) == [0, 0]


def test_what_a_kernel_raises_reaches_the_caller() -> None:
    def lacks_softcap(*arguments: Any, softcap: float | None, **options: Any) -> tuple[Tensor, Tensor]:
        if softcap is not None:
            raise NotImplementedError("no softcap here")
        return kernel(*arguments, softcap=softcap, **options)

    case = AttentionCase(MIXED, softcap=3.0)
    with pytest.raises(NotImplementedError, match="no softcap here"):
        case.on_rank(case.plan(1), 0, None, "all_gather", lacks_softcap)


def test_what_is_no_backend_is_refused() -> None:
    meta = cpattn.build_metadata([(0, 4)], 1, 0)
    q = torch.zeros(4, 1, 8)
    with pytest.raises(
        cpattn.UnknownNameError, match=r"backend=3 is unknown; choose one of 'auto', .*, or pass a function \(q, k, v, rows"
    ):
        cpattn.cp_attention(q, q, q, meta, backend=3)  # type: ignore[call-overload]


FIX_PAIR = "a kernel returns a pair of tensors: return (out, lse) and nothing else"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out, lse: out, rf"backend='odd' returned a tensor of shape \(77, 4, 16\); {re.escape(FIX_PAIR)}"),
        (lambda out, lse: None, "returned None; a kernel returns a pair"),
        (lambda out, lse: (out, lse, None), "returned a tuple of 3: Tensor, Tensor, NoneType; a kernel returns a pair"),
        (lambda out, lse: (out, None), "returned a tuple of 2: Tensor, NoneType"),
        (lambda out, lse: (out[:-1], lse), r"out of shape \(76, 4, 16\), but .* \[rows, Hq, Dv\] = \(77, 4, 16\); return one output"),
        (lambda out, lse: (out.flatten(1), lse), r"out of shape \(77, 64\), but it must be"),
        (lambda out, lse: (out.long(), lse), "out in torch.int64; it must be float64, float32, bfloat16 or float16"),
        (lambda out, lse: (out, lse.T), r"lse of shape \(4, 77\), but .* \[rows, Hq\] = \(77, 4\); make it with .*lse_heads_first=True"),
        (lambda out, lse: (out, lse[None]), r"lse of shape \(1, 77, 4\), but .*; return one LSE for each row and head of q"),
        (lambda out, lse: (out, lse.bfloat16()), "lse in torch.bfloat16 for q in torch.float32, but it must be torch.float32; return it"),
        (lambda out, lse: (out, lse.double()), "lse in torch.float64 for q in torch.float32, but it must be torch.float32"),
        (lambda out, lse: (out.to("meta"), lse), "out on meta, but q is on cpu; return it on q's device"),
        (lambda out, lse: (out, lse.to("meta")), "lse on meta, but q is on cpu; return it on q's device"),
    ],
    ids=[
        "out alone", "nothing", "three", "no lse", "a row less", "flat", "integers", "heads first", "batch", "half", "double",
        "out elsewhere", "lse elsewhere",
    ],
)  # fmt: skip
def test_what_a_kernel_returns_is_checked(change: Callable[..., Any], message: str) -> None:
    def odd(*arguments: Any, **options: Any) -> Any:
        return change(*kernel(*arguments, **options))

    case = AttentionCase([(0, 40), (0, 37)])
    with pytest.raises(cpattn.BackendError, match=message):
        case.on_rank(case.plan(1), 0, None, "all_gather", odd)


def test_heads_first_where_it_is_said_so_is_what_is_checked() -> None:
    case = AttentionCase([(0, 40)])
    backend = cpattn.custom_backend(kernel, lse_heads_first=True)
    message = r"lse of shape \(40, 4\), but it must be \[Hq, rows\] = \(4, 40\); make the backend without lse_heads_first"
    with pytest.raises(cpattn.BackendError, match=message):
        case.on_rank(case.plan(1), 0, None, "all_gather", backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("base", [math.e, 2])
def test_an_lse_in_another_form(base: float, heads_first: bool, dtype: torch.dtype) -> None:
    def other_form(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = kernel(*arguments, **options)
        lse = lse / math.log(base)
        return out, lse.T.contiguous() if heads_first else lse

    case = AttentionCase(MIXED, dtype=dtype)
    plan = case.plan(2)
    backend = cpattn.custom_backend(other_form, lse_base=base, lse_heads_first=heads_first)
    outputs = run_loopback(lambda c: case.on_rank(plan, c.rank, c, "ring", backend), 2)
    expected = run_loopback(lambda c: case.on_rank(plan, c.rank, c, "ring", "reference"), 2)
    # An LSE of size 6 is rounded when its base changes.
    torch.testing.assert_close(outputs[0][1], expected[0][1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs[0][0], expected[0][0], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": 3}, r"custom_backend got a int; pass a function \(q, k, v, rows, \*\*options\)"),
        ({"name": 3}, "name=3; pass a string"),
        ({"alignments": {"causal"}}, "alignments={'causal'}; pass a set of those .* of 'any', 'bottom_right', 'full'"),
        ({"alignments": "full"}, "alignments='full'; pass a set"),
        ({"alignments": frozenset()}, r"alignments=frozenset\(\); pass a set"),
        ({"alignments": 3}, "alignments=3; pass a set"),
        ({"page_sizes": 16}, "page_sizes=16; pass a function from a page size"),
        ({"lse_base": 10}, "lse_base=10; pass math.e, or 2"),
        ({"lse_base": "e"}, "lse_base='e'; pass math.e, or 2"),
        ({"lse_base": True}, "lse_base=True; pass math.e, or 2"),
        ({"lse_heads_first": "no"}, r"lse_heads_first='no'; pass True for an LSE \[Hq, rows\]"),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_custom_backend_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(cpattn.OptionError, match=message):
        cpattn.custom_backend(**({"function": kernel} | arguments))


@pytest.mark.parametrize("sign", [1, -1], ids=["as FlashAttention 2 and 3", "as FlashAttention 4"])
@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q", "pass_q_ring"])
def test_nan_scores_are_not_taken_for_no_keys(strategy: str, sign: int) -> None:
    """FlashAttention kernels give an infinite LSE where the scores are NaN, as where there are no keys."""

    def flash(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = kernel(*arguments, **options)
        odd = lse.isnan() | (lse == -torch.inf)
        return out.masked_fill(odd[..., None], torch.nan), lse.masked_fill(odd, sign * torch.inf)

    case = AttentionCase([(0, 40), (11, 9)])
    case.k[7] = torch.nan
    plan = case.plan(3, pad_to=8)
    for out, lse in run_loopback(lambda c: case.on_rank(plan, c.rank, c, strategy, flash), 3):
        token = torch.arange(49)[:, None].expand(49, 4)
        sees_nan = (token >= 7) & (token < 40)
        assert torch.equal(lse.isnan(), sees_nan)
        assert torch.equal(out.isnan(), sees_nan[..., None].expand_as(out))
        assert lse[~sees_nan].isfinite().all()


def test_queries_without_keys_are_known_whatever_the_kernel_says() -> None:
    """Their LSE would be merged as that of keys, and it is the sink where the kernel was given sinks."""

    def zeros(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = kernel(*arguments, **options)
        return out.masked_fill((lse == -torch.inf)[..., None], 3.0), lse.masked_fill(lse == -torch.inf, 0.0)

    case = AttentionCase(MIXED)
    plan = case.plan(3, pad_to=8)
    case.check(run_loopback(lambda c: case.on_rank(plan, c.rank, c, "ring", zeros), 3), plan, "ring", "reference")

    rows = cpattn.RaggedRows.build(*np.array([(2, 0, 0, 0), (1, 0, 3, 3)]).T)
    q, k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    sinks = torch.tensor([0.5, -torch.inf])
    out, lse = cpattn.custom_backend(zeros).run(q, k, v, rows, AttentionOptions(1.0, sinks=sinks), torch.float32)
    assert torch.equal(lse[:2], sinks.expand(2, 2))
    assert (out[:2] == 0).all()
    assert lse[2].isfinite().all()


def test_a_backend_with_run_is_told_what_has_taken_its_place() -> None:
    message = r"run=...\) was removed; pass attend=, a function \(q, keys, spans, options, out_dtype\) .*custom_backend"
    with pytest.raises(cpattn.OptionError, match=message):
        replace(cpattn.BACKENDS["reference"], run=kernel)  # type: ignore[call-arg]
    assert "attend" in inspect.signature(cpattn.Backend).parameters
