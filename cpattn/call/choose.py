"""From checked arguments to a problem, and from the problem and the plan to a strategy and a backend."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpattn.attention.auto import COPIED_BYTE, Workload, choose_backend
from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.call.arguments import Arguments
from cpattn.errors import UnsupportedError
from cpattn.exchange.auto import candidate_strategies, only_decodes
from cpattn.exchange.schedule import Schedule, alignments, num_results
from cpattn.exchange.strategy import Strategy
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.kv_cache import PagedKV, cached_heads
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import View
from cpattn.problem import Problem


class Choice(NamedTuple):
    """What serves a problem.

    Attributes:
        schedule: of the strategy.
        workload: what the backend was chosen for.
    """

    problem: Problem
    strategy: Strategy
    schedule: Schedule
    workload: Workload
    backend: Backend


def problem_of(arguments: Arguments, meta: CPMetadata, options: AttentionOptions) -> Problem:
    """What checked arguments ask for."""
    q, k, v, cache = arguments.q, arguments.k, arguments.v, arguments.kv_cache
    if k is None:
        assert isinstance(cache, PagedKV)
        k, v = cache.k_pages, cache.v_pages
    is_paged = isinstance(cache, PagedKV)
    return Problem(
        device=q.device,
        dtype=q.dtype,
        rows=meta.rows,
        q_heads=q.shape[1],
        kv_heads=k.shape[-2],
        head_dim=q.shape[2],
        v_head_dim=int(arguments.v_dim or 0) if v is None else v.shape[-1],
        v_in_k=v is None,
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
    )


def choose(arguments: Arguments, problem: Problem, plan: Layout) -> Choice:
    """The first strategy that a backend, or the one asked for, can serve. Raises UnknownNameError or UnsupportedError."""
    refusal: UnsupportedError | None = None
    for strategy in candidate_strategies(arguments.strategy, problem, plan):
        schedule = strategy.schedule(problem, plan)
        workload = workload_of(schedule, plan, problem)
        try:
            return Choice(problem, strategy, schedule, workload, choose_backend(arguments.backend, problem, workload))
        except UnsupportedError as error:
            refusal = error
    assert refusal is not None  # there is at least one candidate
    raise refusal


def workload_of(schedule: Schedule, plan: Layout, problem: Problem) -> Workload:
    """What a schedule asks of a backend."""
    late = 0
    if plan.cp_size > 1 and problem.cache != "paged" and len(schedule) == 1 and schedule[0].keys == "all" and schedule[0].united == 1:
        # A bucket's choice stays whatever batch it holds.
        new = (plan.cp_size - 1) * problem.rows if problem.fixed else traveling_keys(problem, plan).needed
        late = int(problem.key_bytes * (new + int(View.of(plan).prefix.max()) * COPIED_BYTE))
    # Ranks that divide heads attend to each other's rows.
    num_extended = int(np.count_nonzero(plan.extend_lens))
    cut_among = plan.cp_size // schedule[0].united
    return Workload(
        alignments=alignments(schedule),
        merges=num_results(schedule) > 1,
        decodes=only_decodes(plan),
        new_tokens=plan.num_tokens // (cut_among * max(1, num_extended)),
        pairs=sum(plan.rank_pairs) // plan.cp_size,
        late_bytes=late,
    )
