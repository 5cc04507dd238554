"""Striped caches against a plain model: position to rank to slot, one token after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import STRIPED_EXCHANGES, AttentionCase
from inputs.strategies import Batch, batches, non_empty_batches
from programs.failed_calls import Faults, attend_with_faults, check_partly_failed
from torch import Tensor

import cpattn
from cpattn.byte_sizes import in_words
from cpattn.exchange.auto import candidate_strategies
from cpattn.exchange.schedule import hop_pairs
from cpattn.testing import oracle_attention, run_loopback

cp_sizes = st.sampled_from([1, 2, 3, 5, 7])
interleaves = st.sampled_from([1, 1, 2, 3, 16])
partitions = st.sampled_from(["zigzag", "contiguous", "whole"])


def slots_of(length: int, interleave: int, cp_size: int) -> list[tuple[int, int]]:
    """The rank of each position, and how many tokens of the request that rank has before it."""
    taken, slots = [0] * cp_size, []
    for position in range(length):
        rank = position // interleave % cp_size
        slots.append((rank, taken[rank]))
        taken[rank] += 1
    return slots


@st.composite
def striped_cases(draw: st.DrawFn, window: bool = False) -> AttentionCase:
    batch = draw(batches(max_requests=6))
    longest = max((sum(request) for request in batch), default=0)
    if window and longest < 2:
        batch, longest = [(5, 4), *batch], 9
    return AttentionCase(
        batch,
        kv_heads=draw(st.sampled_from([1, 2, 4])),
        v_in_k=draw(st.booleans()),
        v_head_dim=8,
        sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        window=draw(st.integers(1, longest - 1)) if window else None,
        cache="striped",
        page_size=draw(st.sampled_from([1, 3, 16])),
        interleave=draw(interleaves),
        seed=draw(st.integers(0, 1000)),
    )


@given(batch=batches(), cp_size=cp_sizes, interleave=interleaves)
@settings(max_examples=60, deadline=None)
def test_the_rule_is_that_of_the_model(batch: Batch, cp_size: int, interleave: int) -> None:
    plan = cpattn.plan(batch, cp_size, owner=cpattn.Striped(interleave))
    for (prefix, extend), before, after in zip(batch, plan.shard_lens.tolist(), plan.held_lens.tolist(), strict=True):
        slots = slots_of(prefix + extend, interleave, cp_size)
        for counted, length in ((before, prefix), (after, prefix + extend)):
            assert counted == [sum(rank == other for rank, _ in slots[:length]) for other in range(cp_size)]
        assert plan.owner is not None
        on_host: Any = np.arange(len(slots))
        for positions in (on_host, torch.from_numpy(on_host)):
            found = plan.owner.ranks(positions, cp_size).tolist(), plan.owner.numbers(positions, cp_size).tolist()
            assert list(zip(*found, strict=True)) == slots


@pytest.mark.parametrize("interleave", [2**29, 2**31 - 1])
def test_one_turn_is_longer_than_int32_counts(interleave: int) -> None:
    """All that there is lies on the first rank."""
    case = AttentionCase([(3, 7)], cache="striped", interleave=interleave)
    case.check_loopback(case.plan(4), "pass_q", "reference")


@pytest.mark.parametrize(("strategy", "cache"), STRIPED_EXCHANGES)
@given(case=striped_cases(), cp_size=cp_sizes, partition=partitions, pad_to=st.sampled_from([1, 4]))
@settings(max_examples=25, deadline=None)
def test_any_batch(strategy: str, cache: str, case: AttentionCase, cp_size: int, partition: str, pad_to: int) -> None:
    """Results, what is written, and that nothing else is; with a kernel that reads pages, and one that is given a copy."""
    plan = case.plan(cp_size, partition=partition, pad_to=pad_to)
    for backend in ("reference", "cpu"):
        case.check_loopback(plan, strategy, backend)


@pytest.mark.parametrize("cache", ["striped", "ranked"])
@given(case=striped_cases(window=True), cp_size=cp_sizes, partition=partitions, pad_to=st.sampled_from([1, 4]))
@settings(max_examples=15, deadline=None)
def test_any_window(cache: str, case: AttentionCase, cp_size: int, partition: str, pad_to: int) -> None:
    case.cache = cache
    plan = case.plan(cp_size, partition=partition, pad_to=pad_to)
    for strategy in ("all_gather", "pass_q"):
        case.check_loopback(plan, strategy, "reference")


def test_auto_brings_what_a_window_reaches_but_to_decode() -> None:
    for batch, first in (([(90, 1), (30, 4)], "pass_q"), ([(90, 1), (30, 20)], "all_gather")):
        case = AttentionCase(batch, cache="striped", window=9)
        plan = case.plan(2)
        assert candidate_strategies("auto", case.problem(plan), plan)[0][0].name == first


@pytest.mark.parametrize("strategy", ["all_gather", cpattn.two_level(2)], ids=str)
def test_explain_says_what_a_window_reaches(strategy: Any) -> None:
    """8 keys of each prefix, of which either rank holds half; in bytes what a call sends."""
    case = AttentionCase([(90, 12), (30, 4)], cache="striped", window=9, page_size=4)
    plan = case.plan(2)

    def program(group: cpattn.Transport) -> tuple[str, int]:
        meta, cache = plan.metadata(group.rank), case.pages(plan, group.rank).cache
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=cache, window=9, strategy=strategy)
        return cpattn.explain(q, k, v, meta, kv_cache=cache, window=9, strategy=strategy)["keys"], group.bytes_sent

    new, cached = (rows * 2 * 2 * 16 * 4 for rows in (8, 8))
    said = (
        f"a rank receives all new ones, {in_words(new)}, and of the cached ones what the window reaches, {in_words(cached)}: "
        "the busiest rank receives or sends 100% of all, which is above 67%"
    )
    assert run_loopback(program, 2) == [(said, new + cached)] * 2


@pytest.mark.parametrize("strategy", ["pass_q", "pass_q_ring", "ring"])
def test_new_keys_travel_in_the_messages_that_there_are_anyway(strategy: str) -> None:
    """As many as where each rank keeps what it computes."""
    counts = []
    for cache in ("sharded", "striped"):
        case = AttentionCase([(40, 9), (9, 1)], cache=cache)
        plan = case.plan(3)

        def program(group: cpattn.Transport, case: AttentionCase = case, plan: cpattn.Plan = plan) -> int:
            meta, pages = plan.metadata(group.rank), case.pages(plan, group.rank).cache
            q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
            return len(cpattn.prepare(q, k, v, meta, kv_cache=pages, strategy=strategy, group=group).transfers())

        counts.append(run_loopback(program, 3))
    assert counts[0] == counts[1]


def test_in_decoding_a_window_puts_no_keys_in_order() -> None:
    """There are many of them, and tables of them would cost more than the attention."""
    case = AttentionCase([(90, 1), (30, 1)], cache="striped", window=9)
    plan = case.plan(2)

    def program(group: cpattn.Transport) -> set[Any]:
        meta, cache = plan.metadata(group.rank), case.pages(plan, group.rank).cache
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=cache, window=9)
        return set(meta._derived)

    for made in run_loopback(program, 2):
        assert ("reached places", 9) in made
        assert not made & {("order in messages", 9), ("owned in messages", 9)}


def attend_to_written(case: AttentionCase, plan: cpattn.Plan, backend: str, bucket: cpattn.Bucket | None, group: cpattn.Transport) -> Any:
    """A rank's call over pages in which the new tokens lie already."""
    meta = plan.metadata(group.rank, bucket=bucket)
    pages = case.pages(plan, group.rank, max_requests=bucket.max_requests if bucket else None)
    cache = replace(pages.cache, k_pages=pages.expected_k.clone(), v_pages=None if case.v_in_k else pages.expected_v.clone())  # type: ignore[union-attr]
    q = cpattn.shard(case.q, meta)
    q[meta.num_tokens :] = torch.nan
    v_dim = case.v.shape[2] if case.v_in_k else None
    options: dict[str, Any] = case.options | {"v_dim": v_dim}
    found = cpattn.attend(q, cache, meta, group=group, backend=backend, return_lse=True, check=True, **options)
    # Nothing was written.
    pages.cache = cache
    pages.check_written()
    return [cpattn.unshard(x, meta, group=group)[: plan.num_tokens] for x in found]


