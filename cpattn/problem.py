"""Problem: what a call asks for, in kinds and sizes. All that is decided about a call follows from it and the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from cpattn.stored import SCALE_BYTES, ScaleKind, row_bytes


@dataclass(frozen=True)
class Problem:
    """Of one call, the same on every rank; hashable.

    >>> kv = Problem(torch.device("cpu"), torch.bfloat16, rows=8, q_heads=16, kv_heads=1, head_dim=576, v_head_dim=512, v_in_k=True)
    >>> kv.key_bytes
    1152

    Attributes:
        device, dtype: of q, and of k and v as they come; for queries in fp8, the dtype of the result.
        rows: physical rows of each rank.
        q_heads, kv_heads, head_dim, v_head_dim: of q ``[rows, q_heads, head_dim]`` and v ``[rows, kv_heads, v_head_dim]``.
        v_in_k: whether V is the first columns of K, as in multi-head latent attention.
        scale: of the scores.
        cache: in which form cached keys come with the call; None if there are none.
        page_size: tokens of a page, where there are pages.
        window: the keys that a query sees, its own included; None for all.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None for no cap.
        sinks: whether each head has one more logit without a value.
        fixed: whether a CUDA graph may replay the call over other batches of the same bucket.
        max_requests: of such a batch; None where the call is about one batch alone.
        kv_dtype: in which pages have K and V, and in which these travel; None for q's.
        scales: what a scale belongs to that stored numbers are multiplied by; None where there are none.
        overlap: groups of KV heads into which an all-gather is split.
        own_heads: whether the cache has a rank's own share of the KV heads alone, where a strategy divides them.
        latent_dim: of a latent of one head, ``[rows, 1, latent_dim]``, that comes, travels and is cached in the place of K and V, and is
            expanded to those of each query head where it is attended to; None where K and V come themselves.
        q_dtype: in which queries come, if that is fp8; else None.
    """

    device: torch.device
    dtype: torch.dtype
    rows: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    v_in_k: bool = False
    scale: float = 1.0
    cache: Literal["packed", "paged"] | None = None
    page_size: int | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    fixed: bool = False
    overlap: int = 1
    max_requests: int | None = None
    own_heads: bool = False
    kv_dtype: torch.dtype | None = None
    scales: ScaleKind | None = None
    latent_dim: int | None = None
    q_dtype: torch.dtype | None = None

    @property
    def expands(self) -> bool:
        """Whether keys and values come as a latent."""
        return self.latent_dim is not None

    @property
    def attended(self) -> Problem:
        """What a kernel is given: of a latent the keys and values that it is expanded to, which lie in no cache."""
        if not self.expands:
            return self
        return replace(self, latent_dim=None, cache=None, page_size=None, kv_dtype=None, scales=None)

    @property
    def merge_dtype(self) -> torch.dtype:
        """In which partial results are merged, and in which they travel: fp32, or fp64 for fp64 inputs."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def query_bytes(self) -> int:
        """Of one row of queries."""
        return self.q_heads * self.head_dim * self.dtype.itemsize

    @cached_property
    def key_bytes(self) -> int:
        """Of the K and V of one token, or of its latent, as they travel."""
        if self.latent_dim is not None:
            return row_bytes(self.latent_dim, 0, self.stored_dtype, self.scales)
        v_head_dim = 0 if self.v_in_k else self.v_head_dim
        return self.kv_heads * row_bytes(self.head_dim, v_head_dim, self.stored_dtype, self.scales)

    @property
    def copied_key_bytes(self) -> int:
        """The same in a copy in q's dtype."""
        return self.kv_heads * (self.head_dim + (0 if self.v_in_k else self.v_head_dim)) * self.dtype.itemsize

    @property
    def query_and_key_bytes(self) -> int:
        """Of the K and V of one token and of one row of queries, where they travel side by side."""
        return self.queries_at + (self.query_bytes if self.stored_dtype == self.dtype else self._aligned(self.query_bytes))

    @property
    def queries_at(self) -> int:
        """Behind how many bytes of keys queries then begin, if both are not of one dtype: each is at a multiple of its size."""
        return self.key_bytes if self.stored_dtype == self.dtype else self._aligned(self.key_bytes)

    def _aligned(self, nbytes: int) -> int:
        unit = max(SCALE_BYTES, self.dtype.itemsize)
        return -(-nbytes // unit) * unit

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of K and V in pages, and where they travel."""
        return self.kv_dtype or self.dtype

    @property
    def result_bytes(self) -> int:
        """Of the partial result of one row: its output and the LSE of each head."""
        return self.q_heads * (self.v_head_dim + 1) * self.merge_dtype.itemsize
