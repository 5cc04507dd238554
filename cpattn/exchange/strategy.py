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
    """One attention launch: this rank's queries against the keys at hand, ``k [S, Hkv, D]`` and ``v [S, Hkv, Dv]``."""

    k: Tensor
    v: Tensor
    rows: RaggedRows


@dataclass(frozen=True, eq=False)
class LocalKV:
    """What a rank brings to the exchange: its physical rows of K and V, and the prefix if the batch has one."""

    k: Tensor
    v: Tensor
    prefix: PackedKV | None


@dataclass(frozen=True)
class Strategy:
    """A way of bringing queries and keys together.

    Attributes:
        name: what ``strategy=`` takes.
        steps: yields the steps of one call, given the rank's K and V, its metadata, the communicator and the window.
            Before it yields a step it starts the transfer that the next one needs; whoever takes the steps computes
            each before asking for the next.
        num_steps: how many it yields, for a plan and a window; the same on every rank.
        alignments: of the rows in these steps, for a plan and a window; the same on every rank.
    """

    name: str
    steps: Callable[[LocalKV, CPMetadata, Communicator, int | None], Iterator[Step]]
    num_steps: Callable[[Plan, int | None], int]
    alignments: Callable[[Plan, int | None], frozenset[Alignment]]
