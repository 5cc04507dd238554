"""The batches that the GPU benchmarks time: one rank's attention after an all-gather, without the transfer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import cpattn
from cpattn.spans import Spans

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def _ragged() -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    return list(zip(rng.integers(0, 8192, 64).tolist(), rng.integers(1, 1801, 64).tolist(), strict=True))


@dataclass(frozen=True)
class AttentionBatch:
    batch: list[tuple[int, int]]
    cp_size: int

    def metadata(self) -> cpattn.CPMetadata:
        """That of a rank in the middle."""
        return cpattn.plan(self.batch, self.cp_size).metadata(self.cp_size // 2, "cuda")

    def flops(self) -> float:
        """Of the causal work alone: two products of D multiply-adds for each query-key pair and head."""
        return 4.0 * HEAD_DIM * HEADS * cpattn.plan(self.batch, self.cp_size).rank_pairs[self.cp_size // 2]

    @property
    def is_decode(self) -> bool:
        """Whether each request has one new token: the time is then that of reading K and V."""
        return all(extend_len == 1 for _, extend_len in self.batch)

    def bytes_read(self) -> int:
        """Of K and V in bf16, each key that the rank's queries see once a chunk."""
        plan = cpattn.plan(self.batch, self.cp_size)
        keys = sum(
            plan.batch[chunk.request].prefix_len + chunk.start + chunk.length for chunk in plan.chunks if chunk.rank == self.cp_size // 2
        )
        return keys * KV_HEADS * 2 * HEAD_DIM * 2


BATCHES = {
    "1 x 128k, cp 8": AttentionBatch([(0, 131072)], 8),
    "8 x (8k + 8k), cp 4": AttentionBatch([(8192, 8192)] * 8, 4),
    "64 ragged, cp 4": AttentionBatch(_ragged(), 4),
    "32 x 1k, cp 4": AttentionBatch([(0, 1024)] * 32, 4),
    "1 x (96k + 32k), cp 8": AttentionBatch([(98304, 32768)], 8),
    "256 x (8k + 1), cp 4": AttentionBatch([(8192, 1)] * 256, 4),
}


def all_gather_spans(meta: cpattn.CPMetadata, half: str = "both") -> tuple[Tensor, Spans]:
    """The spans of an all-gather launch, over the rank's "front" chunks, its "back" chunks or "both"; and which of the
    rank's query rows they are."""
    table = meta.chunk_host
    # The plans are of zigzag: the front chunk of a request comes first.
    is_front = np.diff(table.request, prepend=-1) > 0
    picked = {"both": is_front | ~is_front, "front": is_front, "back": ~is_front}[half]
    index = np.flatnonzero(np.repeat(picked, table.q_len))
    q_len, k_len = table.q_len[picked], table.k_len[picked]
    spans = Spans.build(q_len, meta.k_starts[table.request[picked]], k_len, k_len - q_len + 1, "cuda")
    return torch.from_numpy(index).cuda(), spans


def tensors(batch: AttentionBatch, meta: cpattn.CPMetadata) -> tuple[Tensor, Tensor, Tensor]:
    """Random q of the rank, and K and V of the whole batch in order, as views of one message."""
    torch.manual_seed(0)
    keys = int(meta.plan.total_lens.sum())
    q = torch.randn(meta.num_tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    kv = torch.randn(keys, KV_HEADS, 2 * HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    return q, kv[..., :HEAD_DIM], kv[..., HEAD_DIM:]
