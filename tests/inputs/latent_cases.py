"""An AttentionCase whose keys and values are expanded from a latent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import cpattn
from cpattn.problem import Problem
from cpattn.testing import oracle_attention
from inputs.cases import AttentionCase


@dataclass
class LatentCase(AttentionCase):
    """``k`` and ``prefix_k`` are latents ``[rank | rope]`` of one head; the oracle sees what they are expanded to, in float64.

    Attributes:
        nope: of a head's key, what comes out of the latent; the rest of ``head_dim`` is the rotated part.
    """

    kv_heads: int = 1
    heads: int = 6
    rank: int = 24
    nope: int = 10
    v_head_dim: int | None = 12
    v_in_k: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        generator = torch.Generator().manual_seed(self.seed + 1)
        tokens, cached = len(self.k), len(self.prefix_k)
        latent = torch.randn(tokens + cached, 1, self.latent_dim, generator=generator).to(self.device, self.dtype)
        self.k, self.prefix_k = latent[:tokens], latent[tokens:]
        self.v = self.k[..., : self.v_head_dim]
        # So that keys are normal as well.
        weight = torch.randn(self.heads, self.nope + self.v.shape[2], self.rank, generator=generator) / self.rank**0.5
        self.weight = weight.to(self.device, self.dtype)
        self.options["expand"] = cpattn.latent_expansion(self.weight, self.v.shape[2])

    @property
    def latent_dim(self) -> int:
        """Of the latent."""
        return self.rank + self.head_dim - self.nope

    @property
    def expand(self) -> Any:
        """The function of the call."""
        return self.options["expand"]

    def expanded(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of all heads, in float64, as the definition of MLA has them."""
        compressed, rope = torch.split(latent.double(), [self.rank, self.head_dim - self.nope], dim=2)
        k_and_v = torch.einsum("tr,hdr->thd", compressed[:, 0], self.weight.double())
        return torch.cat([k_and_v[..., : self.nope], rope.expand(-1, self.heads, -1)], dim=2), k_and_v[..., self.nope :]

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """Output and LSE of the oracle, float64."""
        (k, v), (prefix_k, prefix_v) = self.expanded(self.k), self.expanded(self.prefix_k)
        options: dict[str, Any] = {name: value for name, value in self.options.items() if name != "expand"}
        return oracle_attention(self.q, k, v, self.batch, prefix_k=prefix_k, prefix_v=prefix_v, **options)

    def problem(self, plan: cpattn.Plan) -> Problem:
        """What its calls ask for."""
        heads = {"kv_heads": self.heads, "v_in_k": False, "latent_dim": self.latent_dim}
        return replace(super().problem(plan), **heads)  # type: ignore[arg-type]
