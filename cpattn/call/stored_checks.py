"""What is refused of the dtypes of pages and of their scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpattn.call.checks import check_no_grad
from cpattn.call.layout_hints import hint_head_major, is_head_major
from cpattn.call.memory_overlap import overlaps_itself
from cpattn.call.tensor_kinds import check_kind
from cpattn.errors import TensorMismatchError, UnsupportedError
from cpattn.kv_cache import PagedKV
from cpattn.stored import FP8, HALF, is_fp8

_FORMS = "one number [] or [1], one a KV head [{heads}], or one a token and head [{pages}, {page_size}, {heads}]"


def check_pages_like(name: str, pages: Tensor, new_name: str, new: Tensor, own_heads: int | None) -> None:
    """That pages can hold new keys or values.

    Args:
        own_heads: how many KV heads they may have in the place of all.
    """
    check_stored_dtype(name, pages.dtype, new_name, new.dtype)
    if not fits(pages, new, own_heads):
        hint = hint_head_major(name) if is_head_major(pages, new.shape[1]) else ""
        raise TensorMismatchError(
            f"{name} is {tuple(pages.shape)} {pages.dtype} on {pages.device}, but {new_name} is {tuple(new.shape)} {new.dtype} on "
            f"{new.device}; {sizes_rule('heads, head_dim and device must be the same', pages, new, own_heads)}{hint}"
        )


def fits(cached: Tensor, new: Tensor, own_heads: int | None) -> bool:
    """Whether a cache has the head dim and device of new keys or values, and their heads or a rank's own of them."""
    return cached.shape[-2] in (new.shape[-2], own_heads) and cached.shape[-1] == new.shape[-1] and cached.device == new.device


def sizes_rule(rule: str, cached: Tensor, new: Tensor, own_heads: int | None) -> str:
    """The rule, with what it says of a rank's own heads."""
    if own_heads not in (None, new.shape[-2]):
        return f"{rule}, or the heads those of this rank, which are {own_heads}"
    if own_heads is None and cached.shape[-1] == new.shape[-1] and new.shape[-2] > cached.shape[-2]:
        return f"{rule} (a cache of a rank's own heads is for strategies that divide them, such as 'ulysses')"
    return rule


def check_stored_dtype(name: str, stored: torch.dtype, new_name: str, new: torch.dtype) -> None:
    """That numbers of one dtype may be stored in another."""
    if stored == new or stored in HALF or is_fp8(stored):
        return
    if stored == torch.uint8:
        raise UnsupportedError(
            f"{name} is torch.uint8, bytes that do not say what they mean; pass a view as the engine reads them, such as "
            f"{name.rpartition('.')[2]}.view(torch.float8_e4m3fn), with k_scale= and v_scale="
        )
    if stored.is_floating_point and stored.itemsize == 1:
        known = " and ".join(map(str, FP8))
        raise UnsupportedError(f"{name} is {stored}; of fp8 pages may be in {known}")
    raise TensorMismatchError(
        f"{name} is {stored}, but {new_name} is {new}; pages are in {new_name}'s dtype, in bf16 or fp16, or in fp8 with scales"
    )


def check_scales(cache: PagedKV) -> None:
    """That pages in fp8 have scales of a form that there is, and others have none."""
    k, v = cache.k_pages, cache.v_pages
    if v is not None and v.dtype != k.dtype:
        raise TensorMismatchError(f"kv_cache.k_pages is {k.dtype}, v_pages {v.dtype}; both must be of one dtype")
    _check_scale("k", cache.k_scale, k, k)
    _check_scale("v", cache.v_scale, v, k)
    if cache.k_scale is not None and cache.v_scale is not None and (cache.k_scale.ndim == 3) != (cache.v_scale.ndim == 3):
        raise TensorMismatchError(
            f"kv_cache.k_scale has shape {tuple(cache.k_scale.shape)}, v_scale {tuple(cache.v_scale.shape)}; either both are of tokens and "
            "heads, or neither"
        )


def _check_scale(of: str, scale: Any, pages: Tensor | None, k_pages: Tensor) -> None:
    name = f"kv_cache.{of}_scale"
    if pages is None:
        if scale is not None:
            raise TensorMismatchError(f"{name} is given, but kv_cache.{of}_pages is None, where V is a part of K; k_scale is for both")
        return
    num_pages, page_size, heads, _ = k_pages.shape
    forms = _FORMS.format(pages=num_pages, page_size=page_size, heads=heads)
    if not is_fp8(pages.dtype):
        if scale is not None:
            raise TensorMismatchError(
                f"{name} is given, but kv_cache.{of}_pages is {pages.dtype}; scales are for pages in fp8: leave it out"
            )
        return
    if scale is None:
        raise TensorMismatchError(
            f"kv_cache.{of}_pages is {pages.dtype}, but {name} is None; pass {of}_scale=, what its numbers are multiplied by, fp32 on the "
            f"pages' device: {forms}. Where the engine stores numbers as they are: torch.ones(())"
        )
    check_kind(name, scale)
    if not isinstance(scale, Tensor):
        raise TensorMismatchError(f"{name} is a {type(scale).__name__}; pass an fp32 tensor on the pages' device: {forms}")
    if scale.dtype != torch.float32 or scale.device != pages.device:
        raise TensorMismatchError(
            f"{name} is {scale.dtype} on {scale.device}; it must be torch.float32 on the pages' device, {pages.device}"
        )
    if tuple(scale.shape) not in ((), (1,), (heads,), (num_pages, page_size, heads)):
        raise TensorMismatchError(f"{name} has shape {tuple(scale.shape)}; pass {forms}")


def check_scales_writable(cache: PagedKV) -> None:
    """Of scales whose form is right: that those of tokens can be written, each by itself."""
    if cache.scales != "token":
        return
    for name, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
        if scale is None:
            continue
        check_no_grad(**{f"kv_cache.{name}": scale})
        if overlaps_itself(scale) or (scale.is_inference() and not torch.is_inference_mode_enabled()):
            raise TensorMismatchError(
                f"kv_cache.{name} has a scale for each token and head, which calls write, but it is an expanded view, or was made under "
                "torch.inference_mode(); pass memory of its own, or one scale a head"
            )
