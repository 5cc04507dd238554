"""Strategies that divide heads: ranks that follow each other exchange rows for heads, so that each has all of their rows, and another
strategy serves the groups of them as if each were one rank with a few of the heads.

Jacobs et al., DeepSpeed Ulysses, arXiv:2309.14509; of two dimensions, Fang and Zhao, USP, arXiv:2405.07719. In a group of all ranks
nothing travels but the two exchanges, and each rank attends to whole requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from cpattn.attention.merge import nothing_of_padding_
from cpattn.errors import UnsupportedError
from cpattn.exchange.all_gather import explain_gathered
from cpattn.exchange.attend import Attend
from cpattn.exchange.head_shares import HeadShare, head_shares
from cpattn.exchange.heads_message import HeadsBack, HeadsThere, Widths
from cpattn.exchange.message import heads_of, pages_of_heads
from cpattn.exchange.ring import RING
from cpattn.exchange.ring_keys import explain_ring_keys
from cpattn.exchange.schedule import Schedule, sends
from cpattn.exchange.strategy import IO, Prepared, Setup, Strategy
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.layout import Layout
from cpattn.metadata.united import UnitedRows, united_layout
from cpattn.noted import launch
from cpattn.problem import Problem
from cpattn.transports.alone import AloneTransport
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport


@dataclass(frozen=True, repr=False)
class DividedHeads(Strategy):
    """
    Attributes:
        within: the ranks of a group; None for all ranks.
        across: what serves the groups.
    """

    within: int | None = None
    across: Strategy | None = None

    def __repr__(self) -> str:
        return self.name

    @property
    def divides_heads(self) -> bool:
        """It does."""
        return True

    def group_size(self, plan: Layout) -> int:
        """The ranks of a group, of a plan's."""
        return self.within or plan.cp_size

    def served_by(self, plan: Layout) -> Strategy:
        """What serves the groups, where these have one rank and nothing to divide."""
        return self.across if self.across is not None and self.group_size(plan) == 1 else self

    def refusal(self, problem: Problem, plan: Layout) -> str | None:
        """As of any strategy, with the reason for what all of this kind refuse."""
        served_by = self.served_by(plan)
        if served_by is not self:
            return served_by.refusal(problem, plan)
        if problem.stored_dtype != problem.dtype and not plan.all_queries:
            return (
                "new heads travel in q's dtype, since who sends one has no scales of the pages that it goes to; pass pages in "
                f"{problem.dtype}, not {problem.stored_dtype}"
            )
        return super().refusal(problem, plan)


D = TypeVar("D", bound=DividedHeads)


def divide_heads(kind: type[D], name: str, within: int | None, across: Strategy, travels: str) -> D:
    """The strategy of groups of ``within`` ranks, or of all ranks, that ``across`` serves."""
    given = within, across
    return kind(
        name,
        schedule=partial(_schedule, *given),
        prepare=partial(_prepare, *given),
        forward=partial(_forward, across),
        why_not=partial(_why_not, *given),
        travels=travels,
        why_not_over=partial(_why_not_over, within),
        cached_heads=partial(_cached_heads, within),
        within=within,
        across=across,
    )


def explain_heads(strategy: DividedHeads, problem: Problem, plan: Layout) -> str:
    """Who has how many heads, in words, and what carries them."""
    size = strategy.group_size(plan)
    shares = shares_of(problem, size)
    q_heads = sorted({share.q_heads for share in shares})
    q_all, kv_all = problem.q_heads, problem.kv_heads
    counts = " or ".join(sorted({f"{share.q_heads} of {q_all} with {share.kv_heads} of {kv_all} KV" for share in shares}))
    uneven = f"; uneven, the busiest has {q_heads[-1] * size / problem.q_heads:.2f} times the mean" if len(q_heads) > 1 else ""
    whole = "" if size in (1, plan.cp_size) else f"; {plan.cp_size // size} such groups, all over collectives"
    return f"divided among {size} rank{'s' * (size > 1)}: {counts}{uneven}{whole}"


