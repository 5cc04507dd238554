"""Where the prefix lies: the keys and values of tokens that earlier calls have computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedKV:
    """The prefix of every request, request after request, without padding; the same on every rank.

    Attributes:
        k: ``[sum of prefix_len, Hkv, D]``, already rotated, as all keys.
        v: ``[sum of prefix_len, Hkv, Dv]``.
    """

    k: Tensor
    v: Tensor
