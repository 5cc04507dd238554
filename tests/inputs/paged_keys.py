"""Keys of several requests in shuffled pages, for tests of kernels that read those."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cpattn.attention.ragged_rows import RaggedRows


def in_pages(
    k: Tensor, v: Tensor, rows: RaggedRows, lens: list[int], page_size: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, RaggedRows]:
    """The keys of requests that lie one after the other in k and v, in shuffled pages; unused places are NaN, as are
    keys that no row of the request reads, and unused entries of the table garbage."""
    rng = np.random.default_rng(seed)
    counts = [-(-length // page_size) for length in lens]
    num_pages = sum(counts) + 3
    shuffled = rng.permutation(num_pages)
    table = np.full((len(lens), max(counts) + 2), [-1, 2**30][seed % 2])
    heads = k.shape[1]
    # K and V of a page side by side, as some engines have them, and a head that is not ours.
    pages = torch.full((num_pages, 2, page_size, heads + 1, max(k.shape[2], v.shape[2])), torch.nan, dtype=k.dtype, device=k.device)
    k_pages, v_pages = pages[:, 0, :, 1:, : k.shape[2]], pages[:, 1, :, 1:, : v.shape[2]]
    begin = used = 0
    for request, (length, count) in enumerate(zip(lens, counts, strict=True)):
        table[request, :count] = shuffled[used : used + count]
        used += count
        for s in range(length):
            k_pages[table[request, s // page_size], s % page_size] = k[begin + s]
            v_pages[table[request, s // page_size], s % page_size] = v[begin + s]
        begin += length
    host = rows.host
    at_zero = RaggedRows.build(host.q_len, np.zeros_like(host.k_start), host.k_len, host.diagonal, k.device, host.request)
    return k_pages, v_pages, at_zero.with_pages(torch.from_numpy(table).to(k.device, dtype), k_pages.shape[1])


def make_case(lens: list[int], q_len: list[int], request: list[int], see: list[int], device: str) -> RaggedRows:
    """Rows of queries against the first ``see`` keys of their request, bottom right."""
    starts = np.cumsum(lens) - np.array(lens)
    k_len = np.array(see)
    return RaggedRows.build(np.array(q_len), starts[request], k_len, k_len - np.array(q_len) + 1, device, np.array(request))
