"""From how many new tokens on keys should travel rather than queries, beside what others have published.

Yang et al. (arXiv:2411.01783): Llama 3 405B on four hosts of eight H100 and adapters of 400 Gb/s, a KV head to each GPU, 128,000 tokens in
all, of which each host has a part in its cache. Queries are faster below about 5% of new tokens, and keys above.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import PropertyMock, patch

import pytest
import torch

import cpattn
from cpattn.machine import H100_INFINIBAND
from cpattn.problem import Problem

ALL, HOSTS, PUBLISHED = 128_000, 4, 0.05
# 16 results of a token in half precision, and their LSE in fp32: what travels back there. Here they are fp32, so that merging is exact.
HALF_RESULTS = 16 * (128 * 2 + 4)


def seconds(miss_rate: float, machine: cpattn.Machine) -> dict[str, float]:
    """Of each strategy, with the backend that is the fastest."""
    cached = round(ALL * (1 - miss_rate)) // HOSTS
    plan = cpattn.plan([(HOSTS * cached, ALL - HOSTS * cached)], HOSTS, prefix_shards=[[cached] * HOSTS])
    problem = Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 16, 1, 128, 128, cache="paged", page_size=64)
    found: dict[str, float] = {}
    for one in cpattn.estimate(plan, problem, machine):
        found.setdefault(one.strategy, one.graph)
    return found


def tipping_point(machine: cpattn.Machine) -> float:
    below, above = 0.001, 0.5
    while above - below > 0.0005:
        middle = (below + above) / 2
        times = seconds(middle, machine)
        below, above = (middle, above) if min(times["pass_q"], times["pass_q_ring"]) < times["ring"] else (below, middle)
    return below


# What data sheets say of such an adapter, and half of it: between hosts a single message seldom gets all.
@pytest.mark.parametrize("rate", [45e9, 25e9])
def test_queries_give_way_to_keys_near_the_published_miss_rate(rate: float) -> None:
    machine = replace(H100_INFINIBAND, across=replace(H100_INFINIBAND.across, gather=rate, shift=rate))
    with patch.object(Problem, "result_bytes", PropertyMock(return_value=HALF_RESULTS)):
        found = tipping_point(machine)
    assert PUBLISHED / 2 < found < 1.2 * PUBLISHED
    # With results of twice the bytes queries give way earlier.
    assert PUBLISHED / 3 < tipping_point(machine) < found
