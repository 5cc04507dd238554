"""Each backend against a plain definition of RaggedRows, on rows that no strategy makes, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.problems import CAUSAL, problem
from torch import Tensor

from cpattn.attention.auto import able_backends, explain_backends
from cpattn.attention.backend import AttentionOptions
from cpattn.attention.ragged_rows import RaggedRows
from cpattn.attention.registry import BACKENDS
from cpattn.errors import UnsupportedError
from cpattn.testing import relative_rmse

SOME_KEYS = 60


def brute_force(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """A query and a head at a time, in float64, with the definition's own words."""
    out = torch.zeros(len(q), q.shape[1], v.shape[2], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for q_start, q_len, k_start, k_len, diagonal in zip(*(column.tolist() for column in rows.host[:5]), strict=True):
        for j in range(q_len):
            sees_to = min(max(diagonal + j, 0), k_len)
            sees_from = 0 if options.window is None else max(0, diagonal + j - options.window)
            for head in range(q.shape[1]):
                kv_head = head // (q.shape[1] // k.shape[1])
                keys = slice(k_start + sees_from, k_start + max(sees_from, sees_to))
                scores = k[keys, kv_head].double() @ q[q_start + j, head].double() * options.scale
                if options.softcap is not None:
                    scores = options.softcap * torch.tanh(scores / options.softcap)
                logits = scores if options.sinks is None else torch.cat([scores, options.sinks[head, None].double()])
                if len(logits):
                    weights = torch.softmax(logits, 0)[: len(scores)]
                    out[q_start + j, head] = weights @ v[keys, kv_head].double()
                    lse[q_start + j, head] = torch.logsumexp(logits, 0)
    return out, lse


rows = st.lists(st.tuples(st.integers(0, 12), st.integers(0, SOME_KEYS), st.integers(0, SOME_KEYS), st.integers(-15, 80)), max_size=5).map(
    lambda table: RaggedRows.build(
        *np.array([(q_len, start, min(k_len, SOME_KEYS - start), d) for q_len, start, k_len, d in table], dtype=np.int64).reshape(-1, 4).T
    )
)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@given(rows=rows, data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_rows(rows: RaggedRows, data: st.DataObject, name: str) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    backend = BACKENDS[name]
    group, v_head_dim = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([8, 16, 24]))
    options = AttentionOptions(
        scale=0.3,
        window=data.draw(st.one_of(st.none(), st.integers(1, 70))) if backend.window else None,
        softcap=data.draw(st.sampled_from([None, 2.0])) if backend.softcap else None,
        sinks=torch.randn(2 * group) if backend.native_sinks and data.draw(st.booleans()) else None,
    )
    q = torch.randn(rows.num_queries + 3, 2 * group, 16)
    kv = torch.randn(SOME_KEYS, 2, 16 + v_head_dim)
    k, v = kv[..., :16], kv[..., 16:]  # strided, as they lie in a message
    out, lse = backend.run(q, k, v, rows, options, torch.float32)
    expected, expected_lse = brute_force(q, k, v, rows, options)
    used = slice(rows.num_queries)
    torch.testing.assert_close(lse[used].double(), expected_lse[used], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[used].double(), expected[used], rtol=1e-4, atol=1e-5)
    blind = expected_lse[used] == -torch.inf
    assert (out[used][blind] == 0).all()


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_keys_outside_of_every_range_are_not_touched(name: str) -> None:
    rows = RaggedRows.build(*np.array([[4, 10, 6, 3], [3, 12, 9, 7]]).T)
    q, k, v = torch.randn(7, 2, 8), torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    k[:10], k[21:], v[:10], v[21:] = torch.nan, torch.inf, torch.nan, torch.inf
    out, lse = BACKENDS[name].run(q, k, v, rows, AttentionOptions(scale=1.0), torch.float32)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_decodes_and_prompts_on_a_cpu_merge_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging takes longer than the kernel, where there are few queries."""
    monkeypatch.setattr("cpattn.attention.cpu.merge_", None)
    rows = RaggedRows.build(*np.array([[1, 0, 9, 9], [5, 9, 5, 1], [1, 14, 6, 3]]).T)  # the last sees three of six keys
    q, k, v = torch.randn(7, 2, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    options = AttentionOptions(scale=0.3)
    out, lse = BACKENDS["cpu"].run(q, k, v, rows, options, torch.float32)
    expected, expected_lse = brute_force(q, k, v, rows, options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1e30, 0.0])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_scores_that_are_no_numbers_give_nan_and_nothing_else_does(name: str, wrong: float) -> None:
    """Of infinite keys products are +inf and -inf, whose sum is NaN; so it is where products of large numbers overflow."""
    rows = RaggedRows.build(*np.array([[6, 0, 9, 4], [3, 9, 3, 1]]).T)  # six queries after three cached keys, and a request of three
    q, k, v = torch.randn(9, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    q[:, :, 0], q[:, :, 1] = 1e20, -1e20
    q[6:] = 0  # scores of 0, and for the first of them an LSE of 0
    k[3:5], v[9] = wrong, 0.0
    if not wrong:
        q[:], v[:] = 0.0, 0.0
    out, lse = BACKENDS[name].run(q, k, v, rows, AttentionOptions(scale=0.3), torch.float32)
    is_wrong = torch.zeros(9, dtype=torch.bool)
    is_wrong[:6] = wrong != 0
    assert torch.equal(out.isnan().all(dim=-1), is_wrong[:, None].expand(9, 4))
    assert torch.equal(out.isnan().any(dim=-1), lse.isnan())
    torch.testing.assert_close(lse[6:], torch.arange(1.0, 4).log()[:, None].expand(3, 4))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_keys_with_scores_of_minus_infinity_weigh_nothing(name: str) -> None:
    """However many they are: alone they are no keys, before others they change nothing, and they hide no NaN."""
    rows = RaggedRows.build(*np.array([[3, 0, 5, 6], [3, 5, 7, 5], [3, 12, 3, 1], [1, 15, 2, 2], [1, 17, 2, 2]]).T)
    q, k, v = torch.randn(11, 4, 8), torch.randn(19, 2, 8), torch.randn(19, 2, 8)
    q[..., 0], k[..., 0] = 1, 0
    k[:9, :, 0] = -torch.inf  # the first request's keys, and four of the second one's
    k[[12, 15, 17], :, 0] = -torch.inf
    k[16], k[18] = torch.nan, 0.0  # of the last two, whose LSE is NaN and 0
    v[18] = 0
    out, lse = BACKENDS[name].run(q, k, v, rows, AttentionOptions(scale=0.3), torch.float32)
    assert (lse[[0, 1, 2, 6]] == -torch.inf).all()
    assert (out[[0, 1, 2, 6, 10]] == 0).all()
    assert out[9].isnan().all()
    assert lse[9].isnan().all()
    assert (lse[10] == 0).all()
    among = RaggedRows.build(*np.array([[3, 9, 3, 1], [2, 13, 2, 1]]).T)
    seen = [3, 4, 5, 7, 8]
    expected, expected_lse = brute_force(q[seen], k, v, among, AttentionOptions(scale=0.3))
    torch.testing.assert_close(out[seen].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[seen].double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_half_precision_can_return_fp32(name: str, dtype: torch.dtype) -> None:
    rows = RaggedRows.build(*np.array([[50, 0, 60, 11]]).T)
    q, k, v = (torch.randn(n, 2, 16).to(dtype) for n in (50, 60, 60))
    options = AttentionOptions(scale=0.25)
    precise, _ = BACKENDS[name].run(q, k, v, rows, options, torch.float32)
    rounded, _ = BACKENDS[name].run(q, k, v, rows, options, dtype)
    expected, _ = brute_force(q, k, v, rows, options)
    assert precise.dtype == torch.float32
    assert rounded.dtype == dtype
    assert relative_rmse(precise, expected) < 1e-6 < torch.finfo(dtype).eps / 10 < relative_rmse(rounded, expected)


def test_auto_has_those_that_can_serve_and_says_why() -> None:
    assert [backend.name for backend in able_backends("auto", problem(), CAUSAL)] == ["cpu", "reference"]
    assert [backend.name for backend in able_backends("auto", problem(window=3), CAUSAL)] == ["reference"]
    assert [backend.name for backend in able_backends("auto", problem(dtype=torch.float64), CAUSAL)] == ["reference"]
    reasons = explain_backends(problem(window=3), CAUSAL)
    assert reasons["cpu"] == "it has no sliding window"
    assert reasons["reference"] == "able"
    plain = explain_backends(problem(), CAUSAL)
    assert plain | {"cpu": "able", "reference": "able"} == plain
    assert plain["flash_attn4"] == "it runs on cuda tensors, not on cpu ones"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window": 3}, "it has no sliding window"),
        ({"softcap": 3.0}, "it has no softcap"),
        ({"dtype": torch.float64}, "it takes bfloat16, float16, float32, not float64"),
        ({"device": torch.device("cuda", 0)}, "it runs on cpu tensors, not on cuda ones"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_explicit_choice_never_falls_back(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"backend='cpu' cannot serve this call: {reason}; .*'reference'.* could"):
        able_backends("cpu", problem(**changes), CAUSAL)
