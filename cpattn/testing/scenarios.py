"""What strategies ask of a kernel, as small problems with names.

All head dims are ones that FlashAttention kernels take, too; lengths are primes where they may be anything, and some
ranges are longer than a tile of keys. Key ranges and diagonals are those of
:class:`cpattn.spans.Spans`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.device_tables import IntArray
from cpattn.keys import Keys
from cpattn.moves import torch_moves
from cpattn.moves.stored_rows import StoredRows
from cpattn.spans import Spans, SpanTable, find_alignment
from cpattn.stored import ScaleKind
from cpattn.testing.judge import Trial

# A span: queries, first key, keys, diagonal.
Span = tuple[int, int, int, int]

_UNCOVERED = 7  # keys after the last range
_GARBAGE = 2**30  # in the page table, beyond a request's pages


@dataclass(frozen=True)
class Scenario:
    """One trial; see :func:`make_trial`.

    Attributes:
        name: what it is about, for the report.
        spans: the work, which covers all of q.
        requests: whose pages each span reads; each its own if empty.
        parts: the same work in several launches, each over some of the keys; their results are merged.
        accumulate: whether the kernel itself merges the parts.
        heads, dims: (Hq, Hkv) and (D, Dv).
        v_in_k: whether v is a view of k's first columns.
        strided: whether q lies head after head, and k and v side by side.
        scale: of the scores; D ** -0.5 if None.
        page_size: of the pages that the keys lie in; None where they are packed.
        table: how the page table lies in memory: int32 and whole, int64, or columns of a wider one.
        scales: what scales of keys in fp8 belong to; None where keys are in q's dtype.
        shared_pool: whether the pages are ``pool[:, 0]`` and ``pool[:, 1]``, so that K and V of a page lie side by side.
        fixed: whether the spans are a bucket's, with room for longer ones.
        fp32_out: whether the result is asked for in fp32 whatever the inputs.
        nan_padding, nan_uncovered, nan_key: what holds NaN: queries of empty spans, keys of no span, one key that is seen.
        may_refuse: whether a kernel may lack this and raise, though it has no flag to say so.
    """

    name: str
    spans: tuple[Span, ...]
    requests: tuple[int, ...] = ()
    parts: tuple[tuple[Span, ...], ...] = ()
    accumulate: bool = False
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    v_in_k: bool = False
    strided: bool = False
    scale: float | None = None
    page_size: int | None = None
    table: Literal["int32", "int64", "sliced"] = "int32"
    shared_pool: bool = False
    scales: ScaleKind | None = None
    fixed: bool = False
    fp32_out: bool = False
    nan_padding: bool = False
    nan_uncovered: bool = False
    nan_key: int | None = None
    may_refuse: bool = False


_REQUEST: Span = (37, 0, 37, 1)
_RAGGED: tuple[Span, ...] = ((1, 0, 1, 1), (17, 1, 149, 133), (1, 150, 31, 31), (29, 181, 29, 1))
_WITH_EMPTY: tuple[Span, ...] = ((5, 0, 0, 0), (13, 3, 71, 59), (0, 9, 11, 12), (3, 40, 0, -2), (7, 2, 7, 1), (3, 0, 0, 0))
_PAST: tuple[Span, ...] = ((13, 0, 71, 71), (5, 7, 23, 40), (3, 0, 0, 0))
_ANY: tuple[Span, ...] = ((13, 0, 31, -4), (19, 3, 17, 5), (5, 0, 7, 9), (4, 20, 11, -9), (11, 1, 97, 60))
# A chunk of a request, its earlier keys on another rank; and a request that has no keys there.
_WHOLE: tuple[Span, ...] = ((23, 0, 84, 62), (7, 84, 7, 1))
_HALVES: tuple[tuple[Span, ...], ...] = (((23, 0, 61, 61), (7, 84, 0, 0)), ((23, 61, 23, 1), (7, 84, 7, 1)))
# In pages two chunks may belong to one request, and a request may have nothing.
_CACHED: tuple[Span, ...] = ((1, 0, 50, 50), (17, 0, 131, 115), (3, 0, 0, 0), (11, 0, 11, 1))
_CACHED_REQUESTS = (2, 0, 1, 2)

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("one request, causal", (_REQUEST,)),
    Scenario("LSE is natural, as [rows, Hq]", ((8, 0, 8, 1),), heads=(8, 8)),
    Scenario("ragged spans, some of one query", _RAGGED),
    Scenario("key ranges that overlap", ((13, 0, 79, 67), (7, 11, 41, 35), (5, 0, 5, 1))),
    Scenario("empty key ranges among others", _WITH_EMPTY),
    Scenario("spans of a bucket", _WITH_EMPTY, fixed=True),
    Scenario("all keys in the past", _PAST),
    Scenario("any diagonal", _ANY),
    Scenario("window", _RAGGED, window=11, may_refuse=True),
    Scenario("window, any diagonal", _ANY, window=11, may_refuse=True),
    Scenario("softcap", _RAGGED, softcap=2.0, may_refuse=True),
    Scenario("sinks", _RAGGED, sinks=True, may_refuse=True),
    Scenario("sinks beside empty key ranges", _WITH_EMPTY, sinks=True, may_refuse=True),
    Scenario("window, softcap and sinks", _RAGGED, window=11, softcap=2.0, sinks=True, may_refuse=True),
    Scenario("scale is not D ** -0.5", _RAGGED, scale=0.3),
    Scenario("a KV head for each query head", _RAGGED, heads=(8, 8)),
    Scenario("groups of 2 query heads", _RAGGED, heads=(8, 4), may_refuse=True),
    Scenario("groups of 8 query heads", _RAGGED, heads=(8, 1), may_refuse=True),
    Scenario("Dv is not D", _RAGGED, dims=(192, 128), may_refuse=True),
    Scenario("V is a view of K", _RAGGED, heads=(4, 1), dims=(192, 128), v_in_k=True, may_refuse=True),
    Scenario("strided q, k and v", _RAGGED, strided=True),
    *(Scenario(f"pages of {size}", _CACHED, _CACHED_REQUESTS, page_size=size) for size in (1, 16, 48, 64, 256)),
    Scenario("pages, int64 table", _CACHED, _CACHED_REQUESTS, page_size=64, table="int64"),
    Scenario("pages, sliced table", _CACHED, _CACHED_REQUESTS, page_size=64, table="sliced"),
    Scenario("pages of one pool", _CACHED, _CACHED_REQUESTS, page_size=64, shared_pool=True),
    Scenario("fp8 keys, scales of heads", _RAGGED, scales="head"),
    Scenario("fp8 in pages, scales of tokens", _CACHED, _CACHED_REQUESTS, page_size=16, scales="token"),
    Scenario("NaN in padding queries", _WITH_EMPTY, nan_padding=True),
    Scenario("NaN in keys of no range", ((17, 5, 71, 55), (7, 90, 7, 1), (1, 99, 29, 29)), nan_uncovered=True),
    Scenario("NaN in a key gives NaN", (_REQUEST,), nan_key=5),
    Scenario("out in fp32", _RAGGED, fp32_out=True),
    Scenario("merged halves are the whole", _WHOLE, parts=_HALVES),
    Scenario("merges by itself (accumulate)", _WHOLE, parts=_HALVES, accumulate=True),
)


def make_trial(scenario: Scenario, device: torch.device, dtype: torch.dtype) -> Trial:
    """The tensors of a scenario, the same every time, with NaN where it says."""
    generator = torch.Generator().manual_seed(0)
    table = np.array(scenario.spans, dtype=np.int64)
    num_queries, num_keys = int(table[:, 0].sum()), int((table[:, 1] + table[:, 2]).max()) + _UNCOVERED
    (heads, kv_heads), (head_dim, v_head_dim) = scenario.heads, scenario.dims
    q = torch.randn(num_queries, heads, head_dim, generator=generator)
    kv = torch.randn(num_keys, kv_heads, head_dim + v_head_dim, generator=generator)
    if scenario.nan_padding:
        q[torch.from_numpy(np.repeat(table[:, 2] == 0, table[:, 0]))] = torch.nan
    if scenario.nan_uncovered:
        key = np.arange(num_keys)[:, None]
        kv[torch.from_numpy(~((key >= table[:, 1]) & (key < table[:, 1] + table[:, 2])).any(axis=1))] = torch.nan
    if scenario.nan_key is not None:
        kv[scenario.nan_key, :, :head_dim] = torch.nan
    q, kv = q.to(device, dtype), kv.to(device, dtype)
    k, v = kv[..., :head_dim], kv[..., head_dim:]
    if scenario.strided:
        q = q.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        k, v = k.contiguous(), v.contiguous()
    if scenario.v_in_k:
        v = k[..., :v_head_dim]
    k, v, k_scale, v_scale = (k, v, None, None) if scenario.scales is None else _in_fp8(k, v, scenario.scales)
    requests = np.array(scenario.requests or range(len(table)))
    page_table = None
    if scenario.page_size is not None:
        lengths = [int(table[requests == request, 2].max()) for request in range(requests.max() + 1)]
        k, v, page_table = _in_pages(k, v, lengths, scenario.page_size)
        if k_scale is not None and v_scale is not None and scenario.scales == "token":
            scales = _in_pages(k_scale[..., None], v_scale[..., None], lengths, scenario.page_size)
            k_scale, v_scale = scales[0][..., 0], scales[1][..., 0]
        if scenario.shared_pool:
            k, v = torch.stack([k, v], dim=1).unbind(1)
        page_table = _laid_out(page_table, scenario)
    sinks = torch.randn(heads, generator=generator).to(device, torch.promote_types(dtype, torch.float32)) if scenario.sinks else None
    options = AttentionOptions(head_dim**-0.5 if scenario.scale is None else scenario.scale, scenario.window, scenario.softcap, sinks)
    spans = _spans(scenario.spans, requests, scenario.fixed, device)
    return Trial(
        q, Keys(k, v, page_table, k_scale, v_scale), spans, options, [_spans(part, requests, False, device) for part in scenario.parts]
    )


def _in_fp8(k: Tensor, v: Tensor, scales: ScaleKind) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K and V as they are stored, and their scales."""
    rows, heads = k.shape[:2]
    k_stored, v_stored = (torch.empty_like(x, dtype=torch.float8_e4m3fn) for x in (k, v))
    k_scale, v_scale = (torch.empty(rows, heads, device=k.device) for _ in range(2))
    if scales == "token":
        torch_moves.quantize(StoredRows(k_stored, v_stored, k_scale, v_scale), k, v, None, None)
    else:
        k_scale = torch.linspace(0.01, 0.02, heads, device=k.device)
        v_scale = k_scale.flip(0)
        torch_moves.quantize(StoredRows(k_stored, v_stored), k, v, k_scale, v_scale)
    return k_stored, v_stored, k_scale, v_scale


