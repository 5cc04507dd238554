"""What strategies promise of their hops, on which the choice and the merging of backends rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.strategies import Batch, non_empty_batches
from torch import Tensor

import cpattn
from cpattn.call.arguments import Arguments
from cpattn.call.find import prepare_call
from cpattn.costs.decide import Setting
from cpattn.exchange.auto import AUTO_GATHER_LIMIT, candidate_strategies
from cpattn.exchange.decodes import DECODE_TOKENS
from cpattn.exchange.schedule import Schedule, alignments, bytes_sent, hop_pairs, num_results
from cpattn.exchange.strategy import IO, Setup
from cpattn.exchange.ulysses import ULYSSES
from cpattn.keys import Keys
from cpattn.problem import Problem
from cpattn.spans import Spans, find_alignment
from cpattn.testing import SoloCommunicator
from cpattn.transports.in_flight import InFlight

# What each alignment can pass for.
FITS = {"bottom_right": {"bottom_right", "any"}, "full": {"full", "any"}, "any": {"any"}}
CPU = torch.device("cpu")


def problem_of(plan: cpattn.Plan, **changes: Any) -> Problem:
    cache = "packed" if plan.num_prefix_tokens and not plan.sharded else None
    sizes: dict[str, Any] = {"rows": plan.rows, "q_heads": 4, "kv_heads": 2, "head_dim": 4, "v_head_dim": 4, "cache": cache}
    return Problem(**{"device": CPU, "dtype": torch.float32, **sizes} | changes)


class Launch(NamedTuple):
    """What was attended to."""

    q: Tensor | None
    keys: Keys
    spans: Spans
    heads: slice | None = None


class Recorder:
    """In the place of :class:`cpattn.exchange.attend.Attend`."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, keys: Keys, spans: Spans) -> None:
        self.launches.append(Launch(None, keys, spans))

    def heads(self, keys: Keys, spans: Spans, heads: slice) -> None:
        self.launches.append(Launch(None, keys, spans, heads))

    def others(self, q: Tensor, keys: Keys, launches: Sequence[Spans]) -> tuple[Tensor, Tensor]:
        self.launches += [Launch(q, keys, spans) for spans in launches]
        return torch.zeros(len(q), 4, 4), torch.zeros(len(q), 4)

    def merge(self, out: Tensor, lse: Tensor) -> None:
        pass


def launches_of(strategy: str, plan: cpattn.Plan, rank: int, window: int | None, overlap: int = 1) -> list[Launch]:
    q, k = torch.zeros(plan.rows, 4, 4), torch.zeros(plan.rows, 2, 4)
    cached = torch.zeros(plan.num_prefix_tokens, 2, 4)
    prefix = cpattn.PackedKV(cached, cached) if plan.num_prefix_tokens else None
    meta, chosen, transport = plan.metadata(rank), cpattn.STRATEGIES[strategy], SoloCommunicator(rank, plan.cp_size)
    held = chosen.prepare(Setup(problem_of(plan, window=window, overlap=overlap), meta, transport, False))
    recorder: Any = Recorder()
    with InFlight(transport, meta.device) as in_flight:
        in_flight.expect(lambda: held.transfers)
        chosen.forward(held, IO(q, k, k, prefix, in_flight.start), recorder)
    launches: list[Launch] = recorder.launches
    return launches


