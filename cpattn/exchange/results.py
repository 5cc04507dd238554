"""Partial results as one message: what goes back to the rank whose queries they are of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cpattn.exchange.strategy import Setup


class Results(NamedTuple):
    """A message of results ``[ranks, rows, Hq, Dv + 1]``: out, and LSE in the last column.

    Attributes:
        out, lse: its parts with the rows of all ranks on one axis; partials: with an axis of ranks.
    """

    message: Tensor
    out: Tensor
    lse: Tensor
    partials: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, setup: Setup, name: str, ranks: int) -> Results:
        problem = setup.problem
        shape = ranks, problem.rows, problem.q_heads, problem.v_head_dim + 1
        message = setup.transport.arena.buffer(name, shape, problem.merge_dtype, problem.device)
        flat = message.flatten(0, 1)
        return cls(message, flat[..., :-1], flat[..., -1], (message[..., :-1], message[..., -1]))

    def put(self, out: Tensor, lse: Tensor) -> None:
        """Fills the message."""
        self.out.copy_(out)
        self.lse.copy_(lse)
