"""An all-gather in two levels: its bits, what crosses hosts, faults, buckets, and what is refused."""

from __future__ import annotations

import pickle
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import AttentionCase
from inputs.own_partitions import OwnPartition
from inputs.strategies import batches, non_empty_batches
from programs.failed_calls import Faults, attend_with_faults, check_partly_failed
from programs.split_programs import bytes_across_groups
from references.keys_in_place import in_place_backend
from references.needed_by_hand import received_by_hosts

import cpattn
from cpattn.exchange.schedule import bytes_sent
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.metadata import needed_keys
from cpattn.metadata.needed_by_hosts import crossing_rows
from cpattn.testing import run_loopback
from cpattn.transports.transfer import Work
from cpattn.transports.two_levels import _TwoSteps

BATCH = [(37, 60), (0, 41), (90, 1), (0, 0), (5, 0), (12, 7), (0, 2)]
SIZES = st.sampled_from([(within, hosts * within) for within in (1, 2, 3, 4) for hosts in (1, 2, 3) if within * hosts <= 9])


@given(data=st.data(), batch=batches(), sizes=SIZES, seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_it_has_the_bits_of_an_all_gather(data: st.DataObject, batch: Any, sizes: tuple[int, int], seed: int) -> None:
    within, cp_size = sizes
    case = AttentionCase(
        batch,
        v_in_k=data.draw(st.booleans()),
        window=data.draw(st.none() | st.integers(1, 60)),
        sinks=data.draw(st.booleans()),
        cache=data.draw(st.sampled_from(["packed", "paged"])),
        page_size=data.draw(st.sampled_from([1, 3, 16])),
        seed=seed,
    )
    partition = data.draw(st.sampled_from(["zigzag", "whole", OwnPartition(seed)]))
    plan, strategy = case.plan(cp_size, partition=partition, pad_to=data.draw(st.sampled_from([1, 4]))), cpattn.two_level(within)

    def program(group: cpattn.Transport) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [case.on_rank(plan, group.rank, group, one, "reference") for one in ("all_gather", strategy)]

    results = run_loopback(program, cp_size)
    case.check([got for _, got in results], plan, strategy, "reference")
    for expected, got in results:
        assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))


