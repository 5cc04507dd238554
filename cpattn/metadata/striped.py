"""Striped: the owner rule of engines that spread each request's tokens over ranks by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from cpattn.device_tables import IntArray
from cpattn.errors import PlanError, shown
from cpattn.metadata.batch import MAX_TOKENS, is_integer

Positions = TypeVar("Positions", IntArray, Tensor)


@dataclass(frozen=True)
class Striped:
    """An owner rule: rank ``(position // interleave) % cp_size`` holds a token, cached or new, whoever computed it.

    >>> import cpattn
    >>> step = cpattn.plan([(5, 3)], cp_size=2, owner=cpattn.Striped(interleave=2))
    >>> step.shard_lens.tolist(), step.held_lens.tolist()  # positions 0 1 4 5 and 2 3 6 7, of which 5, 6 and 7 are new
    ([[3, 2]], [[4, 4]])

    On its rank a token is number ``position // (interleave * cp_size) * interleave + position % interleave`` of its request. So
    vLLM numbers them in decode context parallelism, with its ``cp_kv_cache_interleave_size`` for the interleave. SGLang
    stripes the slots of its pool: :meth:`by_slot`.

    Attributes:
        interleave: how many neighbours lie on a rank before the next rank's turn, at least 1.
    """

    interleave: int = 1

    def __post_init__(self) -> None:
        given: Any = self.interleave
        if not is_integer(given) or not 1 <= given <= MAX_TOKENS:
            raise PlanError(f"interleave={shown(given)}; pass the tokens that lie on a rank in turn, an integer from 1 to {MAX_TOKENS}")
        object.__setattr__(self, "interleave", int(given))

    @classmethod
    def by_slot(cls, page_size: int, cp_size: int) -> Striped:
        """The rule by which slot s of a pool lies on rank ``s % cp_size``, at ``s // cp_size`` there, as SGLang has it.

        >>> import cpattn
        >>> cpattn.Striped.by_slot(page_size=64, cp_size=4)
        Striped(interleave=1)

        It is one of positions only where each page begins at a multiple of cp_size. Page p of the pool is then page p of each
        rank, with ``page_size // cp_size`` tokens, and the page table is the pool's.

        Args:
            page_size: tokens of a page of the whole pool, over all ranks.
            cp_size: number of ranks.

        Raises:
            PlanError: page_size is no multiple of cp_size: which rank holds a token would depend on its page.
        """
        sizes: dict[str, Any] = {"page_size": page_size, "cp_size": cp_size}
        for name, size in sizes.items():
            if not is_integer(size) or not 1 <= size <= MAX_TOKENS:
                raise PlanError(f"{name}={shown(size)}; pass an integer from 1 to {MAX_TOKENS}")
        if page_size % cp_size:
            raise PlanError(
                f"page_size={page_size} with cp_size={cp_size}: pages do not begin at multiples of cp_size, so that a token's rank depends "
                "on its page rather than on its position; let the pool's page size be a multiple of the group's size"
            )
        return cls()

    def ranks(self, positions: Positions, cp_size: int) -> Positions:
        """Which rank holds the token of each position."""
        return positions // self.interleave % cp_size

    def numbers(self, positions: Positions, cp_size: int) -> Positions:
        """Its number among the request's tokens on that rank."""
        # No position is beyond the first turn of so many tokens; of int32 tensors a larger number would wrap.
        turn = min(self.interleave * cp_size, MAX_TOKENS)
        return positions // turn * self.interleave + positions % self.interleave

    def held(self, lengths: IntArray, cp_size: int) -> IntArray:
        """``[n, cp_size]`` how many of the first ``lengths [n]`` positions each rank holds."""
        turns, rest = np.divmod(lengths[:, None], self.interleave * cp_size)
        held: IntArray = turns * self.interleave + np.clip(rest - np.arange(cp_size) * self.interleave, 0, self.interleave)
        return held


def parse_owner(owner: Any) -> Striped:
    """The owner rule of a plan. Raises PlanError for anything else."""
    if not isinstance(owner, Striped):
        raise PlanError(
            f"owner={shown(owner)}; pass cpattn.Striped(interleave), or None; where each rank keeps what it computes, prefix_ranks "
            "or prefix_shards say what that is"
        )
    return owner