def has_fewer_queries(schedule: Schedule, results: int) -> bool:
    """Whether fewer results than the schedule has are those of a rank to which no query comes, in some hop or at all."""
    of_others = sum(hop.results for hop in schedule if hop.queries != 0)
    return num_results(schedule) - of_others <= results < num_results(schedule)


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q", "pass_q_ring"])
@given(
    batch=non_empty_batches(),
    cp_size=st.integers(1, 6),
    partition=st.sampled_from(["zigzag", "contiguous", "whole"]),
    window=st.none() | st.integers(1, 90),
)
@settings(max_examples=40, deadline=None)
def test_launches_are_as_many_and_of_the_alignment_that_the_schedule_says(
    strategy: str, batch: Batch, cp_size: int, partition: str, window: int | None
) -> None:
    plan = cpattn.plan(batch, cp_size, partition=partition)
    schedule = cpattn.STRATEGIES[strategy].schedule(problem_of(plan, window=window), plan)
    for rank in range(cp_size):
        launches = launches_of(strategy, plan, rank, window)
        # One launch over the queries of all others gives a result to each of them.
        results = sum(cp_size - 1 if strategy == "pass_q" and launch.q is not None else 1 for launch in launches)
        assert results == num_results(schedule) or (strategy.startswith("pass_q") and has_fewer_queries(schedule, results))
        for q, keys, spans, _ in launches:
            assert spans.alignment in alignments(schedule)
            host = spans.host
            assert FITS[find_alignment(host.q_len, host.k_start, host.k_len, host.diagonal)] & {spans.alignment, "any"}
            # All of q is covered, padding by queries without keys, and all ranges lie within the keys at hand.
            assert spans.num_queries == (plan.rows if q is None else len(q))
            assert (((host.k_start + host.k_len) <= keys.k.shape[0]) | (host.k_len == 0)).all()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("strategy", cpattn.STRATEGIES)
@given(batch=non_empty_batches(), cp_size=st.integers(1, 6), partition=st.sampled_from(["zigzag", "whole"]), data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_pairs_of_all_hops_are_those_of_the_plan(
    strategy: str, sharded: bool, batch: Batch, cp_size: int, partition: str, data: Any
) -> None:
    shards = None
    if sharded:
        if strategy in ("all_gather", "ulysses"):
            return
        shards = [
            np.bincount([data.draw(st.integers(0, cp_size - 1)) for _ in range(prefix)], minlength=cp_size).tolist() for prefix, _ in batch
        ]
    plan = cpattn.plan(batch, cp_size, partition=partition, prefix_shards=shards)
    schedule = cpattn.STRATEGIES[strategy].schedule(problem_of(plan, q_heads=8), plan)
    pairs = [hop_pairs(plan, hop) for hop in schedule]
    # Whoever's queries they are, each pair is computed once.
    assert sum(int(each.sum()) for each in pairs) == sum(plan.rank_pairs)
    if strategy in ("all_gather", "ring"):
        assert tuple(np.sum(pairs, axis=0)) == plan.rank_pairs


@pytest.mark.parametrize("cp_size", [1, 4])
def test_a_ring_leaves_out_ranges_before_every_window(cp_size: int) -> None:
    plan = cpattn.plan([(1000, 400)], cp_size)
    prefix, *_ = launches_of("ring", plan, cp_size - 1, window=20)
    # Only the chunks that begin within 20 tokens of the prefix see any of it.
    starts = plan.metadata(cp_size - 1).chunk_host.start
    assert (prefix.spans.host.k_len == (1000 * (starts < 20 - 1))).all()


def test_groups_of_heads_cover_each_query_head_once() -> None:
    launches = launches_of("all_gather", cpattn.plan([(3, 20)], 2), 0, None, overlap=2)
    assert [launch.heads for launch in launches] == [slice(0, 2), slice(2, 4)]
    assert [launch.keys.k.shape[1] for launch in launches] == [1, 1]


def candidates(plan: cpattn.Plan, name: Any = "auto", **changes: Any) -> list[list[str]]:
    return [[strategy.name for strategy in group] for group in candidate_strategies(name, problem_of(plan, **changes), plan)]


def test_auto_takes_the_ring_where_gathered_keys_would_not_fit() -> None:
    most = AUTO_GATHER_LIMIT // problem_of(cpattn.plan([], 1)).key_bytes
    assert candidates(cpattn.plan([(most - 8, 8)], 2)) == [["all_gather", "ring", "ulysses"]]
    assert candidates(cpattn.plan([(most - 7, 8)], 2)) == [["ring"], ["all_gather"]]
    assert candidates(cpattn.plan([(most - 7, 8)], 1)) == [["all_gather"], ["ring"]]


def test_auto_divides_heads_where_it_can_and_the_messages_fit() -> None:
    plan = cpattn.plan([(0, 64)], 4)
    assert candidates(plan, q_heads=4, kv_heads=1) == [["all_gather", "ring", "ulysses"]]
    assert ULYSSES.refusal(problem_of(plan, q_heads=4, kv_heads=1), plan) is None
    for refused in ({"q_heads": 3, "kv_heads": 1}, {"cache": "paged", "page_size": 16}, {"overlap": 2}):
        assert candidates(plan, **{"q_heads": 4, "kv_heads": 4} | refused) == [["all_gather", "ring"]]
    # Queries and outputs of all heads travel, beside few keys.
    long = cpattn.plan([(0, 2**21)], 4)
    assert candidates(long, q_heads=128, kv_heads=1, head_dim=128, v_head_dim=128) == [["all_gather", "ring"]]


def test_auto_does_not_count_pages_that_stay_where_they_are() -> None:
    plan = cpattn.plan([(2**17, 1)] * 64, 4)
    found = candidates(plan, q_heads=32, kv_heads=8, head_dim=128, v_head_dim=128, cache="paged", page_size=1)
    assert found == [["all_gather", "ring"]]


def taken(plan: cpattn.Plan, **changes: Any) -> str:
    """Between GPUs that read each other's memory, eagerly."""
    sizes: dict[str, Any] = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "v_head_dim": 128, "dtype": torch.bfloat16}
    problem = problem_of(plan, cache="paged", page_size=16, **sizes | changes)
    setting = Setting(plan, problem, cpattn.MACHINES["h100-nvlink"], "peer_memory")
    return setting.decide(candidate_strategies("auto", problem, plan), "auto").way.strategy.name


