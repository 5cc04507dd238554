"""The strategy that the docs write is exact over real processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from inputs.first_strategy import attend, ulysses
from torch import Tensor

import cpattn
from cpattn.testing import ProcessRanks

# Half of the features each.
OPTIONS: list[dict[str, Any]] = [{"sinks": True}, {"window": 7, "softcap": 5.0, "v_head_dim": 8}]


def case_and_plan(size: int, options: dict[str, Any]) -> tuple[AttentionCase, cpattn.Plan]:
    case = AttentionCase([(0, 61), (0, 1), (0, 0), (0, 30)], heads=24, kv_heads=12, **options)
    return case, cpattn.plan(case.batch, size, pad_to=8)


@pytest.mark.parametrize("size", [2, 4])
def test_it_is_exact(size: int) -> None:
    for options in OPTIONS:
        case, plan = case_and_plan(size, options)
        case.check_loopback(plan, ulysses(), "reference")


def test_it_is_exact_over_gloo() -> None:
    with ProcessRanks(3) as ranks:
        for options in OPTIONS:
            case, plan = case_and_plan(3, options)
            case.check(ranks.run(attend, case, plan, "reference"), plan, ulysses(), "reference")


def test_it_says_what_it_cannot_serve() -> None:
    meta = cpattn.build_metadata([(0, 6)], 2, 0)
    case = AttentionCase([(0, 6)], heads=3, kv_heads=3)
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    with pytest.raises(
        cpattn.UnsupportedError, match="strategy='ulysses' cannot serve this call: it divides heads among ranks, and 3/3 do"
    ):
        cpattn.cp_attention(q, k, v, meta, group=cpattn.testing.SoloCommunicator(0, 2), strategy=ulysses())


def test_what_a_rank_fails_to_compute_comes_out_as_nan() -> None:
    """Also with a kernel that says of NaN what it says of a query without keys."""
    plan, strategy = cpattn.plan([(0, 12)], 2), ulysses()

    def kernel_of_nan(*arguments: Any, **more: Any) -> tuple[Tensor, Tensor]:
        out, lse = cpattn.BACKENDS["reference"].attend(*arguments, **more)
        return out, torch.where(lse.isnan(), -torch.inf, lse)

    kernel = replace(cpattn.BACKENDS["reference"], name="own", attend=kernel_of_nan, propagates_nan=False)

    def no_forward(*arguments: Any) -> None:
        raise ZeroDivisionError

    def program(group: cpattn.Transport) -> None:
        meta, x = plan.metadata(group.rank), torch.randn(6, 2, 8)
        if group.rank == 0:
            failing = replace(strategy, forward=no_forward)
            with pytest.raises(ZeroDivisionError):
                cpattn.cp_attention(x, x, x, meta, group=group, strategy=failing, backend=kernel)
            return
        out, lse = cpattn.cp_attention(x, x, x, meta, group=group, strategy=strategy, backend=kernel, return_lse=True)
        assert out.isnan().all()
        assert lse.isnan().all()

    cpattn.testing.run_loopback(program, 2, timeout=10)
