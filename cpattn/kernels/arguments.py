"""What kernels take beside tensors and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpattn.stored import is_fp8

# Bytes that one thread copies at a time at most.
_MOST_ALIGNED = 16


class Blocks(NamedTuple):
    """What a kernel takes as a tensor descriptor: blocks of a tensor.

    Attributes:
        source: the tensor; shape, strides: as which it is looked at, the last stride 1.
        block: the shape of a block.
        descriptor: makes Triton's descriptor, ``(source, shape, strides, block) -> descriptor``.
    """

    source: Tensor
    shape: list[int]
    strides: list[int]
    block: tuple[int, ...]
    descriptor: Callable[[Tensor, list[int], list[int], list[int]], Any]

    def passed(self) -> Any:
        """What Triton takes."""
        return self.descriptor(self.source, self.shape, self.strides, list(self.block))


class Words(NamedTuple):
    """A tensor that a kernel takes as a pointer to another dtype: what is moved is memory.

    Attributes:
        source: any strides where the dtype is as wide as its own, else ``[rows, ...]``, each row contiguous.
        dtype: of the words, of which a row is a whole number.
    """

    source: Tensor
    dtype: torch.dtype

    def passed(self) -> Tensor:
        """What Triton takes; of its shape it looks at nothing."""
        if self.source.element_size() == self.dtype.itemsize:
            return self.source.view(self.dtype)
        rows = self.source.unsqueeze(1) if self.source.ndim == 1 else self.source.flatten(1)
        return rows.view(self.dtype)


def as_words(x: Tensor) -> Tensor | Words:
    """A tensor that a kernel takes as a pointer: fp8 as bytes, which every GPU and the interpreter have."""
    return Words(x, torch.uint8) if is_fp8(x.dtype) else x


def fits_descriptor(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can address x: 16-byte aligned, and not empty."""
    return alignment(x) == _MOST_ALIGNED and x.numel() > 0


def alignment(x: Tensor) -> int:
    """Of how many bytes all places of x along its last axis begin at a multiple: a power of two up to 16."""
    places = x.data_ptr()
    for stride in x.stride()[:-1]:
        places |= stride * x.element_size()
    return min(_MOST_ALIGNED, places & -places) if places else _MOST_ALIGNED
