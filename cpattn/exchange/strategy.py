"""What a strategy is: a sequence of steps, and what they will ask of a backend."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from cpattn.exchange.message import KVFormat
from cpattn.keys import Keys
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.plan import Plan
from cpattn.spans import Alignment, Spans
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transport import Transfer, Transport


# Named tuples, as they are made anew in every call.
class Step(NamedTuple):
    """Attention over the keys at hand, one launch for each of ``spans``.

    Without ``q`` this rank's own queries attend, and the result is merged with what they have seen before. ``heads``
    are then the query heads that the step is about, where it is for some KV heads only; the keys hold just those.
    With ``q``, other ranks' queries attend, and their result ``(out, lse)`` goes back to the strategy: fp32 as far as
    the backend gives it.
    """

    keys: Keys
    spans: list[Spans]
    heads: slice | None = None
    q: Tensor | None = None


class Partials(NamedTuple):
    """What this rank's queries have seen elsewhere, to be merged: out ``[n, rows, Hq, Dv]``, lse ``[n, rows, Hq]``."""

    out: Tensor
    lse: Tensor


# What a strategy yields; a Step with q is answered with its result.
Steps: TypeAlias = Generator[Step | Partials, "tuple[Tensor, Tensor] | None", None]


class ExchangeSizes(NamedTuple):
    """What the memory of a call's messages follows from, the same on every rank.

    Attributes:
        q_shape: of a rank's queries ``[rows, Hq, D]``.
        format: of K and V, and the device of all.
        has_cache: whether prefixes come with the call.
        is_paged: whether they lie in pages.
        overlap: groups of KV heads into which an all-gather is split.
        group: the format of one of them.
    """

    q_shape: torch.Size
    format: KVFormat
    has_cache: bool
    is_paged: bool
    overlap: int
    group: KVFormat

    @classmethod
    def of(cls, q_shape: torch.Size, format: KVFormat, has_cache: bool, is_paged: bool, overlap: int) -> ExchangeSizes:
        """Worked out once for all layers that are decided alike."""
        return cls(q_shape, format, has_cache, is_paged, overlap, format._replace(heads=format.heads // overlap))


class ExchangeInputs(NamedTuple):
    """What a rank brings to the exchange, and how the exchange is to be made.

    Attributes:
        q, k, v: its physical rows; v is None where V is the first columns of K.
        format: of K and V.
        cache: of the whole batch, or, where prefixes are sharded, of what this rank holds; None if there is none.
        reads_pages: whether the backend can attend to the cache's pages as they are.
        window: of the attention, or None.
        sizes: of what is sent.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    format: KVFormat
    cache: PackedKV | PagedKV | None
    reads_pages: bool
    window: int | None
    sizes: ExchangeSizes


class CountSteps(Protocol):
    """How many results are merged for a query."""

    def __call__(self, plan: Plan, window: int | None, fixed: bool = False) -> int: ...


class FindAlignments(Protocol):
    """The alignments of the spans in a strategy's steps."""

    def __call__(self, plan: Plan, window: int | None, fixed: bool = False) -> frozenset[Alignment]: ...


@dataclass(frozen=True)
class Strategy:
    """A way of bringing queries and keys together.

    Attributes:
        name: what ``strategy=`` takes.
        transfers: all that one call will send, in order: as many on every rank.
        steps: yields the steps of one call, given what the rank brings, its metadata and the transfers in flight.
            Before it yields a step it starts the transfer that the next one needs; whoever takes the steps computes
            each before asking for the next. It starts all transfers, in their order, and waits for each.
        num_steps: how many results are merged for a query, for a plan and a window; the same on every rank. ``fixed`` says
            that it is to be as many as for any plan that a bucket's graph may replay.
        alignments: of the spans in these steps, for a plan and a window, or any plan that may be replayed; the same on every
            rank.
        why_not: the reason why it can not serve a plan with such a cache, window and bucket, or None if it can; the same
            on every rank.
    """

    name: str
    transfers: Callable[[ExchangeSizes, CPMetadata, Transport], list[Transfer]]
    steps: Callable[[ExchangeInputs, CPMetadata, InFlight], Steps]
    num_steps: CountSteps
    alignments: FindAlignments
    why_not: Callable[[CPMetadata, PackedKV | PagedKV | None, int | None], str | None]