def explain_across(strategy: DividedHeads, problem: Problem, plan: Layout) -> str | None:
    """What keys travel across groups, in words, for the rank with the most heads; None where there is one group."""
    size, across = strategy.group_size(plan), strategy.across
    if size == plan.cp_size:
        return None
    in_words = explain_ring_keys if across is RING else explain_gathered
    return f"across groups, of its heads, {in_words(busiest_share(problem, plan, size), united_layout(plan, size))}"


def share_of(problem: Problem, plan: Layout, within: int, share: HeadShare) -> Problem:
    """What a rank asks for within its group: the rows of all of its ranks, and its share of the heads."""
    united = united_layout(plan, within)
    rows = within * problem.rows if problem.fixed else united.rows
    return replace(problem, rows=rows, q_heads=share.q_heads, kv_heads=share.kv_heads, overlap=1, own_heads=False)


def busiest_share(problem: Problem, plan: Layout, within: int) -> Problem:
    """The same of the rank with the most heads."""
    return share_of(problem, plan, within, max(shares_of(problem, within), key=lambda share: share.sizes))


def shares_of(problem: Problem, within: int) -> tuple[HeadShare, ...]:
    """Of each rank of a group."""
    return head_shares(problem.q_heads, problem.kv_heads, within)


def _unlike(shares: tuple[HeadShare, ...]) -> list[HeadShare]:
    """Of those that have as many heads one."""
    return list({share.sizes: share for share in shares}.values())


def _schedule(within: int | None, across: Strategy, problem: Problem, plan: Layout) -> Schedule:
    size = within or plan.cp_size
    if size == 1:
        return across.schedule(problem, plan)
    shares, united = shares_of(problem, size), united_layout(plan, size)
    schedules = {share.sizes: across.schedule(share_of(problem, plan, size, share), united) for share in _unlike(shares)}
    widths = Widths.of(problem, shares)
    hops = []
    for number, hop in enumerate(schedules[shares[0].sizes]):
        sent = np.stack([schedules[share.sizes][number].sent for share in shares], axis=1).ravel()
        hops.append(hop._replace(sent=sent, united=size))
    there, back = (sends(problem, plan, (size - 1) * problem.rows * width) for width in (widths.there, widths.back))
    hops[0] = hops[0]._replace(sent=hops[0].sent + there)
    hops[-1] = hops[-1]._replace(sent=hops[-1].sent + back)
    return tuple(hops)


class _Divided(NamedTuple):
    """
    Attributes:
        share: of this rank; slices_cache: whether a cache has all heads, of which this rank takes its own.
        inner: what the strategy across groups has prepared.
        token_index: of the metadata, where there is a bucket, whose tokens change in number; else None.
    """

    transfers: Sequence[Transfer]
    problem: Problem
    share: HeadShare
    slices_cache: bool
    there: HeadsThere
    back: HeadsBack
    inner: Prepared
    num_tokens: int
    token_index: Tensor | None


def _prepare(within: int | None, across: Strategy, setup: Setup) -> Prepared:
    problem, meta, transport = setup.problem, setup.meta, setup.transport
    size = within or transport.size
    if size == 1:
        return across.prepare(setup)
    outer, inner = _axes(transport, size)
    shares = shares_of(problem, size)
    share, rows = shares[inner.rank], UnitedRows.of(meta, size)
    there, back = HeadsThere.of(problem, inner, rows, shares), HeadsBack.of(problem, inner, rows, shares)
    held = across.prepare(
        setup._replace(problem=share_of(problem, meta.plan, size, share), meta=rows.meta, transport=outer, waits_for_keys=False)
    )
    return _Divided(
        transfers=(there.transfer, *held.transfers, back.transfer),
        problem=problem,
        share=share,
        slices_cache=not problem.own_heads and share.kv_heads < problem.kv_heads,
        there=there,
        back=back,
        inner=held,
        num_tokens=meta.num_tokens,
        token_index=None if meta.bucket is None else meta.token_index,
    )


