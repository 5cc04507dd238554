"""What a call asks of the attention, beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionOptions:
    """What a call asks of the attention, beside its tensors.

    Attributes:
        scale: the scores are q . k * scale.
        window: each query sees the last ``window`` keys up to its own, or None for all.
        softcap: scores become softcap * tanh(scores / softcap), or None.
        sinks: fp32 ``[Hq]``, one more logit in each query's softmax, without a value; or None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
