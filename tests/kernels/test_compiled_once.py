"""What changes from batch to batch compiles nothing anew: each form of the attention kernels takes seconds."""

from __future__ import annotations

import pytest
import torch
from inputs.paged_keys import in_pages, make_case
from inputs.ragged_inputs import compiled_only, make_qkv
from inputs.stored_inputs import BF16, E4M3, options_of, stored_keys

from cpattn.keys import Keys

pytest.importorskip("triton")
from cpattn.kernels import ragged_attention as module
from cpattn.kernels.ragged_attention import ragged_attention, specialized_kernel


@compiled_only
@pytest.mark.parametrize("stored", [BF16, E4M3])
def test_page_tables_of_any_width_and_requests_of_any_number(stored: torch.dtype) -> None:
    """A table is as wide as the longest request of a batch: one page, a multiple of 16, and others."""
    hopper = specialized_kernel(torch.device("cuda"))
    launcher = module._attention if hopper is None else hopper._attention
    counts = []
    for longest, requests in ((16, 3), (16 * 5, 1), (16 * 14, 2), (16 * 30, 17)):
        lens = [longest - i for i in range(requests)]
        rows = make_case(lens, [1] * requests, list(range(requests)), lens, "cuda")
        q, k, v = make_qkv(rows, sum(lens), (8, 8), (128, 128), BF16, "cuda", 1)
        keys = stored_keys(k, v, stored, "head" if stored == E4M3 else "none")
        # Two entries more than pages, so that widths are 3, 7, 16 and 32.
        k_pages, v_pages, paged = in_pages(keys.k, keys.v, rows, lens, 16, torch.int32, 5)
        given = Keys(k_pages, v_pages, paged.page_table, keys.k_scale, keys.v_scale)
        ragged_attention(q, given, paged, options_of({}, q.device))
        counts.append(len(launcher.compiled))
    assert len(set(counts)) == 1, counts
