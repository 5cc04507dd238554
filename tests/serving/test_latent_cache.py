"""Multi-head latent attention, as in DeepSeek models: V is a part of K, so that the latent is sent and kept once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from inputs.cases import AttentionCase

import cpattn
from cpattn.exchange.registry import find_strategy
from cpattn.testing import run_loopback

BATCH = [(0, 19), (35, 6), (9, 0), (23, 1)]


def absorbed(cache: str, dtype: torch.dtype = torch.bfloat16) -> AttentionCase:
    """Queries over the latent itself: one KV head of 512 + 64 columns, of which V is the first 512."""
    return AttentionCase(BATCH, heads=4, kv_heads=1, head_dim=576, v_head_dim=512, v_in_k=True, cache=cache, dtype=dtype)


@pytest.mark.parametrize(
    ("strategy", "cache"),
    [
        ("all_gather", "packed"),
        ("all_gather", "paged"),
        ("ring", "packed"),
        ("ring", "paged"),
        ("ring", "sharded"),
        ("pass_q", "sharded"),
        ("pass_q_ring", "sharded"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_absorbed_form(strategy: str, cache: str, backend: str) -> None:
    case = absorbed(cache)
    case.check_loopback(case.plan(3, pad_to=4), strategy, backend)


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("cache", ["packed", "paged"])
def test_up_projected_form(strategy: str, cache: str) -> None:
    case = AttentionCase(BATCH, heads=2, kv_heads=2, head_dim=192, v_head_dim=128, cache=cache, dtype=torch.bfloat16)
    case.check_loopback(case.plan(2), strategy, "cpu")


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("strategy", "cache"),
    [
        ("all_gather", "packed"),
        ("all_gather", "paged"),
        ("ring", "paged"),
        ("ring", "sharded"),
        ("pass_q", "sharded"),
        ("pass_q_ring", "sharded"),
    ],
)
def test_the_latent_travels_once(strategy: str, cache: str, cp_size: int) -> None:
    """What travels, to the byte: 576 columns a token of keys; or queries, and fp32 results of 512 columns and an LSE."""
    case = absorbed(cache)
    plan = case.plan(cp_size)

    def program(communicator: cpattn.Communicator) -> int:
        meta = plan.metadata(communicator.rank)
        q, k = (cpattn.shard(x, meta) for x in (case.q, case.k))
        kv_cache = case.prefix if cache == "packed" else case.pages(plan, communicator.rank).cache
        cpattn.cp_attention(q, k, None, meta, v_dim=512, group=communicator, kv_cache=kv_cache, strategy=strategy)
        return communicator.bytes_sent

    latent, queries, results = 576 * 2, 4 * 576 * 2, 4 * (512 + 1) * 4
    sent = run_loopback(program, cp_size)
    if (strategy, cache) == ("ring", "sharded"):
        # Those that somebody's queries see.
        hops = find_strategy(strategy).schedule(case.problem(plan), plan)
        assert sent == np.sum([hop.sent for hop in hops], axis=0).tolist()
        assert all(nbytes % latent == 0 for nbytes in sent)
        return
    message = plan.rows * (queries + results if strategy.startswith("pass_q") else latent)
    assert set(sent) == {(cp_size - 1) * message}


def test_v_is_none_only_where_it_is_a_part_of_k() -> None:
    case = absorbed("packed")
    meta = cpattn.plan(case.batch, 1).metadata(0)
    wrong: list[Any] = [None, 0, 577, 512.0, True]
    for v_dim in wrong:
        with pytest.raises(cpattn.TensorMismatchError, match=r"v is None and v_dim=.*; where V is the first columns of K \(MLA\)"):
            cpattn.cp_attention(case.q, case.k, None, meta, v_dim=v_dim, kv_cache=case.prefix)
    with pytest.raises(cpattn.TensorMismatchError, match="v_dim=512, but v has head_dim 576; v_dim is for v=None"):
        cpattn.cp_attention(case.q, case.k, case.k, meta, v_dim=512, kv_cache=case.prefix)
    with pytest.raises(cpattn.PrefixError, match=r"of v and kv_cache.v one is None and the other is not; both are None where V is"):
        cpattn.cp_attention(case.q, case.k, None, meta, v_dim=512, kv_cache=cpattn.PackedKV(case.prefix_k, case.prefix_v))
