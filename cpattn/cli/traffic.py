"""What one rank sends in one attention call, in bytes: what each strategy's schedule says.

A cached prefix lies on every rank, and then does not travel, unless the plan says that caches are sharded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cpattn.byte_sizes import in_words as in_words
from cpattn.exchange.registry import able_strategies
from cpattn.exchange.schedule import bytes_sent
from cpattn.exchange.traveling_keys import explain_keys
from cpattn.metadata.auto_partition import explain_partition
from cpattn.metadata.needed_keys import lacking_rows
from cpattn.metadata.needed_shards import lacking_shards
from cpattn.metadata.plan import Plan
from cpattn.problem import Problem


class Shape(NamedTuple):
    """The sizes of an attention call beside its rows."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    itemsize: int
    latent_dim: int | None = None

    def __str__(self) -> str:
        dims = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim} (v: {self.v_head_dim})"
        if self.latent_dim is not None:
            return f"{self.heads} heads of {dims} that a latent of {self.latent_dim} is expanded to, {self.dtype}"
        return f"{self.heads} query and {self.kv_heads} key/value heads of {dims}, {self.dtype}"


def problem_of(plan: Plan | None, shape: Shape) -> Problem:
    """What such a call asks for; without a plan, of any batch."""
    return Problem(
        device=torch.device("cpu"),
        dtype=getattr(torch, shape.dtype),
        rows=0 if plan is None else plan.rows,
        q_heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        v_head_dim=shape.v_head_dim,
        cache="packed" if plan is not None and plan.num_prefix_tokens else None,
        latent_dim=shape.latent_dim,
    )


def strategy_bytes(plan: Plan, shape: Shape) -> dict[str, int]:
    """The bytes that a rank sends in one call, by strategy: those of the rank that sends the most."""
    problem = problem_of(plan, shape)
    return {strategy.name: int(bytes_sent(strategy.schedule(problem, plan)).max()) for strategy in able_strategies(problem, plan)}


def needed_bytes(plan: Plan, shape: Shape) -> int:
    """The bytes of keys and values that a rank's queries see and that it does not hold: new ones, and cached ones where caches are
    sharded. Of the rank that lacks the most."""
    problem = problem_of(plan, shape)
    return int(lacking_shards(plan, problem.window).received.max()) * problem.key_bytes


def rest_bytes(plan: Plan, shape: Shape) -> int:
    """The bytes of all other new keys and values of others, which pages that every rank holds whole get beside or after the attention:
    of the rank that gets the most. Of a sharded cache no rank gets what it does not need."""
    if plan.sharded:
        return 0
    problem = problem_of(plan, shape)
    others = plan.num_tokens - np.array(plan.rank_tokens, dtype=np.int64)
    return int((others - lacking_rows(plan, problem.window).received).max()) * problem.key_bytes


def partition_in_words(plan: Plan, shape: Shape, machine: str | None, token_cost: int | None) -> str:
    """Its partition, and what ``auto`` takes for its batch."""
    return explain_partition(plan, problem_of(plan, shape), machine, token_cost)


def keys_in_words(plan: Plan, shape: Shape) -> str:
    """What an all-gather brings, and why."""
    return explain_keys(problem_of(plan, shape), plan)