def _axes(transport: Transport, within: int) -> tuple[Transport, Transport]:
    """The transports across groups, and within this rank's."""
    if within == transport.size:
        return AloneTransport(transport), transport
    across, inner = transport.split(transport.size // within, within)
    return across, inner


def _forward(across: Strategy, held: _Divided | Prepared, io: IO, attend: Attend) -> None:
    if not isinstance(held, _Divided):
        across.forward(held, io, attend)
        return
    problem, there, back = held.problem, held.there, held.back
    there.put(io.q, io.k, io.v)
    io.start().wait()
    there.arrange()
    mine = attend.of_heads(there.q, held.share.q)
    k, v = there.new.parts
    across.forward(held.inner, IO(there.q, k, v, _cache(held, io), io.start), mine)
    back.put(*mine.result())
    io.start().wait()
    out = io.q.new_empty(*io.q.shape[:2], problem.v_head_dim)
    lse = io.q.new_empty(io.q.shape[:2], dtype=torch.float32)
    back.take(out, lse)
    # What came for padding are zeros.
    launch(partial(nothing_of_padding_, num_tokens=held.num_tokens, token_index_T=held.token_index), lse)
    attend.finish(out, lse)


def _cache(held: _Divided, io: IO) -> PackedKV | PagedKV | None:
    """This rank's heads of it, where it lies."""
    cache, heads = io.cache, held.share.kv if held.slices_cache else None
    if heads is None or cache is None:
        return cache
    if isinstance(cache, PackedKV):
        return PackedKV(heads_of(cache.k, heads), heads_of(cache.v, heads))
    return pages_of_heads(cache, heads)


def _cached_heads(within: int | None, q_heads: int, kv_heads: int, cp_size: int, cp_rank: int) -> int | None:
    size = within or cp_size
    if cp_size % size or q_heads < size:
        return None
    return head_shares(q_heads, kv_heads, size)[cp_rank % size].kv_heads


def _why_not(within: int | None, across: Strategy, problem: Problem, plan: Layout) -> str | None:
    size = within or plan.cp_size
    if plan.cp_size % size:
        return f"it has groups of {size} ranks, and cp_size={plan.cp_size} is no multiple of that; pass a divisor of it as within="
    if size == 1:
        return across.why_not(problem, plan)
    if problem.q_heads < size:
        few = f"{problem.q_heads} query head{'s' * (problem.q_heads > 1)}"
        return f"each rank gets a query head at least, and {few} cannot be divided among {size} ranks; {_fewer(problem, plan)}"
    if plan.sharded:
        return "it divides heads, of all cached tokens, and a sharded cache has all heads of some; keep each rank's KV heads of all tokens"
    shares = shares_of(problem, size)
    if problem.cache == "paged" and not problem.own_heads and any(share.kv_heads < problem.kv_heads for share in shares):
        mine = " or ".join(map(str, sorted({share.kv_heads for share in shares})))
        return (
            f"pages of all {problem.kv_heads} KV heads want all heads of new tokens, and a rank gets {mine} of them; pass pages of a "
            "rank's own heads"
        )
    if size == plan.cp_size:
        # One group, across which nothing goes.
        return None
    united = united_layout(plan, size)
    if across is RING and united.is_callers and problem.fixed and problem.window is not None:
        # What its ranks' chunks make of a request depends on how the batch is cut.
        return (
            "with a window a ring across groups takes a launch for each chunk that a group has of a request; those change in number from "
            "batch to batch, and a bucket's graph cannot"
        )
    reasons = (across.why_not(share_of(problem, plan, size, share), united) for share in _unlike(shares))
    reason = next((reason for reason in reasons if reason is not None), None)
    return None if reason is None else f"across its groups: {reason}"


def _fewer(problem: Problem, plan: Layout) -> str:
    """What to do where query heads are fewer than the ranks of a group."""
    within = max(size for size in range(1, problem.q_heads + 1) if plan.cp_size % size == 0)
    if within > 1:
        return f"divide them among {within}: cpattn.hybrid({within})"
    cache = ", and a cache of all KV heads" * problem.own_heads
    return f"cp_size={plan.cp_size} has no divisor for cpattn.hybrid that is as small; pass a strategy that divides no heads{cache}"


def _why_not_over(within: int | None, transport: Transport) -> str | None:
    if within is None or within in (1, transport.size):
        return None
    try:
        transport.split(transport.size // within, within)
    except UnsupportedError as error:
        return str(error)
    return None