def test_auto_takes_what_is_faster_where_the_cache_is_sharded() -> None:
    """Queries for decoding and for a short extend over a long prefix, keys for a long extend over a short one."""
    decode = cpattn.plan([(8192, 1)] * 4, 4, prefix_shards=[[2048] * 4] * 4)
    assert taken(decode) == "pass_q"
    assert taken(cpattn.plan([(131072, 64)], 4, prefix_shards=[[32768] * 4])) == "pass_q"
    assert taken(cpattn.plan([(64, 32768)], 4, prefix_shards=[[16] * 4])) == "ring"
    wide = cpattn.plan([(2**20, 8192)], 4, prefix_shards=[[2**18] * 4])
    assert candidates(wide, head_dim=4096, v_head_dim=4096) == [["pass_q_ring", "ring"], ["pass_q"]]


@pytest.mark.parametrize("new", [1, DECODE_TOKENS])
def test_auto_never_sends_a_sharded_cache_around_to_decode(new: int) -> None:
    """Not even where the cache is so short that its keys are fewer bytes than the queries and their results."""
    short = cpattn.plan([(2, new)] * 8, 2, prefix_shards=[[1, 1]] * 8)
    assert candidates(short, q_heads=32) == [["pass_q", "pass_q_ring"]]
    # One prompt among them, and there is something to compare.
    mixed = cpattn.plan([(2, new)] * 8 + [(2, DECODE_TOKENS + 1)], 2, prefix_shards=[[1, 1]] * 9)
    assert candidates(mixed, q_heads=32) == [["pass_q", "pass_q_ring", "ring"]]
    assert candidates(short, "ring", q_heads=32) == [["ring"]]


def test_an_all_gather_is_split_only_if_that_is_asked_for() -> None:
    """However much it brings."""
    meta, transport = cpattn.build_metadata([(0, 2**20)], 4, 0), SoloCommunicator(0, 4)
    x = torch.empty(1).expand(meta.rows, 8, 128)
    for overlap, groups in ((None, 1), (1, 1), (4, 4)):
        arguments = Arguments(x, x, x, strategy="all_gather", backend="reference", overlap=overlap)
        assert prepare_call(arguments, meta, transport).problem.overlap == groups


def test_an_unknown_strategy_of_any_type_is_refused() -> None:
    with pytest.raises(cpattn.UnknownNameError, match=r"strategy=\['ring'\] is unknown"):
        candidates(cpattn.plan([(0, 4)], 1), ["ring"])


