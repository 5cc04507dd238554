"""First chunks over pages that every rank holds whole: where it is estimated to be faster to write these after the attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cpattn
from cpattn.costs.order_or_pages import is_order_faster
from cpattn.machine import H100, KernelCosts

KERNELS = {kernel.backend: kernel for kernel in H100.kernels}
LONG = [(0, 65536)]


def problem_of(plan: cpattn.Plan, **changes: Any) -> cpattn.Problem:
    """Of a layer of Qwen3-0.6B over nano-vllm's pages."""
    sizes: dict[str, Any] = {"q_heads": 16, "kv_heads": 8, "head_dim": 128, "v_head_dim": 128, "cache": "paged", "page_size": 256}
    return cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, **sizes | changes)


def after(batch: list[tuple[int, int]], cp_size: int = 2, kernel: str | None = "flash_attn3", reads: bool = True, **changes: Any) -> bool:
    plan = cpattn.plan(batch, cp_size, partition=changes.pop("partition", "zigzag"))
    costs: KernelCosts | None = KERNELS.get(kernel or "")
    return is_order_faster(problem_of(plan, **changes), plan, H100, costs, reads)


def test_where_a_kernel_is_slower_over_pages_than_it_takes_to_put_keys_in_order() -> None:
    assert after(LONG)
    assert after([(0, 65536), (500, 0)])
    # So short that it takes longer, or seen through a window.
    assert not after([(0, 2048)])
    assert not after(LONG, window=512)
    # What is read as it lies is put nowhere; of a request that is cut a rank's rows do not follow each other, though none may travel.
    assert after([(0, 64)], cp_size=1)
    assert not after([(0, 64)], window=1)
    assert after([(0, 512)] * 4, partition="whole", window=1)
    assert after([(0, 512)] * 4, partition="whole")
    # Cached keys lie in pages alone, and a bucket's next batch may have some.
    assert not after([(0, 65536), (1, 1)])
    assert not after(LONG, fixed=True)
    assert not after(LONG, cache=None, page_size=None)


def test_which_kernels_are_slower_over_pages() -> None:
    for cp_size in (1, 2):
        assert not after(LONG, cp_size, kernel="triton")
        assert not after(LONG, cp_size, kernel="flash_attn4")
        # Nobody knows it of a caller's own, unless it reads no pages and would be given a copy.
        assert not after(LONG, cp_size, kernel=None)
        for kernel in ("flash_attn4", None):
            assert after([(0, 64)], cp_size, kernel=kernel, reads=False)
    # Of what a rank needs alone, a copy is less than all new keys in order.
    assert not after([(0, 8192)] * 8 + [(0, 12000)], 4, kernel=None, reads=False, partition="whole")


@pytest.mark.parametrize("partition", ["zigzag", "whole"])
def test_estimates_are_of_keys_in_order(partition: str) -> None:
    """Beside no pages: they are written, which takes no longer in between."""
    plan, copied = cpattn.plan([(0, 16384)] * 4, 2, partition=partition), 4 * 16384
    found = {
        cache: {
            (one.transport, one.backend): one
            for one in cpattn.estimate(plan, problem_of(plan, cache=cache, page_size=cache and 256), H100)
            if one.strategy == "all_gather" and one.overlap == 1
        }
        for cache in (None, "paged")
    }
    for transport in ("collectives", "peer_memory"):
        pages, none = (found[cache][transport, "flash_attn3"] for cache in ("paged", None))
        assert pages.compute == pytest.approx(none.compute)
        key_bytes = problem_of(plan).key_bytes
        written = pages.moves - none.moves
        if partition == "zigzag":
            assert written == pytest.approx(H100.launch + 2 * copied * key_bytes / H100.copy)
        # As little as any kernel does that attends to pages; one that does not wait for keys.
        in_pages = found["paged"][transport, "flash_attn4"]
        put = 0.0 if partition == "whole" else H100.launch + 2 * copied * key_bytes / H100.copy
        assert pages.moves == pytest.approx(in_pages.moves + put)
        assert pages.exposed == in_pages.exposed
