"""Partitions that cut each request in another way, as a caller's may."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import cpattn
from cpattn.metadata.batch import IntArray


@dataclass(frozen=True)
class OwnPartition:
    """Cuts at random: requests whole on one rank, five chunks that two ranks hold in turn, neighbouring chunks of one rank,
    chunks of a single token, and now and then a rank that has nothing at all. The same for the same seed and batch."""

    seed: int

    def __call__(self, batch: IntArray, cp_size: int) -> cpattn.Chunks:
        rng = np.random.default_rng([self.seed, cp_size])
        ranks = np.arange(cp_size)
        if cp_size > 1 and rng.random() < 0.4:
            ranks = np.delete(ranks, rng.integers(cp_size))
        table = []
        for request, (_, extend_len) in enumerate(batch.tolist()):
            lengths, owners = self._cut(rng, extend_len, ranks)
            start = 0
            for length, rank in zip(lengths, owners, strict=True):
                if length:
                    table.append((request, start, length, int(rank)))
                    start += length
        return cpattn.Chunks(*np.array(table, dtype=np.int64).reshape(-1, 4).T)

    @staticmethod
    def _cut(rng: np.random.Generator, extend_len: int, ranks: IntArray) -> tuple[list[int], list[int]]:
        """The lengths of a request's chunks, empty ones too, and who owns each."""
        style = rng.choice(["whole", "in turn", "neighbours", "single tokens", "any"])
        if style == "whole":
            return [extend_len], [int(rng.choice(ranks))]
        if style == "single tokens":
            singles = min(extend_len, int(rng.integers(1, 8)))
            return [*[1] * singles, extend_len - singles], rng.choice(ranks, singles + 1).tolist()
        chunks = 5 if style == "in turn" else 3 if style == "neighbours" else int(rng.integers(1, 12))
        cuts = np.sort(rng.integers(0, extend_len + 1, chunks - 1))
        lengths = np.diff(cuts, prepend=0, append=extend_len).tolist()
        if style == "any":
            return lengths, rng.choice(ranks, chunks).tolist()
        pair = rng.choice(ranks, 2)
        return lengths, [int(pair[n % 2]) for n in range(5)] if style == "in turn" else [int(pair[0])] * 3
