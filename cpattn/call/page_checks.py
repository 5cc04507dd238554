"""What is refused of the form of pages and of their table: it follows from types, shapes, dtypes and strides alone.

What is in them is looked at in :mod:`cpattn.call.page_contents`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpattn.call.checks import check_device, check_heads, check_no_grad, check_together, head_shares
from cpattn.call.fp8_queries import check_fp8_queries
from cpattn.call.layout_hints import hint_head_major, hint_pages
from cpattn.call.memory_overlap import overlaps_itself
from cpattn.call.stored_checks import check_scales, check_scales_writable, check_stored_dtype
from cpattn.call.tensor_kinds import check_kind, in_words
from cpattn.errors import HeadCountError, PageTableError, PrefixError, TensorMismatchError
from cpattn.kv_cache import PagedKV
from cpattn.metadata.batch import IntArray, is_integer
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout


def check_page_shapes(cache: PagedKV) -> None:
    """The kind and shape of the pages alone."""
    for name, x in _pages(cache):
        check_kind(name, x)
        if not isinstance(x, Tensor) or x.ndim != 4 or 0 in x.shape[1:]:
            hint = hint_pages(x) if isinstance(x, Tensor) else ""
            raise PageTableError(f"{name} {in_words(x)}; pass a tensor [num_pages, page_size, heads, head_dim]{hint}")
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise PageTableError(f"{name} has strides {x.stride()}; the last must be 1, as rows are written in place")
        if x.shape[:2] != cache.k_pages.shape[:2]:
            raise PageTableError(
                f"k_pages has {tuple(cache.k_pages.shape[:2])} pages of tokens, v_pages {tuple(x.shape[:2])}; they must agree"
            )
        check_no_grad(**{name: x})


def check_writable(cache: PagedKV) -> None:
    """Of pages and scales whose form is right: that they can be written, each element by itself."""
    check_scales_writable(cache)
    for name, x in _pages(cache):
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise PageTableError(
                f"{name} was made under torch.inference_mode(), and cannot be written outside of it; make the pages before "
                "entering that mode, or make this call within it"
            )
        if overlaps_itself(x):
            raise PageTableError(
                f"{name} has shape {tuple(x.shape)} and strides {x.stride()}, so that several tokens lie in the same memory and overwrite "
                "each other; pass pages with an element of memory for each, such as x.contiguous() of this expanded view"
            )


def _pages(cache: PagedKV) -> list[tuple[str, Tensor]]:
    k_pages = ("kv_cache.k_pages", cache.k_pages)
    return [k_pages] if cache.v_pages is None else [k_pages, ("kv_cache.v_pages", cache.v_pages)]


def parse_page_size(page_size: Any) -> int:
    """The tokens of a page as a plain int: one of numpy may be too narrow for numbers of slots."""
    if not is_integer(page_size) or page_size < 1:
        raise PageTableError(f"page_size={page_size!r}; pass the number of tokens of a page, an integer of at least 1")
    return int(page_size)


def check_page_table(table: Any, page_size: int, meta: CPMetadata) -> None:
    """The form of a page table and that it is wide enough, on every rank alike."""
    check_kind("kv_cache.page_table", table)
    if not isinstance(table, Tensor) or table.ndim != 2 or table.dtype not in (torch.int32, torch.int64):
        what = f"is {tuple(table.shape)} {table.dtype}" if isinstance(table, Tensor) else f"is a {type(table).__name__}"
        raise PageTableError(f"kv_cache.page_table {what}; pass an int32 or int64 tensor [num_requests, max_pages]")
    check_device("kv_cache.page_table", table, meta)
    requests = len(meta.plan.batch) if meta.bucket is None else meta.bucket.max_requests
    if table.shape[0] < requests:
        what = "batch" if meta.bucket is None else "bucket"
        raise PageTableError(f"kv_cache.page_table has {table.shape[0]} lines, one a request, but the {what} has {requests} requests")
    lengths = _most_held(meta)
    fits = table.shape[1] * page_size
    if len(lengths) and int(lengths.max()) > fits:
        request = int(lengths.argmax())
        raise PageTableError(
            f"kv_cache.page_table has {table.shape[1]} pages of {page_size} tokens for each request, {fits} in all, but request "
            f"{request} has {int(lengths[request])} with its new ones"
            f"{', on the rank that holds most of it' if meta.plan.sharded else ''}; widen the table"
        )


def _most_held(meta: CPMetadata) -> IntArray:
    """The tokens that pages hold of each request after the call, on the rank that holds the most."""
    plan: Layout = meta.plan
    most: IntArray = plan.held_lens.max(axis=1, initial=0) if plan.sharded else plan.total_lens
    return most


def check_lines(cache: PagedKV, meta: CPMetadata) -> None:
    """What a KVPool says of the lines of its own table: whose tokens they hold, and of how many each has pages here.

    A line may hold more than the plan speaks of, where further steps are planned already.
    """
    lines, plan = cache.lines, meta.plan
    if lines is None:
        return
    if lines.sharded and not plan.sharded:
        raise PrefixError(
            "kv_cache comes from a sharded KVPool, but the plan has no prefix_shards and no owner, so that it takes every rank's pages for "
            "whole; let pool.plan make the plan of each step"
        )
    if plan.sharded and not lines.sharded:
        raise PrefixError(
            f"kv_cache comes from a KVPool in which every rank has all tokens, but the plan has {plan.sharded_by}; let pool.plan make the "
            "plan of each step, or make the pool with an owner"
        )
    if lines.owner != plan.owner:
        raise PrefixError(
            f"kv_cache comes from a KVPool with owner={lines.owner or 'computed'!r}, but the plan has {plan.sharded_by}; let "
            "pool.plan make the plan of each step"
        )
    # Of all ranks, so that all refuse alike.
    needed = plan.held_lens if plan.sharded else plan.total_lens[:, None]
    # Where lines are missing, the check of the table's form says so.
    needed, held = needed[: len(lines.tokens)], lines.tokens[: len(needed)]
    if held.shape != needed.shape:
        raise PrefixError(
            f"kv_cache comes from a KVPool of {held.shape[1]} ranks, but the plan has cp_size={plan.cp_size}; let pool.plan make the plan "
            "of each step"
        )
    if (held < needed).any():
        line, rank = (int(place) for place in np.argwhere(held < needed)[0])
        raise PageTableError(
            f"line {line} of kv_cache.page_table has pages for {int(held[line, rank])} tokens{f' on rank {rank}' if plan.sharded else ''}, "
            f"but request {line} of the batch has {int(needed[line, rank])} with its new ones; name the requests to pool.page_table in the "
            "order of the plan, after pool.plan"
        )


def check_attend(q: Tensor, cache: Any, v_dim: Any, meta: CPMetadata, backend: Any) -> None:
    """Checks queries and pages that are attended to as they are, by the backend that was asked for."""
    _check_is_paged(cache)
    check_page_shapes(cache)
    check_heads("q", q, meta)
    heads = cache.k_pages.shape[2]
    if head_shares(meta) == 1 and q.shape[1] % heads and q.shape[1] % cache.k_pages.shape[1] == 0:
        raise HeadCountError(
            f"q has {q.shape[1]} heads, kv_cache.k_pages {tuple(cache.k_pages.shape)} has {heads}; query heads must be a multiple of "
            f"key/value heads{hint_head_major('kv_cache.k_pages')}"
        )
    check_no_grad(q=q)
    check_stored_dtype("kv_cache.k_pages", cache.k_pages.dtype, "q", q.dtype)
    check_scales(cache)
    check_fp8_queries(q, cache, backend, meta.plan.sharded)
    check_together(q, cache.k_pages, cache.v_pages, v_dim, head_shares(meta), in_one_dtype=False)
    check_lines(cache, meta)
    check_page_table(cache.page_table, cache.page_size, meta)


def check_write(k: Any, v: Any, cache: Any, slots: Any) -> None:
    """The form of what :func:`cpattn.write_kv` is given, and that it goes together."""
    _check_is_paged(cache)
    check_page_shapes(cache)
    check_scales(cache)
    check_writable(cache)
    if not isinstance(slots, Tensor):
        raise TensorMismatchError(f"slots is a {type(slots).__name__}; pass an int32 or int64 tensor [rows]")
    check_kind("slots", slots)
    for name, x, pages in (("k", k, cache.k_pages), ("v", v, cache.v_pages)):
        if (x is None) != (pages is None):
            raise TensorMismatchError(f"of {name} and kv_cache.{name}_pages one is None and the other is not")
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TensorMismatchError(f"{name} is a {type(x).__name__}; pass a tensor [rows, heads, head_dim]")
        check_kind(name, x)
        if x.ndim != 3 or x.shape[1:] != pages.shape[2:] or x.device != pages.device:
            raise TensorMismatchError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}, the pages are {tuple(pages.shape)} {pages.dtype} on {pages.device}; "
                "heads, head_dim and device must be the same"
            )
        if x.dtype != k.dtype:
            raise TensorMismatchError(f"k is {k.dtype}, v is {x.dtype}; both must be of one dtype")
        if x.dtype != pages.dtype:
            _check_converts(name, x, pages)
        elif cache.scales == "token":
            raise TensorMismatchError(
                f"{name} is {x.dtype}, in which the pages have a scale for each token and head; pass rows in bf16, fp16 or fp32, which are "
                "given their scales, or write rows and scales to the slots yourself"
            )
        check_no_grad(**{name: x})
        if slots.ndim == 1 and len(x) != len(slots):
            raise TensorMismatchError(
                f"{name} has {len(x)} rows, but there are {len(slots)} slots; pass a slot for each row, -1 to skip it"
            )
    if slots.dtype not in (torch.int32, torch.int64) or slots.ndim != 1 or slots.device != k.device:
        raise TensorMismatchError(
            f"slots is {tuple(slots.shape)} {slots.dtype} on {slots.device}; pass int32 or int64 [rows] on {k.device}"
        )


def _check_converts(name: str, x: Tensor, pages: Tensor) -> None:
    """That rows can be converted to the pages' dtype."""
    if not x.dtype.is_floating_point or x.dtype.itemsize == 1:
        raise TensorMismatchError(
            f"{name} is {x.dtype}, the pages are {pages.dtype}; pass rows in the pages' dtype, or in bf16, fp16 or fp32 to be converted"
        )
    check_stored_dtype(f"kv_cache.{name}_pages", pages.dtype, name, x.dtype)


def _check_is_paged(cache: Any) -> None:
    if not isinstance(cache, PagedKV):
        raise PrefixError(f"kv_cache is a {type(cache).__name__}; pass a PagedKV(k_pages, v_pages, page_table)")