@pytest.mark.parametrize(("within", "cp_size"), [(2, 4), (2, 6), (3, 6), (1, 3), (3, 3)])
def test_each_row_crosses_to_every_other_host_once(within: int, cp_size: int) -> None:
    case = AttentionCase([(0, 131), (0, 57), (0, 3)])
    plan, strategy = case.plan(cp_size, pad_to=4), cpattn.two_level(within)
    problem = case.problem(plan)
    schedule = strategy.schedule(problem, plan)

    def program(group: cpattn.Transport) -> int:
        meta = plan.metadata(group.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        crossed: list[int] = []
        exchange = group._exchange  # type: ignore[attr-defined]

        def watched(send: dict[int, torch.Tensor], receive: dict[int, torch.Tensor]) -> Work:
            crossed.extend(x.nbytes for to, x in send.items() if to // within != group.rank // within)
            work: Work = exchange(send, receive)
            return work

        group._exchange = watched  # type: ignore[attr-defined]
        before = group.bytes_sent
        cpattn.cp_attention(q, k, v, meta, group=group, strategy=strategy, backend="reference")
        assert group.bytes_sent - before == bytes_sent(schedule)[group.rank]
        return sum(crossed)

    crossed, hosts = run_loopback(program, cp_size), cp_size // within
    once = (hosts - 1) * plan.rows * problem.key_bytes
    # A rank's own rows alone, of all that it passes on.
    assert crossed == [once] * cp_size or within in (1, cp_size)
    assert bytes_sent(schedule).tolist() == [(cp_size - 1) * plan.rows * problem.key_bytes] * cp_size


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("partition", ["zigzag", "contiguous", "whole", "uncut", OwnPartition(3)], ids=str)
@pytest.mark.parametrize(("within", "cp_size"), [(2, 6), (3, 6)])
def test_what_a_host_sees_crosses_to_it_once(
    within: int, cp_size: int, partition: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else, with the limit out of the way above which everything is sent; counted in bytes, beside a count by hand."""
    monkeypatch.setattr(needed_keys, "MOST_NEEDED", 1.0)
    case = AttentionCase([(3, 60), (0, 5), (7, 0), (20, 9), (0, 6), (0, 13), (21, 1), (0, 8)], window=window)
    plan, strategy = case.plan(cp_size, partition=partition), cpattn.two_level(within)
    problem = case.problem(plan)
    program = partial(bytes_across_groups, case=case, partition=partition, strategy=strategy)
    across, sent, received = zip(*run_loopback(program, cp_size), strict=True)
    rows, inside = received_by_hosts(plan, window, within)
    assert list(across) == [row * problem.key_bytes for row in rows]
    assert list(received) == [(row + more) * problem.key_bytes for row, more in zip(rows, inside, strict=True)]
    assert list(sent) == bytes_sent(strategy.schedule(problem, plan)).tolist()
    crossing = crossing_rows(plan, window, within)
    assert crossing is not None
    assert (crossing.received_across.tolist(), crossing.received_within.tolist()) == (rows, inside)


def test_explain_says_what_crosses() -> None:
    meta = cpattn.build_metadata([(0, 24), *[(0, 4)] * 18], 4, 0, partition="whole")
    q, k, pages = torch.zeros(meta.rows, 4, 8), torch.zeros(meta.rows, 2, 8), torch.zeros(114, 4, 2, 8)
    said = cpattn.explain(q, k, k, meta, strategy=cpattn.two_level(2))["keys"]
    assert re.fullmatch(
        r"a rank receives at most \S+ \w+ from other hosts, where what queries of a host see crosses once, and at most \S+ \w+ from ranks "
        r"of its own: the busiest rank .* within 67%",
        said,
    )
    cache = cpattn.PagedKV(pages, pages, torch.arange(114, dtype=torch.int32).view(19, 6))
    said = cpattn.explain(q, k, k, meta, kv_cache=cache, strategy=cpattn.two_level(2))["keys"]
    assert said.endswith("from ranks of its own: pages that every rank holds whole want all of them")
    said = cpattn.explain(q, k, k, meta, strategy=cpattn.hybrid(2))["keys"]
    assert said.startswith("across groups, of its heads, a rank receives those that its queries see from their owners")


def test_explain_says_that_two_levels_put_own_rows_in_order_too() -> None:
    """Of whole prompts each rank has all that its queries see, which all else attends to as it lies: so does what has one level alone."""
    meta = cpattn.build_metadata([(0, 4)] * 4, 4, 0, partition="whole")
    q, k, pages = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8), torch.zeros(4, 4, 2, 8)
    cache = cpattn.PagedKV(pages, pages, torch.arange(4, dtype=torch.int32)[:, None])
    for within, lie in ((1, "as they lie"), (2, "in order"), (4, "as they lie")):
        said = cpattn.explain(q, k, k, meta, kv_cache=cache, strategy=cpattn.two_level(within))["keys"]
        assert said.endswith(f"; attended to {lie}, and written to the pages after that")


@given(data=st.data(), batch=non_empty_batches(), sizes=SIZES, seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_fault_anywhere_keeps_ranks_in_step(data: st.DataObject, batch: Any, sizes: tuple[int, int], seed: int) -> None:
    within, cp_size = sizes
    case = AttentionCase(batch, cache=data.draw(st.sampled_from(["packed", "paged"])), page_size=5, seed=seed)
    plan, strategy = case.plan(cp_size), cpattn.two_level(within)
    failing = data.draw(st.lists(st.integers(0, cp_size - 1), min_size=1, unique=True))
    faults = Faults({rank: data.draw(st.integers(0, 200)) for rank in failing})

    def program(group: cpattn.Transport) -> Any:
        first = attend_with_faults(case, plan, group, group.rank, strategy, "cpu", faults)
        return first, case.on_rank(plan, group.rank, group, strategy, "cpu", check=True)

    results = run_loopback(program, cp_size, timeout=20)
    check_partly_failed(case, plan, "all_gather", [first for first, _ in results])
    case.check([second for _, second in results], plan, strategy, "cpu")


@pytest.mark.parametrize("cache", ["packed", "paged"])
def test_through_a_bucket(cache: str) -> None:
    batches = [BATCH, [(11, 3)], [], [(20, 50), (60, 1), (0, 9)]]
    if cache == "packed":  # in a bucket, no prefix at all
        batches = [[(0, extend_len) for _, extend_len in batch] for batch in batches]
    cases = [AttentionCase(batch, cache=cache, page_size=5, seed=seed) for seed, batch in enumerate(batches)]
    plans = [case.plan(4, partition=OwnPartition(seed)) for seed, case in enumerate(cases)]
    bucket, strategy = cpattn.Bucket(max_requests=8, max_rows=120, max_chunks=70, max_seqlen=160), cpattn.two_level(2)

    def program(group: cpattn.Transport) -> list[tuple[torch.Tensor, torch.Tensor]]:
        meta = plans[-1].metadata(group.rank, bucket=bucket)
        outputs = []
        for case, plan in zip(cases, plans, strict=True):
            meta.copy_(plan)
            outputs.append(case.on_rank(plan, group.rank, group, strategy, "reference", meta=meta))
        return outputs

    for case, plan, *outputs in zip(cases, plans, *run_loopback(program, 4), strict=True):
        case.check(outputs, plan, strategy, "reference")


def test_nothing_is_sent_where_no_rank_needs_anything() -> None:
    case = AttentionCase([(0, 20)] * 4)
    plan = case.plan(4, partition="whole")
    problem = case.problem(plan)
    assert traveling_keys(problem, plan).what == "nothing"
    assert not bytes_sent(cpattn.two_level(2).schedule(problem, plan)).any()
    case.check_loopback(plan, cpattn.two_level(2), "cpu")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", ["reference", in_place_backend([])], ids=["in order", "in place"])
@pytest.mark.parametrize(
    ("batch", "chunks"),
    [
        ([(128, 300), (0, 40)], [(0, 0, 100, 0), (0, 100, 200, 2), (1, 0, 40, 1)]),
        ([(0, 300), (0, 40), (0, 64)], [(0, 0, 100, 0), (0, 100, 200, 1), (1, 0, 40, 2), (2, 0, 64, 3)]),
        ([(128, 300), (0, 40), (256, 64)], [(0, 0, 100, 0), (0, 100, 200, 2), (1, 0, 40, 3), (2, 0, 64, 3)]),
    ],
    ids=["a rank without tokens", "whole requests alone", "whole requests beside cached keys"],
)
def test_where_a_rank_puts_nothing_in_order(batch: Any, chunks: Any, backend: Any) -> None:
    """While others have keys to put, and read, and memory for nothing has a row all the same."""
    case = AttentionCase(batch)
    plan = case.plan(4, partition=lambda batch, cp_size: cpattn.Chunks(*np.array(chunks).T))
    case.check_loopback(plan, cpattn.two_level(2), backend)


def test_what_is_made_and_refused() -> None:
    strategy = cpattn.two_level(2)
    assert pickle.loads(pickle.dumps(strategy)) is strategy
    assert repr(strategy) == strategy.name == "two_level(2)"
    with pytest.raises(cpattn.OptionError, match="within=0; pass the ranks of a host, an integer of at least 1"):
        cpattn.two_level(0)
    for case, message in (
        (AttentionCase([(8, 12)]), "it has hosts of 2 ranks, and cp_size=3 is no multiple of that"),
        (AttentionCase([(8, 12)], cache="sharded"), "it would bring the whole of a sharded cache to every rank"),
        (AttentionCase([(8, 12)], cache="striped"), "it would bring the whole of a sharded cache to every rank"),
    ):
        plan = case.plan(3 if case.cache == "packed" else 4)
        reason = strategy.why_not(case.problem(plan), plan)
        assert reason == message


def test_an_interrupted_wait_goes_on_where_it_was() -> None:
    happened: list[str] = []

    def first() -> None:
        happened.append("first")
        if len(happened) == 1:
            raise KeyboardInterrupt

    work = _TwoSteps(Work(first), lambda: happened.append("begun") or Work(lambda: happened.append("second")))  # type: ignore[func-returns-value]
    with pytest.raises(KeyboardInterrupt):
        work.wait()
    work.wait()
    work.wait()
    assert happened == ["first", "first", "begun", "second", "second"]

    def interrupted() -> Work:
        raise KeyboardInterrupt

    work = _TwoSteps(Work(lambda: None), interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.wait()
    with pytest.raises(cpattn.GroupError, match="interrupted as it began the second level"):
        work.wait()
