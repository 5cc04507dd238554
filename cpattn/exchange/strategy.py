"""What a strategy is: a sequence of steps, and what they will ask of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from cpattn.attention.rows import Alignment, RaggedRows
from cpattn.exchange.communicator import Communicator
from cpattn.kv_cache import PackedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.plan import Plan


@dataclass(frozen=True, eq=False)
class Step:
    """One attention launch: this rank's queries against the keys at hand, ``k [S, Hkv, D]`` and ``v [S, Hkv, Dv]``.

    ``heads`` are the query heads that it is about, where the step is for some KV heads only; k and v then hold just those.
    """

    k: Tensor
    v: Tensor
    rows: RaggedRows
    heads: slice | None = None


@dataclass(frozen=True, eq=False)
class ExchangeInputs:
    """What a rank brings to the exchange, and how the exchange is to be made.

    Attributes:
        k, v: its physical rows.
        prefix: that of the whole batch, if the batch has one.
        num_heads: query heads.
        window: of the attention, or None.
        overlap: groups of KV heads into which an all-gather is split.
    """

    k: Tensor
    v: Tensor
    prefix: PackedKV | None
    num_heads: int
    window: int | None
    overlap: int


@dataclass(frozen=True)
class Strategy:
    """A way of bringing queries and keys together.

    Attributes:
        name: what ``strategy=`` takes.
        steps: yields the steps of one call, given what the rank brings, its metadata and the communicator.
            Before it yields a step it starts the transfer that the next one needs; whoever takes the steps computes
            each before asking for the next.
        num_steps: how many of them a query takes part in, for a plan and a window; the same on every rank.
        alignments: of the rows in these steps, for a plan and a window; the same on every rank.
    """

    name: str
    steps: Callable[[ExchangeInputs, CPMetadata, Communicator], Iterator[Step]]
    num_steps: Callable[[Plan, int | None], int]
    alignments: Callable[[Plan, int | None], frozenset[Alignment]]
