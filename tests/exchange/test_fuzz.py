"""Random batches over the loopback communicator: every strategy with every backend against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import EXCHANGES, AttentionCase
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.keys import Keys
from cpattn.spans import Spans

lengths = st.one_of(st.just(0), st.just(1), st.integers(2, 20), st.integers(0, 200))
prefixes = st.one_of(st.just(0), st.integers(0, 300))
batches = st.lists(st.tuples(prefixes, lengths), max_size=12)


# What each strategy can serve.
all_exchanges = pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)


@st.composite
def cases(draw: st.DrawFn, features: bool) -> AttentionCase:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([8, 24]))
    v_in_k = draw(st.booleans())
    return AttentionCase(
        batch=draw(batches),
        heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=draw(st.sampled_from([head_dim, 8] if v_in_k else [head_dim, 8, 16, 40])),
        v_in_k=v_in_k,
        page_size=draw(st.sampled_from([1, 3, 16, 64])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        scale=draw(st.sampled_from([None, 0.5, 2.0])),
        window=draw(st.one_of(st.none(), st.integers(1, 400))) if features else None,
        softcap=draw(st.sampled_from([None, 1.0, 20.0])) if features else None,
        sinks=draw(st.booleans()),
        overlap=draw(st.sampled_from([None, 1, kv_heads])),
        seed=draw(st.integers(0, 2**31)),
    )


sizes: dict[str, st.SearchStrategy[Any]] = {"cp_size": st.integers(1, 8), "pad_to": st.sampled_from([1, 1, 8, 64])}
cut_alike = {"partition": st.sampled_from(["zigzag", "contiguous"]), "remainder": st.sampled_from(["balanced", "first"])}
plans = st.fixed_dictionaries(sizes | cut_alike) | st.fixed_dictionaries(sizes | {"partition": st.just("whole")})


@all_exchanges
@given(case=cases(features=True), options=plans)
@settings(max_examples=25, deadline=None)
def test_reference_backend_with_every_feature(case: AttentionCase, options: dict[str, Any], strategy: str, cache: str) -> None:
    case.cache = cache
    if cache == "sharded":
        case.window = case.options["window"] = None
    case.check_loopback(case.plan(**options), strategy, "reference")


@all_exchanges
@given(case=cases(features=False), options=plans)
@settings(max_examples=20, deadline=None)
def test_cpu_backend(case: AttentionCase, options: dict[str, Any], strategy: str, cache: str) -> None:
    """It reads no pages, and so is given a packed copy of them."""
    case.cache = cache
    case.check_loopback(case.plan(**options), strategy, "cpu")


@all_exchanges
@pytest.mark.parametrize(("cp_size", "backend"), [(1, "cpu"), (3, "reference"), (7, "cpu")])
@pytest.mark.parametrize(
    "batch",
    [
        pytest.param([], id="no requests"),
        pytest.param([(0, 0), (17, 0)], id="nothing new"),
        pytest.param([(0, 1)], id="one token"),
        pytest.param([(300, 1)], id="one token after a prefix"),
        pytest.param([(5, 1), (97, 1), (0, 1), (31, 1)], id="decode batch"),
        pytest.param([(0, 3)], id="fewer tokens than ranks"),
        pytest.param([(101, 13)], id="shorter than 2 * cp_size beside a prefix"),
        pytest.param([(0, 9)] * 16, id="many short requests"),
        pytest.param([(0, 211), *[(0, 2)] * 15], id="one long beside short ones"),
        pytest.param([(131, 127), (7, 0), (0, 113), (64, 64)], id="prime lengths and an idle request"),
    ],
)
def test_ugly_batches(batch: list[tuple[int, int]], cp_size: int, backend: str, strategy: str, cache: str) -> None:
    case = AttentionCase(batch, dtype=torch.float32, cache=cache, page_size=5)
    case.check_loopback(case.plan(cp_size, pad_to=4), strategy, backend)


@pytest.mark.parametrize("cp_size", [1, 3])
def test_a_ring_with_window_and_sinks_and_no_prefix(cp_size: int) -> None:
    # On one rank its only merge is that of the chunks, which a window keeps apart.
    case = AttentionCase([(0, 60), (0, 9)], window=13, sinks=True)
    case.check_loopback(cpattn.plan(case.batch, cp_size), "ring", "reference")


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_a_kernel_that_rounds_its_results(strategy: str, sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlashAttention kernels do: half precision out, no sinks of their own."""
    reference = cpattn.BACKENDS["reference"]

    def attend(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert out_dtype == q.dtype
        assert options.sinks is None
        return reference.attend(q, keys, spans, options, out_dtype)

    kernel = replace(reference, name="kernel", attend=attend, fp32_out=False, native_sinks=False)
    monkeypatch.setitem(cpattn.BACKENDS, "kernel", kernel)
    case = AttentionCase([(40, 70), (0, 33), (5, 1)], dtype=torch.bfloat16, sinks=sinks)
    case.check_loopback(cpattn.plan(case.batch, 3, pad_to=16), strategy, "kernel", rounded_partials=strategy == "ring")


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_any_strides(strategy: str, backend: str) -> None:
    case = AttentionCase([(40, 70), (0, 33)])

    def strided(x: Tensor) -> Tensor:
        return x.transpose(0, 2).contiguous().transpose(0, 2)

    case.q, case.k, case.v = strided(case.q), strided(case.k), strided(case.v)
    case.prefix_k, case.prefix_v = strided(case.prefix_k), strided(case.prefix_v)
    case.check_loopback(cpattn.plan(case.batch, 2), strategy, backend)
    case.check([case.on_rank(cpattn.plan(case.batch, 1), 0, None, strategy, backend)], cpattn.plan(case.batch, 1), strategy, backend)


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_float64_stays_float64_through_the_merges(strategy: str) -> None:
    case = AttentionCase([(40, 70), (0, 33)], dtype=torch.float64, sinks=True)
    case.check_loopback(cpattn.plan(case.batch, 4), strategy, "reference")


@pytest.mark.parametrize("cp_size", [2, 8])
def test_ring_partials_are_merged_in_fp32(cp_size: int) -> None:
    # Merging bf16 partials raises the error by half at once; 1.05 is far below that, so this fails if any partial is rounded.
    case = AttentionCase([(0, 300)], heads=8, kv_heads=8, head_dim=32, dtype=torch.bfloat16)
    case.check_loopback(cpattn.plan(case.batch, cp_size), "ring", "cpu")


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_large_scores_neither_overflow_nor_cancel(strategy: str) -> None:
    # exp of these scores overflows fp32 by far; only differences of LSEs may ever be exponentiated.
    case = AttentionCase([(30, 50)], scale=60.0)
    case.check_loopback(cpattn.plan(case.batch, 3), strategy, "cpu")


def test_smaller_batch_after_a_larger_one_sees_nothing_of_it() -> None:
    """Buffers are reused; a batch must not see rows that a larger one left in them."""
    from cpattn.testing import run_loopback

    large, small = AttentionCase([(200, 150), (0, 90)], seed=1), AttentionCase([(3, 20)], seed=2)
    large.v.fill_(torch.inf)
    plans = [cpattn.plan(case.batch, 3, pad_to=16) for case in (large, small)]
    for strategy in ("all_gather", "ring"):

        def program(communicator: cpattn.Communicator, strategy: str = strategy) -> tuple[torch.Tensor, torch.Tensor]:
            large.on_rank(plans[0], communicator.rank, communicator, strategy, "cpu")
            return small.on_rank(plans[1], communicator.rank, communicator, strategy, "cpu")

        small.check(run_loopback(program, 3), plans[1], strategy, "cpu")
