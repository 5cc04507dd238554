"""What strategies promise of their steps, on which the choice and the merging of backends rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from own_partitions import OwnPartition
from strategies import Batch, non_empty_batches

import cpattn
from cpattn.call import Arguments, _decide
from cpattn.exchange.message import KVFormat
from cpattn.exchange.registry import AUTO_GATHER_LIMIT, DECODE_TOKENS, candidate_strategies
from cpattn.exchange.strategy import ExchangeInputs, ExchangeSizes, Step, Steps
from cpattn.moves import torch_moves
from cpattn.spans import find_alignment
from cpattn.testing import SoloCommunicator
from cpattn.transports.in_flight import InFlight

# What each alignment can pass for.
FORMAT = KVFormat(heads=2, head_dim=4, v_head_dim=4, v_in_k=False, dtype=torch.float32, device=torch.device("cpu"))
FITS = {"bottom_right": {"bottom_right", "any"}, "full": {"full", "any"}, "any": {"any"}}


def steps_of(strategy: str, plan: cpattn.Plan, rank: int, window: int | None, overlap: int = 1) -> list[Step]:
    q, k = torch.zeros(plan.rows, 4, 4), torch.zeros(plan.rows, 2, 4)
    cached = torch.zeros(plan.num_prefix_tokens, 2, 4)
    prefix = cpattn.PackedKV(cached, cached) if plan.num_prefix_tokens else None
    sizes = ExchangeSizes.of(q.shape, FORMAT, prefix is not None, False, overlap)
    inputs = ExchangeInputs(q, k, k, FORMAT, prefix, False, window, sizes)
    meta, chosen = plan.metadata(rank), cpattn.STRATEGIES[strategy]
    with InFlight(SoloCommunicator(rank, plan.cp_size), meta.device) as in_flight:
        in_flight.expect(lambda: chosen.transfers(sizes, meta, in_flight.transport))
        return take(chosen.steps(inputs, meta, in_flight))


def take(steps: Steps) -> list[Step]:
    taken: list[Step] = []
    answer = None
    try:
        while True:
            step = steps.send(answer)
            answer = None
            if isinstance(step, Step):
                taken.append(step)
                if step.q is not None:
                    answer = torch.zeros(len(step.q), 4, 4), torch.zeros(len(step.q), 4)
    except StopIteration:
        return taken


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q", "pass_q_ring"])
@given(
    batch=non_empty_batches(),
    cp_size=st.integers(1, 6),
    partition=st.sampled_from(["zigzag", "contiguous"]) | st.builds(OwnPartition, st.integers(0, 10**6)),
    window=st.none() | st.integers(1, 90),
)
@settings(max_examples=40, deadline=None)
def test_steps_are_as_many_and_of_the_alignment_that_the_strategy_says(
    strategy: str, batch: Batch, cp_size: int, partition: str | OwnPartition, window: int | None
) -> None:
    plan = cpattn.plan(batch, cp_size, partition=partition)
    promised = cpattn.STRATEGIES[strategy].alignments(plan, window)
    for rank in range(cp_size):
        steps = steps_of(strategy, plan, rank, window)
        launches = sum(len(step.spans) * (cp_size - 1 if strategy == "pass_q" and step.q is not None else 1) for step in steps)
        assert launches == cpattn.STRATEGIES[strategy].num_steps(plan, window)
        for step in steps:
            for spans in step.spans:
                assert spans.alignment in promised
                host = spans.host
                assert FITS[find_alignment(host.q_len, host.k_start, host.k_len, host.diagonal)] & {spans.alignment, "any"}
                # All of q is covered, padding by queries without keys, and all ranges lie within the keys at hand.
                assert spans.num_queries == (plan.rows if step.q is None else len(step.q))
                assert (((host.k_start + host.k_len) <= step.keys.k.shape[0]) | (host.k_len == 0)).all()


@pytest.mark.parametrize("cp_size", [1, 4])
def test_a_ring_leaves_out_ranges_before_every_window(cp_size: int) -> None:
    plan = cpattn.plan([(1000, 400)], cp_size)
    prefix_step, *_ = steps_of("ring", plan, cp_size - 1, window=20)
    # Only the chunks that begin within 20 tokens of the prefix see any of it.
    starts = plan.metadata(cp_size - 1).chunk_host.start
    assert (prefix_step.spans[0].host.k_len == (1000 * (starts < 20 - 1))).all()


def test_groups_of_heads_cover_each_query_head_once() -> None:
    plan = cpattn.plan([(3, 20)], 2)
    steps = steps_of("all_gather", plan, 0, None, overlap=2)
    assert [step.heads for step in steps] == [slice(0, 2), slice(2, 4)]
    assert [step.keys.k.shape[1] for step in steps] == [1, 1]


def test_padding_is_zeroed_before_it_travels() -> None:
    message = torch.full((6, 2, 7), torch.nan)
    k, v = torch.randn(6, 2, 4), torch.randn(6, 2, 3)
    k[4:], v[4:] = torch.nan, torch.inf
    torch_moves.pack(message, k, v, 4)
    assert torch.equal(message[:4], torch.cat([k, v], -1)[:4])
    assert (message[4:] == 0).all()


def candidates(meta: cpattn.CPMetadata, kv: KVFormat, name: Any = "auto", heads: int = 4) -> list[str]:
    q = torch.zeros(meta.rows, heads, kv.head_dim, device="meta")
    return [strategy.name for strategy in candidate_strategies(name, q, kv, meta, None, None)]


def test_auto_takes_the_ring_where_gathered_keys_would_not_fit() -> None:
    token = FORMAT.heads * FORMAT.width * FORMAT.dtype.itemsize
    most = AUTO_GATHER_LIMIT // token
    assert candidates(cpattn.build_metadata([(most - 8, 8)], 1, 0), FORMAT)[:2] == ["all_gather", "ring"]
    assert candidates(cpattn.build_metadata([(most - 7, 8)], 1, 0), FORMAT)[:2] == ["ring", "all_gather"]


def test_auto_does_not_count_pages_that_stay_where_they_are() -> None:
    meta = cpattn.build_metadata([(2**17, 1)] * 64, 4, 0)
    wide = FORMAT._replace(heads=8, head_dim=128, v_head_dim=128)
    pages = torch.empty(1, 1, 8, 128)
    cache = cpattn.PagedKV(pages, pages, torch.zeros(64, 2**17 + 1, dtype=torch.int32))
    q = torch.zeros(meta.rows, 32, 128, device="meta")
    assert candidate_strategies("auto", q, wide, meta, cache, None)[0].name == "all_gather"


def test_auto_sends_what_is_smaller_where_the_cache_is_sharded() -> None:
    """Queries for decoding and for a short extend over a long prefix, keys for a long extend over a short one."""
    decode = cpattn.build_metadata([(8192, 1)] * 4, 4, 0, prefix_shards=[[2048] * 4] * 4)
    assert candidates(decode, FORMAT)[0] == "pass_q"
    prefill = cpattn.build_metadata([(64, 8192)], 4, 0, prefix_shards=[[16] * 4])
    assert candidates(prefill, FORMAT)[0] == "ring"
    wide = FORMAT._replace(head_dim=4096, v_head_dim=4096)
    assert candidates(cpattn.build_metadata([(2**20, 8192)], 4, 0, prefix_shards=[[2**18] * 4]), wide)[0] == "pass_q_ring"
    assert "all_gather" not in candidates(decode, FORMAT)


@pytest.mark.parametrize("new", [1, DECODE_TOKENS])
def test_auto_never_sends_a_sharded_cache_around_to_decode(new: int) -> None:
    """Not even where the cache is so short that its keys are fewer bytes than the queries and their results."""
    short = cpattn.build_metadata([(2, new)] * 8, 2, 0, prefix_shards=[[1, 1]] * 8)
    assert candidates(short, FORMAT, heads=32) == ["pass_q", "pass_q_ring"]
    # One prompt among them, and there is something to compare.
    mixed = cpattn.build_metadata([(2, new)] * 8 + [(2, DECODE_TOKENS + 1)], 2, 0, prefix_shards=[[1, 1]] * 9)
    assert candidates(mixed, FORMAT, heads=32)[0] == "ring"
    assert candidates(short, FORMAT, "ring", heads=32) == ["ring"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_all_gather_is_split_only_if_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """However much it brings."""
    meta = cpattn.build_metadata([(0, 2**20)], 4, 0)
    q, k, v = (torch.empty(1).expand(meta.rows, heads, 128) for heads in (8, 8, 8))
    monkeypatch.setattr(KVFormat, "device", property(lambda kv: torch.device(device)), raising=False)
    for overlap, groups in ((None, 1), (1, 1), (4, 4)):
        arguments = Arguments(q, k, v, None, None, "all_gather", "reference", overlap, None, None, None, None)
        assert _decide(arguments, meta, with_cache=True).sizes.overlap == groups


def test_an_unknown_strategy_of_any_type_is_refused() -> None:
    with pytest.raises(cpattn.UnknownNameError, match=r"strategy=\['ring'\] is unknown"):
        candidates(cpattn.build_metadata([(0, 4)], 1, 0), FORMAT, ["ring"])