def test_a_strategy_of_the_caller_is_taken_as_it_is() -> None:
    own = replace(cpattn.STRATEGIES["ring"], name="mine", why_not=lambda problem, plan: "it is Monday" if plan.num_tokens == 4 else None)
    assert candidate_strategies(own, problem_of(cpattn.plan([(0, 5)], 1)), cpattn.plan([(0, 5)], 1)) == [[own]]
    with pytest.raises(cpattn.UnsupportedError, match="strategy='mine' cannot serve this call: it is Monday; 'all_gather', 'ring', "):
        candidates(cpattn.plan([(0, 4)], 1), own)


def schedule_and_call(strategy: str, plan: cpattn.Plan, form: str, bucket: cpattn.Bucket | None, group: cpattn.Transport) -> None:
    """Makes a call and compares what was sent with what its schedule says."""
    meta = plan.metadata(group.rank, bucket=bucket)
    v_head_dim = 3 if form == "mla" else 4
    q, k = torch.randn(meta.rows, 4, 4), torch.randn(meta.rows, 1 if form == "mla" else 2, 4)
    v, v_dim = (None, v_head_dim) if form == "mla" else (torch.randn(meta.rows, 2, v_head_dim), None)
    cache: Any = None
    if form == "pages" or plan.sharded:
        requests = len(plan.batch) if bucket is None else bucket.max_requests
        pages = torch.randn(requests * 40, 4, k.shape[1], 4)
        cache = cpattn.PagedKV(
            pages, None if v is None else pages.clone(), torch.arange(requests * 40, dtype=torch.int32).view(requests, 40)
        )
    elif plan.num_prefix_tokens:
        cached = torch.randn(plan.num_prefix_tokens, k.shape[1], 4)
        cache = cpattn.PackedKV(cached, None if v is None else cached)
    before = group.bytes_sent
    call = cpattn.prepare(q, k, v, meta, v_dim=v_dim, kv_cache=cache, strategy=strategy, backend="reference", group=group)
    assert group.bytes_sent == before
    call(q, k, v, cache)
    said: Schedule = call.schedule
    assert group.bytes_sent - before == bytes_sent(said)[group.rank]


@pytest.mark.parametrize("form", ["dense", "pages", "mla"])
@pytest.mark.parametrize("cache", ["none", "whole", "sharded", "striped"])
@pytest.mark.parametrize("strategy", cpattn.STRATEGIES)
def test_what_is_sent_is_what_the_schedule_says(strategy: str, cache: str, form: str) -> None:
    from cpattn.testing import run_loopback

    new = [(7 if cache != "none" else 0, 11), (0, 1), (30 if cache != "none" else 0, 2)]
    # A bucket sends its rows, also where its batch has nothing new.
    for batch, cp_size in ((new, 1), (new, 2), (new, 3), ([(prefix, 0) for prefix, _ in new], 2)):
        shards = [[prefix - (cp_size - 1), *[1] * (cp_size - 1)] if prefix else [0] * cp_size for prefix, _ in batch]
        owner = cpattn.Striped(2) if cache == "striped" else None
        plan = cpattn.plan(batch, cp_size, prefix_shards=shards if cache == "sharded" else None, owner=owner)
        problem = problem_of(plan, cache="paged" if form == "pages" or plan.sharded else None)
        if cpattn.STRATEGIES[strategy].refusal(problem, plan) is not None:
            continue
        for bucket in (None, cpattn.Bucket(4, 20, 12, max_seqlen=160)):
            if bucket is not None and ((cache == "whole" and form != "pages") or replace_fixed(strategy, problem, plan)):
                continue
            run_loopback(partial(schedule_and_call, strategy, plan, form, bucket), cp_size)


def replace_fixed(strategy: str, problem: Problem, plan: cpattn.Plan) -> bool:
    """Whether it cannot serve such a bucket."""
    return cpattn.STRATEGIES[strategy].refusal(replace(problem, fixed=True), plan) is not None


def test_nothing_is_sent_where_there_is_nothing_new() -> None:
    plan = cpattn.plan([(5, 0), (0, 0)], 3)
    for strategy in cpattn.STRATEGIES.values():
        assert not bytes_sent(strategy.schedule(problem_of(plan), plan)).any()
