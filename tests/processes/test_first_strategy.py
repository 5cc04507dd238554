"""The strategy that the docs write is exact over real processes."""

from __future__ import annotations

import pytest
from cases import AttentionCase
from first_strategy import attend, ulysses

import cpattn
from cpattn.testing import ProcessRanks


@pytest.mark.parametrize("size", [2, 3, 4])
def test_it_is_exact_over_gloo(size: int) -> None:
    with ProcessRanks(size) as ranks:
        for options in ({"sinks": True}, {"window": 7, "softcap": 5.0, "v_head_dim": 8}):
            case = AttentionCase([(0, 61), (0, 1), (0, 0), (0, 30)], heads=24, kv_heads=12, **options)
            plan = cpattn.plan(case.batch, size, pad_to=8)
            case.check(ranks.run(attend, case, plan, "reference"), plan, ulysses(), "reference")


def test_it_says_what_it_cannot_serve() -> None:
    meta = cpattn.build_metadata([(0, 6)], 2, 0)
    case = AttentionCase([(0, 6)], heads=3, kv_heads=3)
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    with pytest.raises(
        cpattn.UnsupportedError, match="strategy='ulysses' can not serve this call: it divides heads among ranks, and 3/3 do"
    ):
        cpattn.cp_attention(q, k, v, meta, group=cpattn.testing.SoloCommunicator(0, 2), strategy=ulysses())
