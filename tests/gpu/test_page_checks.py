"""What a page table and slots on a GPU hold is looked at with check=True, and not waited for without."""

from __future__ import annotations

import pytest
import torch
from inputs.cases import AttentionCase

import cpattn
from cpattn.testing import SoloCommunicator

BATCH = [(37, 18), (20, 9)]


def test_a_table_on_a_gpu_is_looked_at_with_check() -> None:
    case = AttentionCase(BATCH, head_dim=64, dtype=torch.bfloat16, device="cuda", cache="paged")
    plan = case.plan(1)
    meta = plan.metadata(0, "cuda")
    good = case.pages(plan, 0).cache
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    assert good.v_pages is not None
    one_page = cpattn.PagedKV(good.k_pages, good.v_pages, torch.zeros_like(good.page_table))
    far_page = cpattn.PagedKV(good.k_pages, good.v_pages, torch.full_like(good.page_table, 1000))
    k_is_v = cpattn.PagedKV(good.k_pages, good.k_pages, good.page_table)
    before = good.k_pages.clone()
    for cache, message in (
        (one_page, "into the same slot"),
        (far_page, "is 1000, but there are pages 0 to"),
        (k_is_v, "elements in common"),
    ):
        with pytest.raises(cpattn.PageTableError, match=message):
            cpattn.cp_attention(q, k, v, meta, group=SoloCommunicator(0, 1), kv_cache=cache, check=True)
        assert torch.equal(good.k_pages.nan_to_num(7.0), before.nan_to_num(7.0))
    with pytest.raises(cpattn.PageTableError, match="into the same slot"):
        cpattn.slot_mapping(meta, one_page.page_table, 16, check=True)
    with pytest.raises(cpattn.PageTableError, match="is 1000, but there are pages 0 to"):
        cpattn.attend(q, far_page, meta, check=True)
    slots = cpattn.slot_mapping(meta, good.page_table, 16, check=True)
    with pytest.raises(cpattn.PageTableError, match=r"slots\[0\] and slots\[\d+\] are both 3"):
        cpattn.write_kv(k, v, good, torch.full_like(slots, 3), check=True)
    cpattn.write_kv(k, v, good, slots, check=True)
    assert torch.isfinite(cpattn.attend(q, good, meta, check=True)).all()


def test_without_check_nothing_waits() -> None:
    case = AttentionCase(BATCH, head_dim=64, dtype=torch.bfloat16, device="cuda", cache="paged")
    plan = case.plan(1)
    meta = plan.metadata(0, "cuda")
    cache = case.pages(plan, 0).cache
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))

    def step() -> None:
        cpattn.write_kv(k, v, cache, cpattn.slot_mapping(meta, cache.page_table, 16))
        cpattn.attend(q, cache, meta, backend="triton")

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
