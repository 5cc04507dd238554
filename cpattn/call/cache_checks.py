"""What cp_attention refuses of a KV cache: one that does not go with the plan and the new keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cpattn.call.checks import check_no_grad
from cpattn.call.page_checks import check_lines, check_page_shapes, check_page_table
from cpattn.call.stored_checks import check_pages_like, check_scales, fits, sizes_rule
from cpattn.call.tensor_kinds import check_kind, in_words
from cpattn.errors import HeadCountError, PrefixError, TensorMismatchError, UnsupportedError
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.stored import HALF


def check_cache(kv_cache: Any, k: Tensor, v: Tensor | None, meta: CPMetadata, own_heads: int | None = None) -> None:
    """
    Args:
        own_heads: how many KV heads a cache may have in the place of all, where the call's strategy divides them.
    """
    needed = meta.plan.num_prefix_tokens
    if kv_cache is None:
        if meta.plan.sharded:
            raise PrefixError(
                f"the plan has {meta.plan.sharded_by}, but kv_cache is None; pass this rank's pages: PagedKV(k_pages, v_pages, page_table)"
            )
        if needed:
            raise PrefixError(
                f"the batch has {needed} prefix tokens, but kv_cache is None; pass kv_cache=PackedKV(k, v) with those tokens, "
                "or PagedKV(k_pages, v_pages, page_table)"
            )
        return
    if isinstance(kv_cache, PagedKV):
        check_page_shapes(kv_cache)
        check_pages_like("kv_cache.k_pages", kv_cache.k_pages, "k", k, own_heads)
        if (kv_cache.v_pages is None) != (v is None):
            raise PrefixError("of v and kv_cache.v_pages one is None and the other is not; both are None where V is a part of K")
        if v is not None and kv_cache.v_pages is not None:
            check_pages_like("kv_cache.v_pages", kv_cache.v_pages, "v", v, own_heads)
            _check_same_heads("kv_cache.k_pages", kv_cache.k_pages, "kv_cache.v_pages", kv_cache.v_pages)
        check_scales(kv_cache)
        check_lines(kv_cache, meta)
        check_page_table(kv_cache.page_table, kv_cache.page_size, meta)
    elif isinstance(kv_cache, PackedKV):
        _check_packed(kv_cache, k, v, meta, own_heads)
    else:
        raise PrefixError(
            f"kv_cache is a {type(kv_cache).__name__}; pass a PackedKV(k, v) with the batch's {needed} prefix tokens, or a "
            "PagedKV(k_pages, v_pages, page_table)"
        )


def _check_packed(cache: PackedKV, k: Tensor, v: Tensor | None, meta: CPMetadata, own_heads: int | None) -> None:
    needed = meta.plan.num_prefix_tokens
    if meta.plan.sharded:
        raise PrefixError(
            f"the plan has {meta.plan.sharded_by}, but kv_cache is a PackedKV, which every rank has whole; pass this rank's pages: PagedKV"
        )
    if meta.bucket is not None and (needed or len(cache.k)):
        raise PrefixError("a PackedKV changes in size from batch to batch, and a bucket's graph cannot; pass a PagedKV")
    if (cache.v is None) != (v is None):
        raise PrefixError("of v and kv_cache.v one is None and the other is not; both are None where V is a part of K")
    for name, cached, new in (("k", cache.k, k), ("v", cache.v, v)):
        if new is None:
            continue
        if not isinstance(cached, Tensor) or cached.ndim != 3:
            raise PrefixError(f"kv_cache.{name} {in_words(cached)}; pass a tensor [prefix tokens, heads, head_dim]")
        check_kind(f"kv_cache.{name}", cached)
        if cached.shape[0] != needed:
            raise PrefixError(
                f"kv_cache.{name} has {cached.shape[0]} rows, but the batch has {needed} prefix tokens ({len(meta.plan.batch)} requests); "
                "pack the prefix of every request, request after request, without padding, the same on every rank"
            )
        _check_like(f"kv_cache.{name}", cached, name, new, own_heads)
        check_no_grad(**{f"kv_cache.{name}": cached})
    if cache.v is not None:
        _check_same_heads("kv_cache.k", cache.k, "kv_cache.v", cache.v)


def _check_same_heads(k_name: str, k: Tensor, v_name: str, v: Tensor) -> None:
    """Of a cache that may have all heads or a rank's own."""
    if k.shape[-2] != v.shape[-2]:
        raise HeadCountError(f"{k_name} has {k.shape[-2]} heads, {v_name} has {v.shape[-2]}; they must have the same")


def _check_like(name: str, cached: Tensor, new_name: str, new: Tensor, own_heads: int | None) -> None:
    if cached.dtype != new.dtype and (cached.dtype.itemsize == 1 or cached.dtype in HALF):
        raise UnsupportedError(
            f"{name} is {cached.dtype}, but {new_name} is {new.dtype}; a PackedKV is in {new_name}'s dtype, and pages alone may be in "
            "another: fp8 with scales, bf16 or fp16"
        )
    if cached.dtype != new.dtype or not fits(cached, new, own_heads):
        raise TensorMismatchError(
            f"{name} is {tuple(cached.shape)} {cached.dtype} on {cached.device}, but {new_name} is {tuple(new.shape)} "
            f"{new.dtype} on {new.device}; {sizes_rule('heads, head_dim, dtype and device must be the same', cached, new, own_heads)}"
        )
