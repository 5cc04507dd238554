from __future__ import annotations

import pytest
import torch

from cpattn.attention.merge import apply_sinks_, merge_, torch_merge_all_

INF = torch.inf


def partial(rows: int, lse: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, 8), torch.full((rows, 2), lse)


@pytest.mark.parametrize("lse", [-INF, -1e4, 0.0, 88.0, 1e4])
def test_merging_rows_without_keys_changes_nothing(lse: float) -> None:
    acc, acc_lse = partial(3, lse)
    before, before_lse = acc.clone(), acc_lse.clone()
    if lse == -INF:
        acc.zero_()
        before.zero_()
    merge_(acc, acc_lse, torch.zeros(3, 2, 8), torch.full((3, 2), -INF))
    assert torch.equal(acc, before)
    assert torch.equal(acc_lse, before_lse)


def test_merging_into_nothing_is_a_copy() -> None:
    out, lse = partial(3, 2.5)
    acc, acc_lse = torch.zeros(3, 2, 8), torch.full((3, 2), -INF)
    merge_(acc, acc_lse, out, lse)
    assert torch.equal(acc, out)
    assert torch.equal(acc_lse, lse)


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_any_order_gives_the_softmax_over_all(offset: float) -> None:
    scores = torch.randn(5, 2, 40, dtype=torch.float64) * 3 + offset
    values = torch.randn(40, 8, dtype=torch.float64)
    expected = torch.softmax(scores, -1) @ values
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        acc, acc_lse = torch.zeros(5, 2, 8, dtype=torch.float64), torch.full((5, 2), -INF, dtype=torch.float64)
        for part in order:
            keys = slice(10 * part, 10 * part + 10)
            merge_(acc, acc_lse, torch.softmax(scores[..., keys], -1) @ values[keys], scores[..., keys].logsumexp(-1))
        torch.testing.assert_close(acc, expected)
        torch.testing.assert_close(acc_lse, scores.logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_partials_are_taken(dtype: torch.dtype) -> None:
    out, lse = partial(3, 1.0)
    acc, acc_lse = torch.zeros(3, 2, 8), torch.full((3, 2), -INF)
    merge_(acc, acc_lse, out.to(dtype), lse)
    assert torch.equal(acc, out.to(dtype).float())


def test_a_sink_is_one_more_logit_without_a_value() -> None:
    scores, values, sinks = torch.randn(5, 2, 9), torch.randn(9, 8), torch.tensor([0.5, 30.0])
    out, lse = torch.softmax(scores, -1) @ values, scores.logsumexp(-1)
    apply_sinks_(out, lse, sinks)
    logits = torch.cat([scores, sinks[:, None].expand(5, 2, 1)], -1)
    torch.testing.assert_close(out, torch.softmax(logits, -1)[..., :9] @ values)
    torch.testing.assert_close(lse, logits.logsumexp(-1))


def test_a_sink_alone_gives_its_logit_and_no_value() -> None:
    out, lse = torch.zeros(1, 2, 8), torch.full((1, 2), -INF)
    apply_sinks_(out, lse, torch.tensor([0.5, -3.0]))
    assert (out == 0).all()
    assert lse.tolist() == [[0.5, -3.0]]


def test_all_at_once_is_one_after_the_other() -> None:
    out, lse = torch.randn(5, 4, 2, 8, dtype=torch.float64), torch.randn(5, 4, 2, dtype=torch.float64) * 4
    lse[torch.rand(5, 4, 2) < 0.3] = -INF
    out[lse == -INF] = torch.nan
    acc, acc_lse = torch.randn(4, 2, 8, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    acc_lse[1] = -INF
    acc[1] = 0
    want, want_lse = acc.clone(), acc_lse.clone()
    for part in range(5):
        merge_(want, want_lse, out[part], lse[part])
    torch_merge_all_(acc, acc_lse, out, lse)
    torch.testing.assert_close(acc, want)
    torch.testing.assert_close(acc_lse, want_lse)


def test_no_parts_change_nothing() -> None:
    acc, acc_lse = partial(3, 1.0)
    before, before_lse = acc.clone(), acc_lse.clone()
    torch_merge_all_(acc, acc_lse, torch.empty(0, 3, 2, 8), torch.empty(0, 3, 2))
    assert torch.equal(acc, before)
    assert torch.equal(acc_lse, before_lse)
