"""A cache moved from one layout to another holds what a cache of the other layout would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import AttentionCase
from inputs.paged_caches import RankPages, random_ranks
from programs.failed_calls import Faults, with_fault

import cpattn
from cpattn.exchange.message import message_buffer
from cpattn.pool import relayout as relayouts
from cpattn.testing import run_loopback

layouts = st.tuples(st.integers(1, 5), st.sampled_from([None, "ranked", cpattn.Striped(1), cpattn.Striped(3), cpattn.Striped(16)]))


def prefixes_of(case: AttentionCase, layout: tuple[int, Any]) -> cpattn.Plan:
    """Each rank has all of them, those that it has computed, at random, or those of a rule."""
    cp_size, owner = layout
    ranks = random_ranks(case.batch, cp_size, case.seed + cp_size) if owner == "ranked" else None
    batch = [(prefix, 0) for prefix, _ in case.batch]
    return cpattn.plan(batch, cp_size, prefix_ranks=ranks, owner=None if owner == "ranked" else owner)


def pages_of(case: AttentionCase, layout: tuple[int, Any], rank: int) -> RankPages | None:
    """What a rank has of the prefixes in a layout; NaN everywhere else."""
    return case.pages(prefixes_of(case, layout), rank) if rank < layout[0] else None


def emptied(cache: cpattn.PagedKV) -> cpattn.PagedKV:
    v_pages = None if cache.v_pages is None else torch.full_like(cache.v_pages, torch.nan)
    return replace(cache, k_pages=torch.full_like(cache.k_pages, torch.nan), v_pages=v_pages)


@given(
    prefixes=st.lists(st.integers(0, 40), max_size=5),
    old=layouts,
    new=layouts,
    page_sizes=st.tuples(*[st.sampled_from([1, 3, 16])] * 2),
    v_in_k=st.booleans(),
    layers=st.integers(1, 2),
    tokens=st.sampled_from([1, 7, 1000]),
)
@settings(max_examples=40, deadline=None)
def test_any_layout_into_any_other(
    prefixes: list[int], old: Any, new: Any, page_sizes: tuple[int, int], v_in_k: bool, layers: int, tokens: int
) -> None:
    """In one exchange, or in many, when messages have room for so many tokens."""
    batch = [(prefix, 2) for prefix in prefixes]
    cases = [AttentionCase(batch, v_in_k=v_in_k, v_head_dim=8) for _ in range(layers)]
    for layer, case in enumerate(cases):
        case.prefix_k += layer
    plans = [prefixes_of(cases[0], layout) for layout in (old, new)]
    room = relayouts._ROUND_BYTES
    relayouts._ROUND_BYTES = tokens * 2 * (16 if v_in_k else 24) * 4 * max(old[0], new[0])

    def program(group: cpattn.Transport) -> None:
        before = [pages_of(replace_size(case, page_sizes[0]), old, group.rank) for case in cases]
        after = [pages_of(replace_size(case, page_sizes[1]), new, group.rank) for case in cases]
        sources, targets = [x.cache for x in before if x], [emptied(x.cache) for x in after if x]
        cpattn.relayout(sources or None, plans[0], targets or None, plans[1], group=group, check=True)
        for expected, target in zip(filter(None, after), targets, strict=True):
            expected.cache = target
            expected.check_written()
        for expected in filter(None, before):
            expected.check_written()

    try:
        run_loopback(program, max(old[0], new[0]))
    finally:
        relayouts._ROUND_BYTES = room


def replace_size(case: AttentionCase, page_size: int) -> AttentionCase:
    return replace(case, page_size=page_size)


def test_generation_goes_on_in_the_new_layout() -> None:
    """Two ranks, replicated; then three, striped: what the next step computes is right."""
    case = AttentionCase([(37, 5), (8, 1), (0, 3)], cache="striped", interleave=4)
    plan = case.plan(3)

    def program(group: cpattn.Transport) -> Any:
        pages, before = case.pages(plan, group.rank), pages_of(case, (2, None), group.rank)
        moved = emptied(pages.cache)
        cpattn.relayout(before.cache if before else None, cpattn.plan(case.batch, 2), moved, plan, group=group)
        meta = plan.metadata(group.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        out, lse = cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=moved, return_lse=True)
        pages.cache = moved
        pages.check_written()
        return cpattn.unshard(out, meta, group=group), cpattn.unshard(lse, meta, group=group)

    case.check(run_loopback(program, 3), plan, "pass_q", "cpu")


def test_a_fault_anywhere_keeps_ranks_in_step() -> None:
    """What others get of the rank that failed is NaN for K and 0 for V; then the same call works on all."""
    case = AttentionCase([(40, 0), (7, 0)])
    plans = [cpattn.plan(case.batch, 2, owner=cpattn.Striped(n)) for n in (1, 4)]

    def program(group: cpattn.Transport) -> int:
        raised = 0
        for line in range(0, 90, 3):
            before, after = (pages_of(case, (2, plan.owner), group.rank) for plan in plans)
            assert before is not None
            assert after is not None
            caches = before.cache, emptied(after.cache)

            def call(caches: Any = caches) -> bool:
                cpattn.relayout(caches[0], plans[0], caches[1], plans[1], group=group)
                return True

            raised += with_fault(call, group.rank, Faults({1: line})) is None
            target = caches[1]
            assert target.v_pages is not None
            assert after.expected_v is not None
            assert ((target.k_pages == after.expected_k) | target.k_pages.isnan()).all()
            assert ((target.v_pages == after.expected_v) | target.v_pages.isnan() | (target.v_pages == 0)).all()
            call()
            after.cache = target
            after.check_written()
        return raised

    raised = run_loopback(program, 2, timeout=20)
    assert raised[0] == 0
    assert raised[1] > 20, raised


def test_ranks_that_differ_are_found() -> None:
    case = AttentionCase([(9, 2), (4, 0)])

    def program(group: cpattn.Transport) -> str:
        before, after = (pages_of(case, (2, owner), group.rank) for owner in (None, cpattn.Striped()))
        assert before is not None
        assert after is not None
        plans = [cpattn.plan(case.batch, 2, owner=owner) for owner in (cpattn.Striped(2) if group.rank else None, cpattn.Striped())]
        with pytest.raises(cpattn.DisagreementError) as refusal:
            cpattn.relayout(before.cache, plans[0], emptied(after.cache), plans[1], group=group, check=True)
        return str(refusal.value)

    for message in run_loopback(program, 2):
        assert "relayout from" in message


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cache": None, "to_cache": None}, cpattn.PrefixError, "cache and to_cache are both None on rank 1"),
        ({"to_plan": cpattn.plan([(9, 2)], 2)}, cpattn.PlanError, "plan and to_plan speak of other prefixes"),
        ({"to_plan": cpattn.plan([(9, 2), (4, 0)], 2)}, cpattn.DisagreementError, "relayout from"),
        ({"to_cache": [5]}, cpattn.PrefixError, "to_cache is a list; pass a PagedKV"),
        ({"plan": None}, cpattn.PlanError, "plan is a NoneType; pass a Plan"),
    ],
)
def test_what_one_rank_is_given_wrong_all_ranks_hear(changes: dict[str, Any], error: type[cpattn.CPError], message: str) -> None:
    case = AttentionCase([(9, 2), (4, 0)])

    def program(group: cpattn.Transport) -> str:
        before, after = (pages_of(case, (2, owner), group.rank) for owner in (None, cpattn.Striped()))
        assert before is not None
        assert after is not None
        given: dict[str, Any] = {"cache": before.cache, "to_cache": emptied(after.cache), "plan": cpattn.plan(case.batch, 2)}
        given |= {"to_plan": cpattn.plan(case.batch, 2, owner=cpattn.Striped())} | (changes if group.rank == 1 else {})
        with pytest.raises(error) as refusal:
            cpattn.relayout(**given, group=group, check=True)
        return str(refusal.value)

    for found in run_loopback(program, 2, timeout=20):
        assert message in found


@pytest.mark.parametrize("new", [(4, None), (4, cpattn.Striped(4096))])
def test_messages_are_no_larger_than_they_may_be(new: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replicated target gets each token on each rank; from long stripes all go from one rank to one other."""
    sizes = []

    def recorded(*given: Any) -> Any:
        message = message_buffer(*given)
        sizes.append(message.whole.nbytes)
        return message

    monkeypatch.setattr(relayouts, "_ROUND_BYTES", 2**12)
    monkeypatch.setattr(relayouts, "message_buffer", recorded)
    case = AttentionCase([(90, 0)])

    def program(group: cpattn.Transport) -> None:
        before, after = (pages_of(case, layout, group.rank) for layout in ((1, None), new))
        assert after is not None
        plans = [cpattn.plan(case.batch, cp_size, owner=owner) for cp_size, owner in ((1, None), new)]
        cpattn.relayout(before.cache if before else None, plans[0], emptied(after.cache), plans[1], group=group)

    run_loopback(program, 4)
    assert 2**11 < max(sizes) <= 2**12


