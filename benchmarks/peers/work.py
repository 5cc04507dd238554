"""The batch that all variants attend to, and what a variant makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Heads(NamedTuple):
    """Of the model: query heads, key/value heads, and their width."""

    query: int
    kv: int
    dim: int


@dataclass(frozen=True)
class Work:
    """One batch over a group of ranks; the tensors are whole, and the same on every rank.

    Attributes:
        batch: (prefix_len, extend_len) of each request.
        rank, size: in the group.
        q: ``[tokens, Hq, D]``, and k, v ``[tokens, Hkv, D]``: the new tokens of all requests, in order.
        prefix_k, prefix_v: the cached tokens of all requests, in order.
        group: of those ranks; None for all there are.
        kept: what variants have made of it and share, by what it is.
    """

    batch: list[tuple[int, int]]
    rank: int
    size: int
    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    group: dist.ProcessGroup | None = None
    kept: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def random(cls, batch: list[tuple[int, int]], rank: int, size: int, heads: Heads, like: Tensor) -> Work:
        """Of normal numbers, of that tensor's dtype and on its device."""
        generator = torch.Generator(like.device).manual_seed(0)

        def normal(rows: int, heads_of_it: int) -> Tensor:
            return torch.randn(rows, heads_of_it, heads.dim, dtype=like.dtype, device=like.device, generator=generator)

        tokens, cached = (sum(lengths) for lengths in (cls._column(batch, 1), cls._column(batch, 0)))
        q, k, v = normal(tokens, heads.query), normal(tokens, heads.kv), normal(tokens, heads.kv)
        return cls(batch, rank, size, q, k, v, normal(cached, heads.kv), normal(cached, heads.kv))

    def over(self, group: dist.ProcessGroup | None, rank: int, size: int) -> Work:
        """The same batch over another group, in which this rank is that one."""
        return replace(self, group=group, rank=rank, size=size)

    @staticmethod
    def _column(batch: list[tuple[int, int]], which: int) -> list[int]:
        return [request[which] for request in batch]

    @cached_property
    def prefixes(self) -> list[int]:
        return self._column(self.batch, 0)

    @cached_property
    def extends(self) -> list[int]:
        return self._column(self.batch, 1)

    @property
    def tokens(self) -> int:
        """New tokens of the whole batch."""
        return len(self.q)

    @property
    def device(self) -> torch.device:
        return self.q.device

    def int32(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)


class Call(NamedTuple):
    """One rank's part of a layer's attention.

    Attributes:
        run: makes the call and returns this rank's rows ``[rows, Hq, D]``.
        tokens: which of the batch's new tokens each row is, int64; None where the result is not that of the batch.
        close: undoes what the call needs while it exists.
        way: what it has chosen by itself, as "strategy, backend"; empty where it chooses nothing.
    """

    run: Callable[[], Tensor]
    tokens: Tensor | None
    close: Callable[[], object] = lambda: None
    way: str = ""


class Unserved(Exception):
    """The variant does not have what the batch needs; the message says what."""


def starts(lengths: Iterable[int]) -> list[int]:
    """Where each of the ranges begins that follow one another, and where the last one ends."""
    return list(accumulate(lengths, initial=0))


def need_no_prefix(work: Work, who: str) -> None:
    if any(work.prefixes):
        raise Unserved(f"{who} has no cached prefixes")


def need_multiple(work: Work, lengths: Iterable[int], of: int, who: str) -> None:
    if any(length % of for length in lengths):
        raise Unserved(f"{who} needs lengths that are multiples of {of} for {work.size} ranks")
