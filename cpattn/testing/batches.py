"""Batches that go wrong where a layout does: each with a name, and small enough to look at."""

from __future__ import annotations

NAMED_BATCHES: dict[str, list[tuple[int, int]]] = {
    "no requests": [],
    "nothing new": [(0, 0), (7, 0), (0, 0)],
    "one token": [(0, 1)],
    "one token after a prefix": [(100, 1)],
    "one token between empty requests": [(0, 0), (3, 0), (0, 1), (5, 0), (0, 0)],
    "shorter than the number of chunks": [(0, 3), (2, 1), (0, 2)],
    "decode": [(127, 1), (1000, 1), (1, 1), (64, 1), (4095, 1)],
    "prefill beside decode": [(0, 100), (1000, 1), (31, 1), (64, 33)],
    "64 requests of 9": [(0, 9)] * 64,
    "64 requests of 1": [(0, 1)] * 64,
    "one long beside 63 short": [(0, 4096)] + [(i % 3, 1 + i % 5) for i in range(63)],
    "63 short and then one long": [(i % 3, 1 + i % 5) for i in range(63)] + [(0, 4096)],
    "primes": [(13, 2), (0, 3), (101, 5), (1, 7), (0, 11), (17, 13), (2, 97), (0, 101), (3, 127)],
    "divides evenly": [(0, 1680), (840, 840)],
    "one token too many": [(0, 1681), (840, 841)],
    "one token too few": [(0, 1679), (840, 839)],
}
"""Batches in which layouts go wrong, by name: lists of (prefix_len, extend_len)."""
