"""What one rank sends in one attention call, in bytes: a function for each strategy.

The rows that travel are physical ones, ``plan.rows`` of every rank whatever its share, so each rank sends as much as any other.
A cached prefix is taken to
lie on every rank, and then does not travel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cpattn
from cpattn.metadata.plan import Plan

_FP32_BYTES = 4


class Shape(NamedTuple):
    """The sizes of an attention call beside its rows."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    itemsize: int

    def __str__(self) -> str:
        dims = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim} (v: {self.v_head_dim})"
        return f"{self.heads} query and {self.kv_heads} key/value heads of {dims}, {self.dtype}"


def pass_kv(plan: Plan, shape: Shape) -> int:
    """Its keys and values to every other rank, or as many of the others' passed on, as one message each."""
    message = plan.rows * shape.kv_heads * (shape.head_dim + shape.v_head_dim) * shape.itemsize
    return (plan.cp_size - 1) * message


def pass_q(plan: Plan, shape: Shape) -> int:
    """Its queries to every other rank, and to each of those what it computed for it: an fp32 output and an LSE a head."""
    queries = plan.rows * shape.heads * shape.head_dim * shape.itemsize
    partials = plan.rows * shape.heads * (shape.v_head_dim + 1) * _FP32_BYTES
    return (plan.cp_size - 1) * (queries + partials)


class Traffic(NamedTuple):
    """What travels, in words, and how many bytes of it a rank sends."""

    travels: str
    bytes_sent: Callable[[Plan, Shape], int]


TRAFFIC: dict[str, Traffic] = {
    "all_gather": Traffic("keys and values", pass_kv),
    "ring": Traffic("keys and values", pass_kv),
    "pass_q": Traffic("queries, and partial outputs back", pass_q),
    "pass_q_ring": Traffic("queries, and partial outputs back", pass_q),
}


def strategy_bytes(plan: Plan, shape: Shape) -> dict[str, int]:
    """The bytes that each rank sends in one call, by strategy, of those that this version has."""
    return {name: TRAFFIC[name].bytes_sent(plan, shape) for name in cpattn.STRATEGIES if name in TRAFFIC}


def in_words(num_bytes: int) -> str:
    """
    >>> in_words(1536), in_words(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
