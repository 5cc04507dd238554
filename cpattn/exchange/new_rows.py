"""New keys and values of a call as they are stored: converted once, before they travel or are written or attended to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.kv_cache import PagedKV
from cpattn.moves.moves import Moves, moves_for
from cpattn.moves.stored_rows import StoredRows
from cpattn.problem import Problem
from cpattn.transports.arena import Arena


class NewRows(NamedTuple):
    """Memory for this rank's, as a message has them."""

    memory: Message
    stored: StoredRows
    moves: Moves

    @classmethod
    def of(cls, problem: Problem, arena: Arena) -> NewRows:
        """For each call of a kind."""
        kv = KVFormat.of(problem)
        memory = message_buffer(arena, "stored rows", kv, problem.rows)
        return cls(memory, kv.stored(*memory.parts), moves_for(problem.device))

    def put(self, k: Tensor, v: Tensor | None, scales: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """Parts of a message, for K and V. Rows that are no tokens become something or other.

        Args:
            scales: of heads, where heads have them.
        """
        self.moves.quantize(self.stored, k, v, *(scales or (None, None)))
        return self.memory.parts


def stored_parts(kv: KVFormat, cache: PagedKV, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same in memory of their own, for pages of this format."""
    memory = torch.empty(len(k), kv.heads, kv.width, dtype=kv.wire_dtype, device=kv.device)
    parts = kv.parts(memory)
    moves_for(kv.device).quantize(kv.stored(*parts), k, v, *(scales_of_heads(cache, kv.heads) or (None, None)))
    return parts


def scales_of_heads(cache: PagedKV, heads: int) -> tuple[Tensor, Tensor] | None:
    """fp32 ``[Hkv]`` of K and of V; None where tokens have them, or nothing has."""
    if cache.scales != "head":
        return None
    assert cache.k_scale is not None  # it has a kind
    k_scale = _of_each_head(cache.k_scale, heads)
    return k_scale, k_scale if cache.v_scale is None else _of_each_head(cache.v_scale, heads)


def _of_each_head(scale: Tensor, heads: int) -> Tensor:
    return scale.detach().reshape(-1).expand(heads)
