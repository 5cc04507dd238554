"""The expansion of a latent as DeepSeek models have it, for ``expand=`` of :func:`cpattn.cp_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpattn.errors import TensorMismatchError, shown
from cpattn.expansion import ExpandFunction
from cpattn.metadata.batch import is_integer
from cpattn.moves.wide_copy import copy_wide_


def latent_expansion(weight: Tensor, v_dim: int) -> ExpandFunction:
    """What ``expand=`` takes, of the weight that a DeepSeek model expands its latent with (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    A latent's row is ``[rank | rope]``: what is multiplied by the weight, and a part of the key that is rotated, which all heads share.
    Of each head it becomes the key ``[nope | rope]`` and the value.

    >>> import cpattn, torch
    >>> heads, rank, nope, rope, v_dim = 4, 32, 16, 8, 16
    >>> weight = torch.randn(heads * (nope + v_dim), rank)  # as kv_b_proj.weight of the model
    >>> expand = cpattn.latent_expansion(weight.unflatten(0, (heads, -1)), v_dim)
    >>> meta = cpattn.build_metadata([(0, 5)], cp_size=1, cp_rank=0)
    >>> q, latent = torch.randn(5, heads, nope + rope), torch.randn(5, 1, rank + rope)
    >>> cpattn.cp_attention(q, latent, None, meta, v_dim=v_dim, expand=expand).shape
    torch.Size([5, 4, 16])

    Each head is a product that is written where its keys and values lie, so that nothing is copied but the rotated part.

    Args:
        weight: ``[heads, nope + v_dim, rank]``, of each head the rows of its key and then those of its value, in the latent's dtype. It is
            used as it is, without a copy: what is written to it later holds.
        v_dim: the head dim of V.

    Returns:
        An :class:`cpattn.ExpandFunction`.

    Raises:
        TensorMismatchError: weight is no such tensor; or, from the call, the latent is narrower than the weight, or in another dtype.
    """
    given: Any = weight
    if not isinstance(given, Tensor) or given.ndim != 3 or not is_integer(v_dim) or not 0 < v_dim < given.shape[1]:
        kind = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise TensorMismatchError(
            f"weight is {kind}, and v_dim={shown(v_dim)}; pass [heads, nope + v_dim, rank], of kv_b_proj.weight that is "
            "weight.unflatten(0, (heads, -1)), and a v_dim of 1 or more that leaves rows for the key"
        )
    nope = given.shape[1] - int(v_dim)
    weight_HDR = given.detach()

    def expand(latent: Tensor, heads: slice, /) -> tuple[Tensor, Tensor]:
        rank = weight_HDR.shape[2]
        if latent.shape[2] < rank or latent.dtype != weight_HDR.dtype:
            raise TensorMismatchError(
                f"the latent is {tuple(latent.shape)} {latent.dtype}, the weight {tuple(weight_HDR.shape)} {weight_HDR.dtype}; a row of "
                "the latent has as many numbers as the weight's last axis, or those and the rotated part of the key, in its dtype"
            )
        rows, of_heads = len(latent), weight_HDR[heads]
        k = latent.new_empty(rows, len(of_heads), nope + latent.shape[2] - rank)
        v = latent.new_empty(rows, len(of_heads), int(v_dim))
        latent_1NR = latent[:, :, :rank].transpose(0, 1).expand(len(of_heads), -1, -1)
        # A product of its own for each head: its result may then lie in rows that are longer.
        torch.bmm(latent_1NR, of_heads[:, :nope].transpose(1, 2), out=k[..., :nope].transpose(0, 1))
        torch.bmm(latent_1NR, of_heads[:, nope:].transpose(1, 2), out=v.transpose(0, 1))
        copy_wide_(k[..., nope:], latent[:, :, rank:])
        return k, v

    return expand
