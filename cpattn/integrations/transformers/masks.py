"""What a model asks for by its attention mask: causal, perhaps with a sliding window. Anything else is refused.

transformers describes a mask to whoever registered a mask function as a function of two positions. cpattn has no use for
the mask itself, but has to know that it is the one that it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpattn.errors import UnsupportedError
from cpattn.graphs import constant_in_graphs

# (batch, head, query position, key position) -> whether the query sees the key, all broadcast.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CausalMask:
    """What layers are handed as their attention_mask: the window that it stands for, None for all earlier tokens."""

    window: int | None

    def __getitem__(self, index: Any) -> CausalMask:
        """The same mask, for a model that slices it ``[:, :, rows, :]`` and takes all rows. Fewer are refused."""
        if all(part in (slice(None), slice(0, None)) for part in index):
            return self
        raise UnsupportedError(
            f"the model cuts queries off in the middle of its layers (its mask is sliced by {index}). Where only the last tokens are "
            "wanted, use cp.inputs(input_ids, last_only=True), and no logits_to_keep of your own"
        )


def describe_mask(mask_function: MaskFunction, local_size: int | None, overlaid: bool) -> CausalMask:
    """The causal mask that ``mask_function`` is.

    >>> describe_mask(lambda batch, head, q, k: (k <= q) & (k > q - 8), local_size=8, overlaid=False)
    CausalMask(window=8)

    Args:
        mask_function: of positions within one sequence.
        local_size: the sliding window that goes with it, None if there is none.
        overlaid: whether the model put another mask on top.

    Raises:
        UnsupportedError: it shows a later token, or hides an earlier one within the window.
    """
    if overlaid or not is_causal(mask_function, local_size):
        size = "" if local_size is None else f" (local size {local_size})"
        raise UnsupportedError(
            f"the model asks for an attention mask{size} that is not causal, with or without a sliding window. "
            "It may be chunked, bidirectional (of images, say), or one that it reads itself; cpattn has no such attention"
        )
    return CausalMask(local_size)


@constant_in_graphs
def is_causal(mask_function: MaskFunction, window: int | None) -> bool:
    """Tries the function around the edges of the mask that it should be. On the CPU, so that nothing waits for a device."""
    w = 512 if window is None else window
    queries = torch.tensor([0, 1, w - 1, w, w + 1, 2 * w - 1, 2 * w, 3 * w + 1, 1 << 20], device="cpu")[:, None]
    keys = torch.cat([queries - w, queries - w + 1, queries // 2, queries - 1, queries, queries + 1], dim=1)
    in_range = keys >= 0
    expected = keys <= queries
    if window is not None:
        expected &= keys > queries - window
    zeros = torch.zeros_like(keys)
    try:
        shown = mask_function(zeros, zeros, queries.expand_as(keys), keys.clamp(min=0))
    except (RuntimeError, IndexError):  # It looks at tensors of the model, so it is not about positions alone.
        return False
    return bool((shown == expected)[in_range].all())
