"""What a strategy is: a schedule as data, what one call needs of memory and transfers, and a plain function that makes the call.

A strategy brings queries and keys together. It says of each call in advance what it will send (``prepare``), so that a
rank on which the call raises can still carry all of it out. It attends to what is at hand by calling ``attend``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.key_order import Ordered
from cpattn.exchange.message import KVFormat
from cpattn.exchange.schedule import Schedule
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem
from cpattn.transports.transfer import Transfer, Work
from cpattn.transports.transport import Transport


def _never(problem: Problem, plan: Layout) -> bool:
    return False


class Setup(NamedTuple):
    """What a strategy prepares a kind of call from.

    Attributes:
        problem: what the call asks for.
        meta: this rank's metadata; its tables stay where they are, whatever batch a bucket's metadata come to hold.
        transport: over which the call goes; its ``arena`` has the memory.
        reads_pages: whether the backend attends to pages of the cache as they are.
        waits_for_keys: whether its launches wait for keys that come while they run (:class:`cpattn.keys.Arrivals`).
        reads_in_place: whether they read keys where those lie, beside others in order: prefixes (:class:`cpattn.keys.PrefixKeys`), and a
            rank's own new ones (:class:`cpattn.keys.OwnRows`).
        writes_pages_after: of a problem and a plan, whether an all-gather writes new keys to pages that every rank holds whole after the
            attention, and has that see them in order before (:mod:`cpattn.exchange.order_into_pages`).
    """

    problem: Problem
    meta: CPMetadata
    transport: Transport
    reads_pages: bool
    waits_for_keys: bool = False
    reads_in_place: bool = False
    writes_pages_after: Callable[[Problem, Layout], bool] = _never

    @property
    def kv(self) -> KVFormat:
        """How K and V of the call travel."""
        return KVFormat.of(self.problem)

    @property
    def ordered(self) -> Ordered:
        """Which keys have rows where a rank puts them in order."""
        if not self.reads_in_place:
            return Ordered.SEEN
        return Ordered.ALL_NEW if self.problem.cache == "paged" else Ordered.NOT_IN_PLACE

    @property
    def num_tokens(self) -> int | Tensor:
        """The rows of this rank that are tokens: a number, or of a bucket's batch a tensor of one element on the device."""
        return self.meta.num_tokens if self.meta.bucket is None else self.meta.token_count


class IO(NamedTuple):
    """What one call brings.

    Attributes:
        q, k, v: this rank's physical rows; v is None where V is the first columns of K.
        cache: of the whole batch, or, where prefixes are sharded, of what this rank holds; None if there is none.
        start: starts the next of the transfers that were prepared, in their order.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    cache: PackedKV | PagedKV | None
    start: Callable[[], Work]


class Prepared(Protocol):
    """What ``prepare`` returns: any object with the call's transfers; all else in it is the strategy's own."""

    @property
    def transfers(self) -> Sequence[Transfer]:
        """All that one call sends, in order: as many on every rank."""


@dataclass(frozen=True)
class Strategy:
    """A way of bringing queries and keys together.

    Attributes:
        name: what ``strategy=`` takes, and messages say.
        schedule: the hops of a call, the same on every rank. It must hold for all batches that a bucket's graph may replay
            where the problem is ``fixed``.
        prepare: memory, spans and transfers of a kind of call, made once and used by all layers of a batch.
        forward: makes one call, given what was prepared, what the call brings, and ``attend``. It starts all transfers, in
            their order, each before the attention that hides it, and waits for each before its memory is read.
        why_not: the reason why it cannot serve a problem and plan, or None; the same on every rank.
        travels: what it sends, in words.
        why_not_over: the reason why it cannot go over a transport, or None; the same on every rank.
        cached_heads: of a strategy that divides heads, of ``(q_heads, kv_heads, cp_size, cp_rank)``: how many KV heads a rank has. A cache
            may then have those alone. None where a rank has all.
        stored: whether it serves pages in another dtype than q's. New keys then come, travel and are attended to as
            :class:`cpattn.exchange.message.KVFormat` has them.
        expands: whether it serves latents, of which :func:`cpattn.cp_attention` expands what it attends to: all that
            :attr:`Setup.kv` describes may be one.
        queries: of which plans: ``"rows"`` where those are split by rows, ``"all"`` by heads, as of :func:`cpattn.plan`. It is
            not asked about others.
    """

    name: str
    schedule: Callable[[Problem, Layout], Schedule]
    prepare: Callable[[Setup], Prepared]
    forward: Callable[[Any, IO, Attend], None]
    why_not: Callable[[Problem, Layout], str | None] = lambda problem, plan: None
    travels: str = ""
    why_not_over: Callable[[Transport], str | None] = lambda transport: None
    cached_heads: Callable[[int, int, int, int], int | None] = lambda q_heads, kv_heads, cp_size, cp_rank: None
    stored: bool = False
    queries: str = "rows"
    expands: bool = False

    def served_by(self, plan: Layout) -> Strategy:
        """The strategy whose calls its own are: another one, where one of its two levels has a single rank."""
        return self

    @property
    def divides_heads(self) -> bool:
        """Whether a cache may have a rank's own heads alone."""
        return False

    def refusal(self, problem: Problem, plan: Layout) -> str | None:
        """The reason why it cannot serve a problem and plan, or None."""
        if plan.all_queries and self.queries == "rows":
            return "its queries are split by rows, and those of this plan by heads (queries='all')"
        if not self.stored and problem.stored_dtype != problem.dtype:
            return f"it takes pages in q's dtype alone, {problem.dtype}, not {problem.stored_dtype}"
        if not self.expands and problem.expands:
            return "it divides heads, and a latent has one; leave expand out, and pass queries and the latent in the absorbed form"
        if problem.own_heads and not self.divides_heads:
            return (
                "it attends to all KV heads, and the cache has a rank's own alone; pass a cache of all heads, or a strategy that divides "
                "them, such as 'ulysses'"
            )
        return self.why_not(problem, plan)