def a_pool(owner: Any, rank: int) -> cpattn.KVPool:
    return cpattn.KVPool(8, 4, 1, 2, 8, cp_size=2, cp_rank=rank, owner=owner)


def test_one_pool_into_another() -> None:
    """After the plan that brings its tokens a pool has to be asked for one of which they are prefixes."""

    def program(group: cpattn.Transport) -> None:
        pools = [a_pool(owner, group.rank) for owner in ("replicated", cpattn.Striped(2), "computed")]
        for pool in pools:
            pool.admit("a")
        brought = [pool.plan([("a", 9)]) for pool in pools]
        caches = [pool.layer(0, pool.page_table(["a"])) for pool in pools]
        caches[0].k_pages.normal_(generator=torch.Generator().manual_seed(1))
        settled = [pool.plan([("a", 0)]) for pool in pools]
        with pytest.raises(
            cpattn.PrefixError, match=r"line 0 of cache's page_table is of a KVPool that has 9 tokens .* prefix has 0 there"
        ):
            cpattn.relayout(caches[0], brought[0], caches[1], brought[1], group=group, check=True)
        cpattn.relayout(caches[0], settled[0], caches[1], settled[1], group=group)
        lines = [cache.k_pages[cache.page_table[0].long()].flatten(0, 1) for cache in caches]
        positions = torch.tensor([p for p in range(9) if p // 2 % 2 == group.rank])
        assert torch.equal(lines[1][: len(positions)], lines[0][positions])
        # And on, to where a prefill would have left them.
        cpattn.relayout(caches[1], settled[1], caches[2], settled[2], group=group, check=True)
        computed = [c for c in brought[2].chunks if c.rank == group.rank]
        positions = torch.cat([torch.arange(c.start, c.start + c.length) for c in computed])
        assert torch.equal(caches[2].k_pages[caches[2].page_table[0].long()].flatten(0, 1)[: len(positions)], lines[0][positions])

    run_loopback(program, 2)


def refused(rank: int = 0, size: int = 2, **changes: Any) -> None:
    case = AttentionCase([(9, 2), (4, 0)])
    before, after = (pages_of(case, (2, owner), rank) for owner in (None, cpattn.Striped()))
    assert before is not None
    assert after is not None
    group = cpattn.LoopbackGroup(size).transport(rank)
    given: dict[str, Any] = {"cache": before.cache, "to_cache": emptied(after.cache), "plan": cpattn.plan(case.batch, 2)}
    given |= {"to_plan": cpattn.plan(case.batch, 2, owner=cpattn.Striped()), "group": group}
    try:
        cpattn.relayout(**(given | changes))
    finally:
        assert group.bytes_sent == 0


SHARDS = cpattn.plan([(9, 2), (4, 0)], 2, prefix_shards=[[9, 0], [4, 0]])
OTHER = torch.zeros(9, 4, 1, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"plan": SHARDS}, cpattn.PlanError, "plan has prefix_shards, which say how many tokens each rank has, but not which"),
        ({"to_plan": [(9, 2)]}, cpattn.PlanError, "to_plan is a list; pass a Plan"),
        ({"to_plan": cpattn.plan([(9, 2)], 2)}, cpattn.PlanError, r"speak of other prefixes: \[9, 4\] and \[9\] tokens"),
        ({"cache": None}, cpattn.PrefixError, "cache is None on rank 0, but its plan has cp_size=2; pass this rank's pages"),
        ({"cache": None, "to_cache": None}, cpattn.PrefixError, "cache and to_cache are both None on rank 0"),
        ({"cache": 4}, cpattn.PrefixError, "cache is a int; pass a PagedKV"),
        ({"size": 3}, cpattn.GroupError, "the group has 3 ranks, but the plans have 2 and 2; pass the larger group"),
        (
            {"size": 3, "rank": 1, "to_plan": cpattn.plan([(9, 0), (4, 0)], 3), "plan": cpattn.plan([(9, 0), (4, 0)], 1)},
            cpattn.PrefixError,
            "cache is given on rank 1, but its plan has cp_size=1; pass None here",
        ),
        (
            {"to_cache": cpattn.PagedKV(OTHER, OTHER.clone(), torch.tensor([[0, 1, 2], [3, 4, 5]]))},
            cpattn.TensorMismatchError,
            r"k_pages are \(9, 4, 1, 16\) torch.float32 on cpu in one place, .* must be the same in both caches and all layers",
        ),
        (
            {"to_cache": cpattn.PagedKV(OTHER, OTHER.clone(), torch.tensor([[0], [0]]))},
            cpattn.PageTableError,
            "has 1 pages of 4 tokens for each request, 4 in all, but request 0 has 5",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: type[cpattn.CPError], message: str) -> None:
    with pytest.raises(error, match=message):
        refused(**changes)


def test_pages_of_one_pool_are_not_used_twice() -> None:
    pages = torch.zeros(9, 4, 1, 16)
    old, new = (cpattn.plan([(9, 0)], 1, owner=owner) for owner in (None, cpattn.Striped()))
    caches = [cpattn.PagedKV(pages, None, torch.tensor([table])) for table in ([0, 1, 2], [3, 1, 4])]
    with pytest.raises(cpattn.PageTableError, match="page 1 is in use in both cache and to_cache, and would be overwritten"):
        cpattn.relayout(caches[0], old, caches[1], new)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("mistake", ["table", "scales"])
def test_what_a_rank_alone_can_see_lets_no_other_wait(mistake: str, check: bool) -> None:
    """Of two ranks the first one alone has both caches. Then the same call works."""
    plans = [cpattn.plan([(9, 0), (4, 0)], cp_size, owner=owner) for cp_size, owner in ((1, None), (2, cpattn.Striped()))]

    def cache(table: list[list[int]], scale: float = 0.5) -> cpattn.PagedKV:
        pages = torch.ones(5, 4, 1, 16).to(torch.float8_e4m3fn)
        return cpattn.PagedKV(pages, None, torch.tensor(table), k_scale=torch.tensor(scale))

    def program(group: cpattn.Transport) -> str:
        right, said = [[0, 1], [2, 3]], ""
        source = cache([[0, 1, 2], [4, 0, 0]]) if group.rank == 0 else None
        wrong = cache(right, 0.25) if mistake == "scales" else cache([[0, 1], [1, 2]] if group.rank == 0 else right)
        try:
            cpattn.relayout(source, plans[0], wrong, plans[1], group=group, check=check)
        except cpattn.CPError as error:
            said = str(error)
            assert (wrong.k_pages.float() == 1).all()
        cpattn.relayout(source, plans[0], cache(right), plans[1], group=group, check=check)
        return said

    own, other = run_loopback(program, 2, timeout=20)
    message = "k_scale is 0.5 in cache and 0.25 in to_cache" if mistake == "scales" else "into the same slot, place 0 of page 1"
    assert message in own
    assert ("rank 0 refused this call" in other) if check else not other
