"""Calls of ranks that each have the queries of their heads for all tokens, and what they give together."""

from __future__ import annotations

from typing import Any

import torch
from inputs.cases import AttentionCase
from torch import Tensor

import cpattn


def heads_of(x: Tensor, group: cpattn.Transport) -> Tensor:
    """A rank's share of the heads, which lie along axis 1."""
    return x.chunk(group.size, dim=1)[group.rank].contiguous()


def call(case: AttentionCase, meta: cpattn.CPMetadata, group: cpattn.Transport, written: bool = False, **options: Any) -> Any:
    """A rank's call, its padding full of NaN: out and LSE of its heads. Where the new tokens are ``written`` already, ``attend``."""
    plan = meta.plan
    q, k, v = (cpattn.shard(x, meta) for x in (heads_of(case.q, group), case.k, case.v))
    assert torch.equal(q[: plan.num_tokens], heads_of(case.q, group))
    for x in (q, k, v):
        x[plan.num_tokens :] = torch.nan
    pages = case.pages(plan, meta.cp_rank, max_requests=meta.bucket.max_requests if meta.bucket else None)
    # What others hold is not looked at.
    slots = cpattn.slot_mapping(meta, pages.cache.page_table, case.page_size)
    k[slots < 0], v[slots < 0] = torch.nan, torch.nan
    if case.v_in_k:
        options |= {"v_dim": case.v.shape[2]}
    sinks = case.options["sinks"]
    options |= case.options | {"sinks": None if sinks is None else sinks.chunk(group.size)[group.rank], "group": group, "return_lse": True}  # type: ignore[attr-defined]
    if written:
        cpattn.write_kv(k, None if case.v_in_k else v, pages.cache, slots)
        out, lse = cpattn.attend(q, pages.cache, meta, **options)
    else:
        out, lse = cpattn.cp_attention(q, k, None if case.v_in_k else v, meta, kv_cache=pages.cache, **options)
    pages.check_written()
    assert (out[plan.num_tokens :] == 0).all()
    assert (lse[plan.num_tokens :] == -torch.inf).all()
    return [cpattn.unshard(x, meta, group=group)[: plan.num_tokens] for x in (out, lse)]


def check(case: AttentionCase, plan: cpattn.Plan, outputs: list[Any], backend: str = "reference") -> None:
    out, lse = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
    case.check([(out, lse)], plan, "helix", backend)
