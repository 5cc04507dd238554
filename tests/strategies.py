"""Batches and plan options for property tests, and ugly batches that have a name.

A batch is a list of (prefix_len, extend_len). Sizes stay small, because what goes wrong in a layout goes wrong with few
tokens: around multiples of the chunk count, with empty and one-token requests, with many of them, and with one that is
long beside others that are short.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import strategies as st
from own_partitions import OwnPartition

Batch = list[tuple[int, int]]

NAMED_BATCHES: dict[str, Batch] = {
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


def named_batches(names: Iterable[str] = NAMED_BATCHES) -> list[Any]:
    """For ``pytest.mark.parametrize("batch", named_batches())``: a test id for each name, without blanks."""
    return [pytest.param(NAMED_BATCHES[name], id=name.replace(" ", "-")) for name in names]


def lengths(max_value: int) -> st.SearchStrategy[int]:
    """0 .. max_value, with more weight on 0, 1 and lengths around multiples of 16: those of 2 * cp_size for 1, 2, 4, 8 ranks."""
    edges = [length for base in range(0, max_value + 2, 16) for length in (base - 1, base, base + 1) if 0 <= length <= max_value]
    return st.sampled_from(edges) | st.integers(0, max_value)


def batches(max_requests: int = 10, max_prefix: int = 100, max_extend: int = 64) -> st.SearchStrategy[Batch]:
    """Mixed batches; many requests shorter than the number of chunks; decode batches (every extend 1); equal requests."""
    mixed = st.lists(st.tuples(lengths(max_prefix), lengths(max_extend)), max_size=max_requests)
    decode = st.lists(st.tuples(lengths(max_prefix), st.just(1)), max_size=max_requests)
    equal = st.builds(lambda request, n: [request] * n, st.tuples(lengths(max_prefix), lengths(max_extend)), st.integers(1, max_requests))
    short = st.lists(st.tuples(lengths(max_prefix), lengths(min(max_extend, 8))), max_size=2 * max_requests)
    return mixed | short | decode | equal


def non_empty_batches(**limits: int) -> st.SearchStrategy[Batch]:
    """:func:`batches` with at least one new token."""
    return batches(**limits).filter(lambda batch: any(extend_len for _, extend_len in batch))


cp_sizes = st.integers(1, 8)
partitions = st.sampled_from(["zigzag", "contiguous"])
remainders = st.sampled_from(["balanced", "first"])
pad_tos = st.sampled_from([1, 2, 3, 8, 64])


def plan_options() -> st.SearchStrategy[dict[str, Any]]:
    """All arguments of ``cpattn.plan`` but the batch, with the partitions that cut all requests alike."""
    return st.fixed_dictionaries({"cp_size": cp_sizes, "partition": partitions, "remainder": remainders, "pad_to": pad_tos})


def named_plan_options() -> st.SearchStrategy[dict[str, Any]]:
    """Those, or ``"whole"`` and ``"uncut"``, which have no remainder rule."""
    whole = st.sampled_from(["whole", "uncut"])
    return plan_options() | st.fixed_dictionaries({"cp_size": cp_sizes, "partition": whole, "pad_to": pad_tos})


def any_plan_options() -> st.SearchStrategy[dict[str, Any]]:
    """Those, or a caller's own partition, which has none either."""
    own = st.builds(OwnPartition, st.integers(0, 10**6))
    return named_plan_options() | st.fixed_dictionaries({"cp_size": cp_sizes, "partition": own, "pad_to": pad_tos})