def _spans(spans: tuple[Span, ...], requests: IntArray, fixed: bool, device: torch.device) -> Spans:
    q_len, k_start, k_len, diagonal = np.array(spans, dtype=np.int64).T
    table = SpanTable(q_len, k_start, k_len, diagonal, requests, find_alignment(q_len, k_start, k_len, diagonal))
    longer = (2 * int(q_len.max()), 2 * int(k_len.max())) if fixed else None
    return Spans.build_all([table], device, longer)[0]


def _in_pages(k: Tensor, v: Tensor, lengths: list[int], page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first keys as each request's own, in pages of no order; NaN in slots that nobody uses, garbage in the table
    beyond a request's pages."""
    counts = [-(-length // page_size) for length in lengths]
    numbers = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(1))
    page_table = torch.full((len(lengths), max(counts) + 1), _GARBAGE, dtype=torch.int32)
    k_pages, v_pages = (x.new_full((len(numbers), page_size, *x.shape[1:]), torch.nan) for x in (k, v))
    taken = 0
    for request, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        page_table[request, :count] = numbers[taken : taken + count].int()
        taken += count
        # A request's keys begin at its own number, so that none has those of another.
        for number, (page, start) in enumerate(zip(page_table[request, :count].tolist(), range(0, length, page_size), strict=True)):
            used = min(page_size, length - number * page_size)
            k_pages[page, :used] = k[(torch.arange(start, start + used) + 31 * request) % len(k)]
            v_pages[page, :used] = v[(torch.arange(start, start + used) + 31 * request) % len(k)]
    return k_pages, v_pages, page_table.to(k.device)


def _laid_out(page_table: Tensor, scenario: Scenario) -> Tensor:
    if scenario.table == "sliced":
        wide = torch.full_like(page_table, _GARBAGE).repeat(1, 3)
        columns = wide[:, page_table.shape[1] : 2 * page_table.shape[1]]
        return columns.copy_(page_table)
    return page_table.to(torch.int64) if scenario.table == "int64" else page_table
