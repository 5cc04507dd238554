"""One rank's view of a plan, as tensors: what to compute here, and how rows travel to and from the original order."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cpattn.metadata.batch import IntArray
from cpattn.metadata.device_tables import exclusive_cumsum, expand_runs_on_device, expand_runs_on_host, to_device

if TYPE_CHECKING:
    from cpattn.metadata.plan import Plan

T = TypeVar("T")


class CPMetadata:
    """One rank's part of a :class:`cpattn.Plan`. Built once a batch and used by every layer.

    Made by :meth:`Plan.metadata` or :func:`cpattn.build_metadata`. Local rows are ordered request by request, each
    request's chunks in sequence order (``[r0.front, r0.back, r1.front, ...]`` for zigzag), then padding.
    Integer tensors are int32 on ``device`` unless said otherwise.

    Attributes:
        plan, cp_rank, device: what it was made from.
        num_tokens: logical rows of this rank: its tokens.
        rows: physical rows, padding included; the same on every rank.
        max_seqlen_q: the longest chunk here, in tokens (0 if there is none).
        max_seqlen_k: the longest ``k_len`` here (0 if there is no chunk).
        chunk_request ``[c]``: the request of each chunk that has a token here.
        cu_seqlens_q ``[c + 1]``: the row where each chunk begins; the last entry is ``num_tokens``.
        k_len ``[c]``: the keys that the chunk's last query sees: prefix_len + the chunk's end.
        k_start ``[c]``: where the request's keys begin when all requests' prefixes and extends lie one after another,
            ``[prefix 0, extend 0, prefix 1, extend 1, ...]``.
    """

    chunk_request: Tensor
    cu_seqlens_q: Tensor
    k_len: Tensor
    k_start: Tensor

    def __init__(self, plan: Plan, cp_rank: int, device: torch.device) -> None:
        self.plan = plan
        self.cp_rank = cp_rank
        self.rows = plan.rows
        self._derived: dict[Hashable, Any] = {}

        columns = plan.rank_columns[cp_rank]
        lengths = plan.lengths[:, columns]
        request, nth = lengths.nonzero()
        column = columns[nth]
        chunk_start = plan.starts[request, column]
        q_len = lengths[request, nth]
        k_len = plan.prefix_lens[request] + chunk_start + q_len
        cu_seqlens_q = np.zeros(len(q_len) + 1, dtype=np.int64)
        q_len.cumsum(out=cu_seqlens_q[1:])

        self.chunk_host = ChunkTables(request, column, chunk_start, q_len, k_len)
        self.num_tokens = int(cu_seqlens_q[-1])
        self.max_seqlen_q = int(q_len.max(initial=0))
        self.max_seqlen_k = int(k_len.max(initial=0))
        self._host = {
            "chunk_request": request,
            "cu_seqlens_q": cu_seqlens_q,
            "q_len": q_len,
            "k_len": k_len,
            "k_start": self.k_starts[request],
            "token_start": exclusive_cumsum(plan.extend_lens)[request] + chunk_start,
            "position_start": k_len - q_len,
            # Runs over the whole batch: where its chunks lie in the gathered buffer, and where each request's extend and
            # prefix lie among the keys in order.
            "gathered_start": (plan.chunk_rank * plan.rows + plan.local_starts).ravel(),
            "chunk_length": plan.lengths.ravel(),
            "extend_key": self.k_starts + plan.prefix_lens,
            "extend_len": plan.extend_lens,
            "prefix_key": self.k_starts,
            "prefix_len": plan.prefix_lens,
        }
        self._tables = to_device(self._host, device)
        self.chunk_request = self._tables["chunk_request"]
        self.cu_seqlens_q = self._tables["cu_seqlens_q"]
        self.k_len = self._tables["k_len"]
        self.k_start = self._tables["k_start"]
        # "cuda" has become the device with its number, which is what tensors are compared with.
        self.device = self.cu_seqlens_q.device

    def __repr__(self) -> str:
        return (
            f"CPMetadata(rank {self.cp_rank} of {self.plan.cp_size}: {self.num_tokens} tokens in {self.rows} rows, "
            f"{len(self.chunk_host.request)} chunks, on {self.device})"
        )

    @cached_property
    def token_index(self) -> Tensor:
        """``[rows]`` the row of each local token in the original ``[plan.num_tokens]`` order; -1 on padding."""
        return self._pad(self._expand("token_start", "q_len", self.num_tokens), -1)

    @cached_property
    def position_ids(self) -> Tensor:
        """int64 ``[rows]``: the absolute position ``prefix_len + i`` of each local token, for RoPE; 0 on padding."""
        return self._pad(self._expand("position_start", "q_len", self.num_tokens), 0).to(torch.int64)

    @cached_property
    def restore_index(self) -> Tensor:
        """``[plan.num_tokens]`` where each original token lies in the rank-major gathered buffer ``[cp_size * rows]``."""
        return self._expand("gathered_start", "chunk_length", self.plan.num_tokens)

    @cached_property
    def extend_key_rows(self) -> Tensor:
        """``[plan.num_tokens]`` the row of each original token's key in the order that ``k_start`` speaks of."""
        return self._expand("extend_key", "extend_len", self.plan.num_tokens)

    @cached_property
    def prefix_key_rows(self) -> Tensor:
        """``[plan.num_prefix_tokens]`` the row of each prefix token's key in the order that ``k_start`` speaks of."""
        return self._expand("prefix_key", "prefix_len", self.plan.num_prefix_tokens)

    @property
    def k_starts(self) -> IntArray:
        """``[num_requests]`` on the host: what ``k_start`` holds, for every request."""
        return exclusive_cumsum(self.plan.total_lens)

    def derive(self, key: Hashable, build: Callable[[], T]) -> T:
        """``build()`` at the first call with this key, the same object ever after: tables that a layer above needs
        once a batch."""
        if key not in self._derived:
            self._derived[key] = build()
        value: T = self._derived[key]
        return value

    def _pad(self, per_token: Tensor, fill: int) -> Tensor:
        padding = self.rows - self.num_tokens
        return torch.cat([per_token, per_token.new_full((padding,), fill)]) if padding else per_token

    def _expand(self, first: str, lengths: str, total: int) -> Tensor:
        """Token-level indices from two of the small tables."""
        if self.device.type == "cpu":
            return expand_runs_on_host(self._host[first], self._host[lengths], total)
        return expand_runs_on_device(self._tables[first], self._tables[lengths], total)


class ChunkTables:
    """The chunks with a token on one rank, as int64 host arrays ``[c]``: what step tables are worked out from."""

    __slots__ = ("column", "k_len", "q_len", "request", "start")

    def __init__(self, request: IntArray, column: IntArray, start: IntArray, q_len: IntArray, k_len: IntArray) -> None:
        self.request = request  # of the batch
        self.column = column  # which of its request's chunks it is
        self.start = start  # its first token within the request's extend
        self.q_len = q_len
        self.k_len = k_len
