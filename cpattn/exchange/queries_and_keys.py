"""Queries, and the K and V of new tokens, as one message: over a striped cache both go to every rank in one transfer.

A row is ``[Hq * D | Hkv * width]``: a token's queries, then its K and V as :mod:`cpattn.exchange.message` has them. Where these are stored
in another dtype than q's, a row is bytes, and K and V come first, as scales among them are at multiples of their size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.exchange.message import KVFormat, Message
from cpattn.exchange.strategy import IO, Setup
from cpattn.moves.moves import Moves, moves_for
from cpattn.problem import Problem


class QueriesAndKeys(NamedTuple):
    """Memory of rows, and its parts.

    Attributes:
        whole: ``[rows, Hq * D + Hkv * width]``, or bytes.
        q: ``[rows, Hq, D]``; new: K and V of as many rows.
        num_tokens: this rank's rows that are tokens.
    """

    whole: Tensor
    q: Tensor
    new: Message
    kv: KVFormat
    problem: Problem
    num_tokens: int | Tensor
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, name: str, ranks: int = 1) -> QueriesAndKeys:
        """Memory for the rows of so many ranks."""
        problem, dtype = setup.problem, setup.problem.dtype
        if problem.stored_dtype != dtype:
            dtype = torch.uint8
        shape = ranks * problem.rows, problem.query_and_key_bytes // dtype.itemsize
        whole = setup.transport.arena.buffer(name, shape, dtype, problem.device)
        return cls._in(whole, problem, setup.kv, setup.num_tokens)

    @classmethod
    def _in(cls, whole: Tensor, problem: Problem, kv: KVFormat, num_tokens: int | Tensor) -> QueriesAndKeys:
        if whole.dtype == problem.dtype:
            q, new = torch.split(whole, [problem.q_heads * problem.head_dim, kv.heads * kv.width], dim=1)
        else:
            new = whole[:, : problem.key_bytes].view(kv.wire_dtype)
            q = whole[:, problem.queries_at :][:, : problem.query_bytes].view(problem.dtype)
        message = Message.of(new.view(len(new), kv.heads, kv.width), kv)
        q = q.view(len(q), problem.q_heads, problem.head_dim)
        return cls(whole, q, message, kv, problem, num_tokens, moves_for(kv.device))

    def of_rank(self, rank: int, rows: int) -> QueriesAndKeys:
        """One rank's rows among those of all."""
        return self._in(self.whole.narrow(0, rank * rows, rows), self.problem, self.kv, self.num_tokens)

    def put(self, io: IO) -> None:
        """Fills it with what this rank brings."""
        self.q.copy_(io.q)
        self.moves.pack(self.new.whole, io.k, io.v, self.num_tokens)

    def fill_missing(self) -> None:
        """What stands for a rank that failed to bring its rows."""
        self.q.fill_(torch.nan)
        self.kv.fill_missing_(self.new.whole)
