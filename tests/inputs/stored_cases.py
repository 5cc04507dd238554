"""An AttentionCase over pages that are in another dtype than its queries: fp8 with scales, or half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cpattn
from cpattn.moves import torch_moves
from cpattn.moves.stored_rows import StoredRows
from inputs.cases import AttentionCase
from inputs.paged_caches import RankPages


@dataclass
class StoredCase(AttentionCase):
    """What a right call makes of the same tensors: the oracle's answer over dequantised keys, in q's dtype.

    Attributes:
        stored: the dtype of the pages.
        scales: "one", "head" or "token" for fp8; None for others.
    """

    stored: torch.dtype = torch.float8_e4m3fn
    scales: str | None = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        # So that nothing of these overflows, and a wrong head is noticed. Of powers of two the products are numbers of bf16 as well:
        # kernels that multiply scales in afterwards compute with the same numbers as those over a copy.
        k_scale = 2.0 ** (torch.arange(self.kv_heads, device=self.device) % 8 - 6)
        v_scale = k_scale.flip(0) * 2
        self.of_heads: tuple[Tensor, Tensor] | None = None
        if self.scales == "one":
            self.of_heads = k_scale[0], v_scale[:1]
        elif self.scales == "head":
            self.of_heads = k_scale, v_scale
        self.new, self.cached = self._store(self.k, self.v), self._store(self.prefix_k, self.prefix_v)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is in fp8, which torch 2.13 does not pickle."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("new", "cached")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.new, self.cached = self._store(self.k, self.v), self._store(self.prefix_k, self.prefix_v)

    def _store(self, k: Tensor, v: Tensor) -> StoredRows:
        """As they are to be in the pages."""
        shapes = (k.shape, v.shape)
        numbers = [torch.empty(shape, dtype=self.stored, device=self.device) for shape in shapes]
        new = [torch.empty(shape[:2], device=self.device) if self.scales == "token" else None for shape in shapes]
        scales: list[Any] = [None, None]
        if self.of_heads is not None:
            scales = [scale.reshape(-1).expand(k.shape[1]) for scale in self.of_heads]
        if self.v_in_k:
            torch_moves.quantize(StoredRows(numbers[0], None, new[0]), k, None, scales[0], None)
            stored = StoredRows(numbers[0], None, new[0] if scales[0] is None else scales[0])
        else:
            torch_moves.quantize(StoredRows(*numbers, *new), k, v, *scales)
            stored = StoredRows(*numbers, *(new if scales[0] is None else scales))
        return stored

    def _meant(self, stored: StoredRows, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = torch.empty_like(k), torch.empty(v.shape, dtype=v.dtype, device=v.device)
        torch_moves.dequantize(k, None if self.v_in_k else v, stored)
        return k, k[..., : v.shape[2]] if self.v_in_k else v

    def dequantised(self) -> AttentionCase:
        """The same problem in q's dtype: what this one is compared with."""
        fields = {name: getattr(self, name) for name in AttentionCase.__dataclass_fields__ if name != "options"}
        case = AttentionCase(**fields)
        case.q, case.options = self.q, self.options
        case.k, case.v = self._meant(self.new, self.k, self.v)
        case.prefix_k, case.prefix_v = self._meant(self.cached, self.prefix_k, self.prefix_v)
        return case

    def pages(self, plan: cpattn.Plan, rank: int, **options: Any) -> Any:
        """A rank's pages and scales, with the prefix in them."""
        return StoredPages(self, plan, rank, **options)


class StoredPages:
    """The pages of one rank and, where tokens have scales, those: each is a :class:`RankPages`, over one table."""

    def __init__(self, case: StoredCase, plan: cpattn.Plan, rank: int, **options: Any) -> None:
        new, cached = case.new, case.cached
        numbers = RankPages(plan, rank, cached.k, cached.v, new.k, new.v, case.page_size, case.seed, **options)
        self._pages = [numbers]
        k_scale, v_scale = case.of_heads or (None, None)
        if case.scales == "token":
            scales: list[Any] = [None if x is None else x[..., None] for x in (*cached[2:], *new[2:])]
            old_k, old_v, new_k, new_v = scales
            of_tokens = RankPages(plan, rank, old_k, old_v, new_k, new_v, case.page_size, case.seed, **options)
            self._pages.append(of_tokens)
            k_scale, v_scale = (None if x is None else x[..., 0] for x in (of_tokens.cache.k_pages, of_tokens.cache.v_pages))
        cache, v_scale = numbers.cache, None if case.v_in_k else v_scale
        self.cache = cpattn.PagedKV(cache.k_pages, cache.v_pages, cache.page_table, k_scale=k_scale, v_scale=v_scale)

    def check_written(self) -> None:
        """Numbers and scales are in their slots to the bit, and no other slot has changed."""
        for pages in self._pages:
            pages.check_written()
