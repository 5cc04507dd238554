"""From checked arguments to a problem, and from the problem and the plan to a strategy and a backend."""

from __future__ import annotations

from typing import NamedTuple

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.call.arguments import Arguments
from cpattn.costs.decide import Decision, Setting
from cpattn.costs.known_machine import constants_of, machine_of
from cpattn.costs.order_or_pages import is_order_faster
from cpattn.exchange.auto import candidate_strategies
from cpattn.exchange.schedule import Schedule
from cpattn.exchange.strategy import Strategy
from cpattn.kv_cache import PagedKV, cached_heads
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem
from cpattn.stored import result_dtype
from cpattn.transports.transport import Transport


class Choice(NamedTuple):
    """What serves a problem.

    Attributes:
        schedule: of the strategy.
        decision: with what it was compared.
    """

    problem: Problem
    strategy: Strategy
    schedule: Schedule
    backend: Backend
    decision: Decision

    @property
    def reads_pages(self) -> bool:
        """Whether the backend attends to pages of the call as they are."""
        problem = self.problem
        return problem.cache == "paged" and not problem.expands and self.backend.attends_to_pages(problem)

    def writes_pages_after(self, problem: Problem, plan: Layout) -> bool:
        """See :attr:`cpattn.exchange.strategy.Setup.writes_pages_after`."""
        machine = self.decision.call.machine
        return is_order_faster(problem, plan, machine, constants_of(self.backend, machine, problem.device), self.reads_pages)


def problem_of(arguments: Arguments, meta: CPMetadata, options: AttentionOptions) -> Problem:
    """What checked arguments ask for."""
    q, k, v, cache = arguments.q, arguments.k, arguments.v, arguments.kv_cache
    if k is None:
        assert isinstance(cache, PagedKV)
        k, v = cache.k_pages, cache.v_pages
    is_paged, expands, dtype = isinstance(cache, PagedKV), arguments.expand is not None, result_dtype(q.dtype)
    return Problem(
        device=q.device,
        dtype=dtype,
        rows=meta.rows,
        # Those that a launch has; of queries that are split by heads each rank passes its share.
        q_heads=q.shape[1] * (meta.plan.cp_size if meta.plan.all_queries else 1),
        # A latent is expanded to keys and values of each query head.
        kv_heads=q.shape[1] if expands else k.shape[-2],
        head_dim=q.shape[2],
        v_head_dim=int(arguments.v_dim or 0) if v is None else v.shape[-1],
        v_in_k=v is None and not expands,
        scale=options.scale,
        # A cache of no tokens is none: all there is are new ones.
        cache="paged" if is_paged else "packed" if cache is not None and meta.plan.num_prefix_tokens else None,
        page_size=cache.page_size if isinstance(cache, PagedKV) else None,
        window=options.window,
        softcap=options.softcap,
        sinks=options.sinks is not None,
        fixed=meta.bucket is not None,
        max_requests=None if meta.bucket is None else meta.bucket.max_requests,
        overlap=int(arguments.overlap or 1),
        own_heads=cached_heads(cache) not in (None, k.shape[-2]),
        kv_dtype=cache.k_pages.dtype if isinstance(cache, PagedKV) and cache.k_pages.dtype != dtype else None,
        scales=cache.scales if isinstance(cache, PagedKV) else None,
        latent_dim=k.shape[-1] if expands else None,
        q_dtype=None if q.dtype == dtype else q.dtype,
    )


def choose(arguments: Arguments, problem: Problem, plan: Layout, transport: Transport | None = None) -> Choice:
    """Of what is asked for, and what can serve, the fastest by estimate. Raises UnknownNameError or UnsupportedError.

    Without a transport ranks are taken to be of one host, and to share memory where they have GPUs.
    """
    machine = (None if transport is None else transport.machine) or machine_of(problem.device)
    over_peers = problem.device.type == "cuda" if transport is None else transport.may_share_memory(problem.device)
    name = "peer_memory" if over_peers and machine.link("peer_memory", plan.cp_size) is not None else "collectives"
    groups = candidate_strategies(arguments.strategy, problem, plan)
    decision = Setting(plan, problem, machine, name).decide(groups, arguments.backend)
    way = decision.way
    return Choice(problem, way.strategy, way.schedule, way.backend, decision)
