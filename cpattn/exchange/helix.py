"""Strategy ``helix``: queries split by heads, keys by tokens. Each rank has the queries of its heads for all new tokens.

Bhatia et al., Helix Parallelism, arXiv:2507.07120; engines call it decode context parallelism. Tensor parallelism splits the
projections by heads, and the cache is split by tokens over the same ranks: one all-gather of the queries over heads, one launch of
all of them over the keys that a rank holds, one exchange in which the partial results of each head go to its rank, and are merged there.

K and V of the new tokens are those of all KV heads that the group's queries see, on each rank alike, as where KV heads are fewer
than ranks: each writes those of the tokens that it holds. So they need not travel, and rows that others hold are not looked at.
Pages may be in another dtype than q's: the new rows come as these have them, and all queries see what is in the pages.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.keys_at_hand import HeldShard
from cpattn.exchange.message import KVFormat
from cpattn.exchange.page_rows import Places, write_rows
from cpattn.exchange.ring import UNKNOWN_POSITIONS
from cpattn.exchange.schedule import Hop, Schedule, sends
from cpattn.exchange.step_spans import all_queries_alignment, all_queries_spans
from cpattn.exchange.strategy import IO, Setup, Strategy
from cpattn.kv_cache import PagedKV
from cpattn.metadata.layout import Layout
from cpattn.metadata.striped_places import kept_places
from cpattn.metadata.window_reach import require_positions
from cpattn.problem import Problem
from cpattn.spans import Spans
from cpattn.transports.transfer import Transfer


def _schedule(problem: Problem, plan: Layout) -> Schedule:
    size = plan.cp_size
    # Of a row each rank has its share of the heads, and sends it to all others; of the results each gets its own.
    sent = (size - 1) * problem.rows * (problem.query_bytes + problem.result_bytes) // size
    alignment = all_queries_alignment(plan, problem.window, problem.fixed)
    return (Hop("all", 0, alignment, results=size, sent=sends(problem, plan, sent)),)


class _Helix(NamedTuple):
    """
    Attributes:
        places: where this rank's rows go in its pages, -1 for those that others hold; None where all lie there already; kv: what they
            are there.
        held: what it holds then; spans: all queries over that.
        shares: the queries of each rank's heads, ``[cp_size, rows, Hq / cp_size, D]``; own: this rank's; queries: all heads of a row
            beside each other, ``[rows, Hq, D]``.
        sent, received: partial results, of each rank's heads and from each rank, ``[cp_size, rows, Hq / cp_size, Dv + 1]``.
    """

    transfers: tuple[Transfer, ...]
    places: Places | None
    kv: KVFormat
    held: HeldShard
    spans: Spans
    shares: Tensor | None
    own: Tensor | None
    queries: Tensor | None
    sent: Tensor | None
    received: Tensor | None

    @classmethod
    def of(cls, setup: Setup, writes: bool) -> _Helix:
        problem, meta, transport = setup.problem, setup.meta, setup.transport
        size, window = transport.size, problem.window
        if window is not None:
            meta.on_copy(require_positions)
        held = HeldShard.of(setup) if window is None else HeldShard.seen_through(setup, window)
        spans = all_queries_spans(meta, window, setup.reads_pages and window is None)
        places = kept_places(meta) if writes else None
        if size == 1:
            return cls((), places, setup.kv, held, spans, None, None, None, None, None)
        heads = problem.q_heads // size

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return transport.arena.buffer(name, shape, dtype, problem.device)

        shares = buffer("queries", (size, problem.rows, heads, problem.head_dim), problem.dtype)
        queries = buffer("all heads", (problem.rows, problem.q_heads, problem.head_dim), problem.dtype)
        of_results = size, problem.rows, heads, problem.v_head_dim + 1
        sent, received = (buffer(f"results {end}", of_results, problem.merge_dtype) for end in ("sent", "received"))
        own = shares[transport.rank]
        gather = transport.prepare_all_gather(shares, own)._replace(fill_missing=partial(own.fill_, torch.nan))
        exchange = transport.prepare_all_to_all(received, sent)._replace(fill_missing=partial(sent.fill_, torch.nan))
        return cls((gather, exchange), places, setup.kv, held, spans, shares, own, queries, sent, received)

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        cache = io.cache
        assert isinstance(cache, PagedKV)
        arriving = None
        if self.own is not None:
            self.own.copy_(io.q)
            arriving = io.start()
        if self.places is not None:
            write_rows(self.kv, cache, self.places, io.k, io.v)
        keys = self.held.keys(io)
        if arriving is None or self.shares is None or self.queries is None or self.sent is None or self.received is None:
            attend(keys, self.spans)
            return
        arriving.wait()
        size, rows, heads, _ = self.shares.shape
        self.queries.view(rows, size, heads, -1).copy_(self.shares.transpose(0, 1))
        out, lse = attend.others(self.queries, keys, [self.spans])
        self.sent[..., :-1].copy_(out.view(rows, size, heads, -1).transpose(0, 1))
        self.sent[..., -1].copy_(lse.view(rows, size, heads).transpose(0, 1))
        io.start().wait()
        attend.merge(self.received[..., :-1], self.received[..., -1])


def _forward(held: _Helix, io: IO, attend: Attend) -> None:
    held.forward(io, attend)


def _why_not(problem: Problem, plan: Layout) -> str | None:
    if not plan.all_queries:
        return "its queries are split by heads, and those of this plan by rows; pass queries='all' to cpattn.plan"
    return UNKNOWN_POSITIONS if problem.window is not None and not plan.knows_positions else None


_TRAVELS = "queries, and partial outputs back"
HELIX = Strategy("helix", _schedule, partial(_Helix.of, writes=True), _forward, _why_not, _TRAVELS, stored=True, queries="all")
RESIDENT_HELIX = Strategy("resident helix", _schedule, partial(_Helix.of, writes=False), _forward, _why_not, stored=True, queries="all")
"""Over pages that hold the new tokens already: nothing is written."""
