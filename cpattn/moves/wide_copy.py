"""Copies of strided rows in words of eight bytes: torch copies what is not contiguous an element at a time."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = torch.int64


def copy_wide_(to: Tensor, source: Tensor) -> None:
    """``to.copy_(source)``, for rows that are wide and aligned as such words; any others are copied as they are.

    >>> to, source = torch.zeros(2, 3, 12), torch.randn(2, 1, 4)
    >>> copy_wide_(to[..., 8:], source)
    >>> bool((to[..., 8:] == source).all() and (to[..., :8] == 0).all())
    True

    Args:
        to: ``[..., n]``; source: of the same dtype, and of a shape that can be expanded to that one.
    """
    if to.dtype == source.dtype and _has_words(to) and _has_words(source):
        to, source = to.view(_WORD), source.view(_WORD)
    to.copy_(source)


def _has_words(x: Tensor) -> bool:
    """Whether each of its rows is made of whole words, at their addresses."""
    size = x.element_size()
    if x.ndim == 0 or size >= _WORD.itemsize or x.stride(-1) != 1:
        return False
    numbers = _WORD.itemsize // size
    return not any(number % numbers for number in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