@pytest.mark.parametrize(("cache", "window"), [("striped", False), ("sharded", False), ("striped", True), ("ranked", True)])
@given(data=st.data(), cp_size=cp_sizes, partition=partitions, backend=st.sampled_from(["reference", "cpu"]), fixed=st.booleans())
@settings(max_examples=20, deadline=None)
def test_attend_over_shards_that_hold_all(
    cache: str, window: bool, data: st.DataObject, cp_size: int, partition: str, backend: str, fixed: bool
) -> None:
    case = data.draw(striped_cases(window=window))
    case.cache, backend = cache, "reference" if window else backend
    plan = case.plan(cp_size, partition=partition)
    chunks = max([1, *plan.rank_chunks])
    bucket = cpattn.Bucket(len(case.batch) + 1, plan.rows + 2, chunks, 400) if fixed and backend == "reference" else None
    outputs = run_loopback(lambda group: attend_to_written(case, plan, backend, bucket, group), cp_size)
    case.check([(out, lse) for out, lse in outputs], plan, "pass_q", backend)


@pytest.mark.parametrize(
    ("strategy", "cache"), [*STRIPED_EXCHANGES, ("all_gather", "striped"), ("all_gather", "ranked"), ("pass_q", "ranked")]
)
@given(data=st.data(), batch=non_empty_batches(max_requests=5), cp_size=st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_a_fault_anywhere_keeps_ranks_in_step(strategy: str, cache: str, data: st.DataObject, batch: Batch, cp_size: int) -> None:
    window = 6 if strategy == "all_gather" or cache == "ranked" else None
    case = AttentionCase([*batch, (9, 8)], cache=cache, page_size=5, interleave=2, window=window)
    then = AttentionCase([(0, 31), (14, 17), (27, 1), (10, 0)], cache=cache, page_size=5, interleave=3, window=window)
    plan, then_plan = case.plan(cp_size), then.plan(cp_size)
    faults = Faults({data.draw(st.integers(0, cp_size - 1)): data.draw(st.integers(0, 400))})

    def program(group: cpattn.Communicator) -> Any:
        first = attend_with_faults(case, plan, group, group.rank, strategy, "reference", faults)
        return first, then.on_rank(then_plan, group.rank, group, strategy, "reference", check=True)

    results = run_loopback(program, cp_size, timeout=20)
    check_partly_failed(case, plan, strategy, [first for first, _ in results])
    then.check([second for _, second in results], then_plan, strategy, "reference")


@pytest.mark.parametrize("strategy", ["ring", "pass_q", "pass_q_ring"])
@given(batch=non_empty_batches(), cp_size=cp_sizes, interleave=interleaves, partition=partitions)
@settings(max_examples=15, deadline=None)
def test_each_pair_is_computed_once(strategy: str, batch: Batch, cp_size: int, interleave: int, partition: str) -> None:
    plan = cpattn.plan(batch, cp_size, partition=partition, owner=cpattn.Striped(interleave))
    problem = cpattn.Problem(torch.device("cpu"), torch.float32, plan.rows, 4, 2, 8, 8, cache="paged", page_size=4)
    schedule = cpattn.STRATEGIES[strategy].schedule(problem, plan)
    assert sum(int(hop_pairs(plan, hop).sum()) for hop in schedule) == sum(plan.rank_pairs)


class Engine:
    """vLLM's own numbering: one block table on every rank, with as many blocks as the rank with the most tokens needs, and slots
    that it works out itself. Blocks that nobody has hold NaN, which a read would show."""

    def __init__(self, group: cpattn.Transport, block_size: int, interleave: int, names: str) -> None:
        self.group, self.block_size, self.interleave = group, block_size, interleave
        self.blocks: dict[str, list[int]] = {name: [] for name in names}
        self.free = torch.randperm(64, generator=torch.Generator().manual_seed(7)).tolist()
        self.k, self.v = torch.full((2, 64, block_size, 2, 8), torch.nan).unbind()

    def step(self, lengths: dict[str, tuple[int, int]], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        size, virtual = self.group.size, self.block_size * self.group.size
        for name, (prefix, new) in lengths.items():
            while len(self.blocks[name]) * virtual < prefix + new:
                self.blocks[name].append(self.free.pop())
        width = max(map(len, self.blocks.values()))
        # Beyond a request's blocks lies whatever an earlier request has left there: numbers of blocks that are others'.
        table = torch.tensor([self.blocks[name] + [self.free[0]] * (width - len(self.blocks[name])) for name in lengths])
        plan = cpattn.plan(list(lengths.values()), size, owner=cpattn.Striped(self.interleave), **options)
        meta = plan.metadata(self.group.rank)
        q, local_k, local_v = (cpattn.shard(x, meta) for x in (q, k, v))
        before = self.k.clone()
        out = cpattn.cp_attention(q, local_k, local_v, meta, group=self.group, kv_cache=cpattn.PagedKV(self.k, self.v, table))
        self._check_slots(before, lengths, k)
        return cpattn.unshard(out, meta, group=self.group)

    def _check_slots(self, before: Tensor, lengths: dict[str, tuple[int, int]], k: Tensor) -> None:
        size, interleave, row = self.group.size, self.interleave, 0
        for name, (prefix, new) in lengths.items():
            for position in range(prefix, prefix + new):
                virtual = position % (self.block_size * size)
                if virtual // interleave % size == self.group.rank:
                    block = self.blocks[name][position // (self.block_size * size)]
                    before[block, virtual // (interleave * size) * interleave + virtual % interleave] = k[row]
                row += 1
        assert torch.equal(before.nan_to_num(1e9), self.k.nan_to_num(1e9))


@pytest.mark.parametrize(("cp_size", "block_size", "interleave"), [(2, 4, 1), (3, 4, 4), (4, 2, 1), (3, 6, 2)])
def test_an_engine_with_its_own_blocks(cp_size: int, block_size: int, interleave: int) -> None:
    """Prefill in chunks, decode and drafts that are rejected, in steps of which vLLM's slots are worked out anew."""
    torch.manual_seed(0)
    scripts = {name: torch.randn(3, 60, 4, 8) for name in "ab"}
    steps = [{"a": (0, 13), "b": (0, 1)}, {"a": (13, 1), "b": (1, 17)}, {"b": (18, 4), "a": (14, 4)}, {"a": (15, 1), "b": (21, 1)}]
    steps += [{"a": (16 + n, 1), "b": (22 + n, 1)} for n in range(9)]

    def program(group: cpattn.Transport) -> list[Tensor]:
        engine, outs = Engine(group, block_size, interleave, "ab"), []
        for number, step in enumerate(steps):
            q, k, v = (torch.cat([scripts[name][i, p : p + n] for name, (p, n) in step.items()]) for i in range(3))
            outs.append(engine.step(step, q, k[:, :2], v[:, :2], partition=["zigzag", "whole"][number % 2]))
        return outs

    for outs in run_loopback(program, cp_size):
        for step, out in zip(steps, outs, strict=True):
            wholes = [scripts[name][:, : p + n] for name, (p, n) in step.items()]
            expected = [
                oracle_attention(q, k[:, :2], v[:, :2], [(0, len(q))])[0][p:]
                for (q, k, v), (p, _) in zip(wholes, step.values(), strict=True)
            ]
            torch.testing.assert_close(out, torch.cat(expected).float())


def test_slots_of_a_pool_are_a_rule_of_positions_where_pages_are_multiples() -> None:
    """SGLang: slot s of the pool lies on rank s % cp_size, at s // cp_size."""
    cp_size, page_size, table = 3, 6, [[4, 1], [0, 5]]
    rule = cpattn.Striped.by_slot(page_size=page_size, cp_size=cp_size)
    for rank in range(cp_size):
        meta = cpattn.build_metadata([(5, 6), (0, 9)], cp_size, rank, owner=rule)
        slots = cpattn.slot_mapping(meta, torch.tensor(table), page_size // cp_size)
        found = slots[meta.restore_index.long()].tolist()
        of_pool = [
            table[i][p // page_size] * page_size + p % page_size for i, p in [(0, p) for p in range(5, 11)] + [(1, p) for p in range(9)]
        ]
        assert found == [slot // cp_size if slot % cp_size == rank else -1 for slot in of_pool]


@pytest.mark.parametrize("cp_size", [1, 3, 4])
def test_whole_pages_in_turn_are_a_rule_of_positions(cp_size: int) -> None:
    """TensorRT-LLM's Helix: page b of a request lies on rank b % cp_size, where it is page b // cp_size."""
    page_size, positions = 4, np.arange(60)
    rule, page = cpattn.Striped(interleave=page_size), positions // page_size
    assert rule.ranks(positions, cp_size).tolist() == (page % cp_size).tolist()
    assert rule.numbers(positions, cp_size).tolist() == (page // cp_size * page_size + positions % page_size).tolist()


def test_pages_that_begin_anywhere_are_no_rule_of_positions() -> None:
    with pytest.raises(
        cpattn.PlanError, match="page_size=16 with cp_size=3: pages do not begin at multiples of cp_size, so that a token's"
    ):
        cpattn.Striped.by_slot(16, 3)
    for sizes in ((0, 1), (4, True), ("4", 2)):
        with pytest.raises(cpattn.PlanError, match=r"(page|cp)_size=.*; pass an integer from 1 to"):
            cpattn.Striped.by_slot(*sizes)


def test_the_pieces_of_a_call() -> None:
    """What each rank gathers it writes where it holds it; then it attends."""
    case = AttentionCase([(9, 12), (0, 3), (20, 1)], cache="striped", interleave=2, page_size=4)
    plan = case.plan(3, pad_to=4)

    def program(group: cpattn.Transport) -> tuple[Tensor, Tensor]:
        meta, pages = plan.metadata(group.rank), case.pages(plan, group.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        all_k, all_v = cpattn.gather_kv(k, v, meta, group=group)
        cpattn.write_kv(all_k, all_v, pages.cache, cpattn.slot_mapping(meta, pages.cache.page_table, 4))
        pages.check_written()
        out, lse = cpattn.attend(q, pages.cache, meta, group=group, return_lse=True)
        return cpattn.unshard(out, meta, group=group), cpattn.unshard(lse, meta, group=group)

    case.check(run_loopback(program, 3), plan, "pass_q", "cpu")


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        (
            "computed",
            r"owner='computed'; pass cpattn.Striped\(interleave\), or None; where each rank keeps what it computes, prefix_ranks or",
        ),
        (4, r"owner=4; pass cpattn.Striped"),
        (cpattn.Striped, "pass cpattn.Striped"),
    ],
)
def test_what_is_no_rule(owner: Any, message: str) -> None:
    with pytest.raises(cpattn.PlanError, match=message):
        cpattn.plan([(3, 4)], 2, owner=owner)


@pytest.mark.parametrize("interleave", [0, -1, True, 1.0, "4", 2**31])
def test_what_is_no_interleave(interleave: Any) -> None:
    with pytest.raises(cpattn.PlanError, match=f"interleave={interleave!r}; pass the tokens that lie on a rank in turn"):
        cpattn.Striped(interleave)


def test_a_rule_beside_shards() -> None:
    with pytest.raises(cpattn.PlanError, match=r"owner=Striped\(interleave=1\) beside prefix_shards; .* leave prefix_shards out"):
        cpattn.plan([(4, 1)], 2, prefix_shards=[[2, 2]], owner=cpattn.Striped())


def test_plans_with_a_rule_are_told_apart() -> None:
    batch = [(8, 4)]
    plans = [cpattn.plan(batch, 2, owner=cpattn.Striped(n)) for n in (1, 2, 4)]
    plans += [cpattn.plan(batch, 2), cpattn.plan(batch, 2, prefix_shards=[[4, 4]])]
    assert len({plan.fingerprint for plan in plans}) == len(set(plans)) == 5
    assert repr(plans[1]).endswith("rows=2, owner=Striped(interleave=2))")
    with pytest.raises(cpattn.PlanError, match=r"the plan has owner=Striped\(interleave=2\), this metadata Striped\(interleave=1\)"):
        plans[0].metadata(0, bucket=cpattn.Bucket(2, 8, 4)).copy_(plans[1])


@pytest.mark.parametrize("strategy", ["all_gather", cpattn.two_level(1), cpattn.hybrid(1, "all_gather"), "pass_q", "auto"], ids=str)
@pytest.mark.parametrize(("cache", "window"), [("striped", 21), ("striped", 4096), ("ranked", 2**40)])
def test_a_window_of_a_model_goes_with_short_batches_too(strategy: Any, cache: str, window: int) -> None:
    """It reaches everything there, and what is asked for by name serves each batch, or none."""
    case = AttentionCase([(9, 12), (3, 1), (0, 2)], cache=cache, window=window)
    for fixed in (False, True):
        plan = case.plan(2)
        bucket = cpattn.Bucket(4, plan.rows + 1, 8, 64) if fixed else None

        def program(group: cpattn.Transport, plan: cpattn.Plan = plan, bucket: cpattn.Bucket | None = bucket) -> tuple[Tensor, Tensor]:
            meta = plan.metadata(group.rank, bucket=bucket)
            return case.on_rank(plan, group.rank, group, strategy, "reference", meta=meta)

        case.check(run_loopback(program, 2), plan, "pass_q", "reference")


def test_what_a_striped_cache_cannot_do_is_said() -> None:
    case = AttentionCase([(9, 12)], cache="striped")
    plan = case.plan(2)
    group = cpattn.LoopbackGroup(2).communicator(0)
    meta, fixed = plan.metadata(0), plan.metadata(0, bucket=cpattn.Bucket(1, 12, 4, 64))
    cache = case.pages(plan, 0).cache

    def call(meta: cpattn.CPMetadata, **options: Any) -> Tensor:
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        return cpattn.cp_attention(q, k, v, meta, group=group, **({"kv_cache": cache} | options))

    for options, message in (
        ({"strategy": "ring", "window": 4}, "no window is a range of keys there; 'all_gather', 'pass_q' could"),
        ({"strategy": "pass_q_ring", "window": 4}, "no window is a range of keys there; 'all_gather', 'pass_q' could"),
        (
            {"strategy": "all_gather"},
            "it would bring the whole of a sharded cache to every rank, as there is no window; 'ring', 'pass_q', 'pass_q_ring' could",
        ),
        ({"strategy": "all_gather", "window": 4, "overlap": 2}, "of a sharded cache it brings all heads at once; leave overlap out"),
    ):
        with pytest.raises(cpattn.UnsupportedError, match=message):
            call(meta, **options)
    with pytest.raises(cpattn.UnsupportedError, match="of a striped cache it attends to a copy, which changes in size from batch to batch"):
        call(fixed, strategy="pass_q_ring")
    with pytest.raises(
        cpattn.PrefixError, match=r"the plan has owner=Striped\(interleave=1\), but kv_cache is None; pass this rank's pages"
    ):
        call(meta, kv_cache=None)
    assert group.bytes_sent == 0
