"""Queries, and the K and V of new tokens, as one message: over a striped cache both go to every rank in one transfer.

A row is ``[Hq * D | Hkv * width]``: a token's queries, then its K and V as :mod:`cpattn.exchange.message` has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.exchange.message import KVFormat, Message
from cpattn.exchange.strategy import IO, Setup
from cpattn.moves.moves import Moves, moves_for


class QueriesAndKeys(NamedTuple):
    """Memory of rows, and its parts.

    Attributes:
        whole: ``[rows, Hq * D + Hkv * width]``.
        q: ``[rows, Hq, D]``; new: K and V of as many rows.
        num_tokens: this rank's rows that are tokens.
    """

    whole: Tensor
    q: Tensor
    new: Message
    kv: KVFormat
    num_tokens: int | Tensor
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, name: str, ranks: int = 1) -> QueriesAndKeys:
        """Memory for the rows of so many ranks."""
        problem, kv = setup.problem, setup.kv
        width = problem.q_heads * problem.head_dim
        shape = ranks * problem.rows, width + kv.heads * kv.width
        whole = setup.transport.arena.buffer(name, shape, problem.dtype, problem.device)
        return cls._in(whole, problem.q_heads, kv, setup.num_tokens)

    @classmethod
    def _in(cls, whole: Tensor, q_heads: int, kv: KVFormat, num_tokens: int | Tensor) -> QueriesAndKeys:
        q, new = torch.split(whole, [q_heads * kv.head_dim, kv.heads * kv.width], dim=1)
        message = Message.of(new.view(len(new), kv.heads, kv.width), kv)
        return cls(whole, q.view(len(q), q_heads, kv.head_dim), message, kv, num_tokens, moves_for(kv.device))

    def of_rank(self, rank: int, rows: int) -> QueriesAndKeys:
        """One rank's rows among those of all."""
        return self._in(self.whole.narrow(0, rank * rows, rows), self.q.shape[1], self.kv, self.num_tokens)

    def put(self, io: IO) -> None:
        """Fills it with what this rank brings."""
        self.q.copy_(io.q)
        self.moves.pack(self.new.whole, io.k, io.v, self.num_tokens)

    def fill_missing(self) -> None:
        """What stands for a rank that failed to bring its rows."""
        self.q.fill_(torch.nan)
        self.kv.fill_missing_(self.new.whole)
