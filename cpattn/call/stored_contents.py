"""What is refused of numbers that are to be stored in another dtype. It means reading them, and so waiting for a device that has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cpattn.errors import TensorMismatchError
from cpattn.kv_cache import PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.striped_places import kept_places
from cpattn.stored import largest


def check_fits(k: Tensor, v: Tensor | None, cache: PagedKV) -> None:
    """Of a call's tokens and pages that go together: that no number is larger than what the pages can hold."""
    _check_fits("k", k, cache.k_pages.dtype, cache.k_scale)
    if v is not None and cache.v_pages is not None:
        _check_fits("v", v, cache.v_pages.dtype, cache.v_scale)


def check_new_fit(k: Tensor, v: Tensor | None, cache: PagedKV, meta: CPMetadata) -> None:
    """The same of a call's new rows. Where each rank has all of them, those that others keep are not looked at."""
    rows: Tensor | slice = kept_places(meta)[0] >= 0 if meta.plan.all_queries else slice(meta.num_tokens)
    check_fits(k[rows], None if v is None else v[rows], cache)


def check_scales_of_heads(cache: PagedKV) -> None:
    """Of scales that an engine sets: that numbers can be divided and multiplied by them. (Those of tokens follow from the numbers.)"""
    if cache.scales != "head":
        return
    for name, rows, scale in (("k_scale", "keys", cache.k_scale), ("v_scale", "values", cache.v_scale)):
        if scale is not None and not (scale.isfinite() & (scale > 0)).all():
            raise TensorMismatchError(
                f"kv_cache.{name} is {scale.tolist()}; a scale is a positive, finite number: pass what {rows} were divided by as they were "
                "stored"
            )


def _check_fits(name: str, x: Tensor, stored: torch.dtype, scale: Tensor | None) -> None:
    if x.dtype == stored or not x.numel():
        return
    # NaN stays what it is.
    size = x.detach().abs().nan_to_num_(nan=0.0, posinf=math.inf).amax(dim=(0, 2)).double()
    if scale is not None and scale.ndim == 3:
        # It becomes that of the largest number, whatever that is.
        limits = torch.full_like(size, math.inf)
    else:
        factor = torch.ones_like(size) if scale is None else scale.detach().reshape(-1).double().expand_as(size)
        limits = _overflows_from(stored) * factor
    too_large = size >= limits
    if not too_large.any():
        return
    head = int(too_large.nonzero()[0])
    most, words, fix = largest(stored), "", f"pass pages in {x.dtype}, as {name} is"
    if size[head].isinf():
        fix = f"none of {name} may be infinite"
    elif scale is not None:
        words = f" times {name}_scale"
        fix = f"{name}_scale must be at least the largest |{name}| / {most:g}, or let each token have its own"
    raise TensorMismatchError(
        f"{name} goes to {float(size[head]):.4g} in head {head}, but the pages are {stored}, whose largest number is {most:g}{words}; {fix}"
    )


def _overflows_from(dtype: torch.dtype) -> float:
    """The smallest number that is not rounded to the largest finite one: half a step above it."""
    info = torch.finfo(dtype)
    return largest(dtype) + 2.0 ** math.floor(math.log2(largest(dtype))) * info.eps / 2
