"""Batches that several benchmarks time."""

from __future__ import annotations

import random


def ragged(with_prefix: bool) -> list[tuple[int, int]]:
    """64 requests of about 0.9k new tokens, over prefixes of about 4k or none."""
    rng = random.Random(1)
    batch = []
    for _ in range(64):
        prefix = int(rng.lognormvariate(8, 0.8)) if with_prefix else 0
        batch.append((prefix, max(8, int(rng.lognormvariate(6.5, 0.8)) // 8 * 8)))
    return batch
