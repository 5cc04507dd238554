"""A latent in the place of keys and values, and how many heads it is expanded to at a time."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cpattn.problem import Problem

MOST_BYTES = 256 * 2**20
"""What the expanded keys and values of a group of heads take up at most, or those of one head. Two groups are held at a time."""


class ExpandFunction(Protocol):
    """What ``expand=`` of :func:`cpattn.cp_attention` takes: the keys and values of some heads, of rows of a latent.

    Args:
        latent: ``[n, 1, L]``, rows as they came to the call, this rank's and others': of new tokens and of cached ones, in any order. Some
            may be zeros that stand for no token.
        heads: which of the query heads, a slice of step 1.

    Returns:
        ``k [n, h, D]`` and ``v [n, h, Dv]``, of so many heads, in the latent's dtype. Both may be views of one tensor, but of one that is
        new in each call: on a GPU the next group of heads is expanded while this one is attended to.
    """

    def __call__(self, latent: Tensor, heads: slice, /) -> tuple[Tensor, Tensor]: ...


def head_groups(problem: Problem, num_keys: int) -> list[slice]:
    """Groups of heads, of about one size, whose keys and values are held at a time.

    >>> import torch
    >>> problem = Problem(torch.device("cpu"), torch.bfloat16, 8, 128, 128, head_dim=192, v_head_dim=128, latent_dim=576)
    >>> groups = head_groups(problem, num_keys=8192)
    >>> len(groups), groups[0]
    (3, slice(0, 42, None))
    """
    heads = problem.q_heads
    at_a_time = max(1, MOST_BYTES // max(1, bytes_of_head(problem, num_keys)))
    count = -(-heads // at_a_time)
    return [slice(heads * n // count, heads * (n + 1) // count) for n in range(count)]


def bytes_of_head(problem: Problem, num_keys: int) -> int:
    """Of the expanded keys and values of one head."""
    return num_keys * (problem.head_dim + problem.v_head_dim) * problem.dtype.itemsize
