"""A rank that raises in the middle of a call: the others are in step with it, and the next call works on all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import EXCHANGES, AttentionCase
from inputs.strategies import non_empty_batches
from programs.failed_calls import Faults, attend_with_faults, check_partly_failed, with_fault
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.call import attention
from cpattn.testing import run_loopback
from cpattn.transports import in_flight
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transfer import Transfer

MIXED = [(0, 31), (14, 17), (0, 3), (27, 1), (10, 0), (0, 1)]


@pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)
@given(data=st.data(), batch=non_empty_batches(), cp_size=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_fault_anywhere_keeps_ranks_in_step(strategy: str, cache: str, data: st.DataObject, batch: Any, cp_size: int, seed: int) -> None:
    overlap = data.draw(st.sampled_from([1, 2, 4])) if strategy == "all_gather" else None
    backend = data.draw(st.sampled_from(["reference", "cpu"]))
    case = AttentionCase(batch, heads=4, kv_heads=4, cache=cache, page_size=5, overlap=overlap, seed=seed)
    plan = case.plan(cp_size, pad_to=data.draw(st.sampled_from([1, 4])), partition=data.draw(st.sampled_from(["zigzag", "whole"])))
    failing = data.draw(st.lists(st.integers(0, cp_size - 1), min_size=1, unique=True))
    faults = Faults({rank: data.draw(st.integers(0, 400)) for rank in failing})
    then = AttentionCase(MIXED, heads=4, kv_heads=4, cache=cache, page_size=5, overlap=overlap, seed=seed + 1)
    then_plan = then.plan(cp_size)

    def program(group: cpattn.Communicator) -> Any:
        first = attend_with_faults(case, plan, group, group.rank, strategy, backend, faults)
        return first, then.on_rank(then_plan, group.rank, group, strategy, backend, check=True)

    results = run_loopback(program, cp_size, timeout=20)
    check_partly_failed(case, plan, strategy, [first for first, _ in results])
    then.check([second for _, second in results], then_plan, strategy, backend)


@pytest.mark.parametrize(
    "case", [AttentionCase(MIXED, v_in_k=True, v_head_dim=dim, kv_heads=1) for dim in (8, 16)], ids=["latent", "k is v"]
)
@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_keys_that_are_values_go_out_as_nan(case: AttentionCase, strategy: str) -> None:
    plan = case.plan(3)
    for line in range(0, 200, 5):

        def program(group: cpattn.Communicator, line: int = line) -> tuple[Tensor, Tensor] | None:
            return attend_with_faults(case, plan, group, group.rank, strategy, "cpu", Faults({1: line}))

        check_partly_failed(case, plan, strategy, run_loopback(program, 3, timeout=20))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("make", ["unshard", "unshard of strides", "unshard of ids", "gather_kv"])
def test_a_fault_in_a_gather(make: str, size: int) -> None:
    plan = cpattn.plan(MIXED, size, pad_to=4)

    def program(group: cpattn.Communicator) -> None:
        meta = plan.metadata(group.rank)
        x = cpattn.shard(torch.randn(plan.num_tokens, 2, 8), meta)
        calls: dict[str, Any] = {
            "unshard": lambda: cpattn.unshard(x, meta, group=group),
            "unshard of strides": lambda: cpattn.unshard(x.transpose(1, 2), meta, group=group),
            "unshard of ids": lambda: cpattn.unshard(x.long().transpose(1, 2), meta, group=group),
            "gather_kv": lambda: cpattn.gather_kv(x, x, meta, group=group)[0],
        }
        for line in range(40):
            got = with_fault(calls[make], group.rank, Faults({1: line}))
            assert (got is None) == (group.rank == 1) or line > 20
            whole = torch.randn(plan.num_tokens, generator=torch.Generator().manual_seed(line))
            assert torch.equal(cpattn.unshard(cpattn.shard(whole, meta), meta, group=group, check=True), whole)

    run_loopback(program, size, timeout=20)


@pytest.mark.parametrize("failing", [[0], [2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("strategy", cpattn.STRATEGIES)
def test_a_kernel_that_raises_at_each_launch_in_turn(strategy: str, failing: list[int]) -> None:
    case = AttentionCase([(0, 40), (12, 23)])
    plan = case.plan(3)
    for launch in range(4):
        kernels = [FailsAt(launch if rank in failing else -1) for rank in range(3)]

        def program(group: cpattn.Communicator, kernels: list[FailsAt] = kernels) -> Any:
            meta = plan.metadata(group.rank)
            q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
            first = None
            try:
                first = cpattn.cp_attention(
                    q, k, v, meta, group=group, kv_cache=case.prefix, strategy=strategy, backend=kernels[group.rank], return_lse=True
                )
            except MemoryError:
                assert kernels[group.rank].has_raised
            return first, case.on_rank(plan, group.rank, group, strategy, "reference", check=True)

        results = run_loopback(program, 3, timeout=20)
        assert [first is None for first, _ in results] == [kernel.has_raised for kernel in kernels]
        check_partly_failed(case, plan, strategy, [first for first, _ in results])
        case.check([second for _, second in results], plan, strategy, "reference")
    assert not any(kernel.has_raised for kernel in kernels if strategy == "all_gather")


class FailsAt:
    """The reference, but for one launch."""

    def __init__(self, launch: int) -> None:
        self.launches_left = launch
        self.has_raised = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, *, out_dtype: torch.dtype, **options: Any) -> Any:
        self.launches_left -= 1
        if self.launches_left == -1:
            self.has_raised = True
            raise MemoryError("no memory for this launch")
        return cpattn.BACKENDS["reference"].run(q, k, v, rows, AttentionOptions(**options), out_dtype)


def test_memory_for_messages_that_comes_at_the_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that has none takes part with what it frees, and raises."""
    case = AttentionCase([(0, 40), (12, 23)])
    plan = case.plan(2)

    def program(group: cpattn.Communicator) -> Any:
        if group.rank == 1:
            memory, tries = group.allocate, []

            def scarce(*arguments: Any) -> Tensor:
                tries.append(arguments)
                if len(tries) == 1:
                    raise torch.OutOfMemoryError("no memory for the message")
                return memory(*arguments)

            monkeypatch.setattr(group, "allocate", scarce)
        meta = plan.metadata(group.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        first = None
        try:
            first = cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=case.prefix, strategy="ring", return_lse=True)
        except torch.OutOfMemoryError:
            assert group.rank == 1
        return first, case.on_rank(plan, group.rank, group, "ring", "cpu")

    results = run_loopback(program, 2, timeout=20)
    assert results[1][0] is None
    check_partly_failed(case, plan, "ring", [first for first, _ in results])
    case.check([second for _, second in results], plan, "ring", "cpu")


def test_memory_for_messages_that_never_comes_gives_the_group_up(monkeypatch: pytest.MonkeyPatch) -> None:
    group = cpattn.LoopbackGroup(2, timeout=1).communicator(0)
    meta = cpattn.build_metadata([(0, 8)], 2, 0)
    x = torch.zeros(4, 1, 8)

    def none(*arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory at all")

    monkeypatch.setattr(group, "allocate", none)
    with pytest.raises(torch.OutOfMemoryError, match="no memory at all"):
        cpattn.cp_attention(x, x, x, meta, group=group)
    with pytest.raises(cpattn.GroupError, match=r"cannot be used any more: a rank could not make the memory of its messages.*at all"):
        cpattn.cp_attention(x, x, x, meta, group=group)


def test_memory_that_a_capture_does_not_find_leaves_the_group_as_it_was() -> None:
    """Nothing was sent, and no rank will replay it: an engine goes on eagerly, or captures a smaller batch."""
    group = cpattn.LoopbackGroup(2, timeout=1).communicator(0)
    tries: list[bool] = []

    def none() -> list[Transfer]:
        tries.append(True)
        raise torch.OutOfMemoryError("no memory in a capture")

    def capture() -> None:
        with InFlight(group, torch.device("cpu")) as call:
            call.captures = True
            call.expect(none)

    with pytest.raises(torch.OutOfMemoryError, match="no memory in a capture"):
        capture()
    assert tries == [True]
    cpattn.check(group)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_settled_too(kind: type[BaseException]) -> None:
    case = AttentionCase([(0, 40), (0, 23)])
    plan = case.plan(3)

    def program(group: cpattn.Communicator) -> Any:
        first = attend_with_faults(case, plan, group, group.rank, "ring", "cpu", Faults({1: 60}, kind))
        return first, case.on_rank(plan, group.rank, group, "ring", "cpu", check=True)

    results = run_loopback(program, 3, timeout=20)
    assert results[1][0] is None
    check_partly_failed(case, plan, "ring", [first for first, _ in results])
    case.check([second for _, second in results], plan, "ring", "cpu")


def test_an_interrupted_call_waits_for_no_longer_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peer never comes."""
    monkeypatch.setattr(in_flight, "INTERRUPTED_WAITS", 0.3)
    group = cpattn.LoopbackGroup(2, timeout=30).communicator(0)
    meta = cpattn.build_metadata([(0, 8)], 2, 0)
    x = torch.zeros(4, 1, 8)
    begin = time.monotonic()

    def kernel(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cpattn.cp_attention(x, x, x, meta, group=group, strategy="ring", backend=kernel)
    assert time.monotonic() - begin < 10
    for _ in range(2):
        with pytest.raises(
            cpattn.GroupError, match=r"a call was interrupted \(KeyboardInterrupt\).*finished \(not within 0.3 s\).*make a new"
        ):
            cpattn.unshard(x, meta, group=group)


@pytest.mark.parametrize("size", [2, 1])
def test_an_interrupt_before_anything_is_sent(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the group up, as other ranks may wait for this call, and would take the next one for it; if there are others."""
    group = cpattn.LoopbackGroup(size).communicator(0)
    meta = cpattn.build_metadata([(0, 4 * size)], size, 0)
    x = torch.zeros(4, 1, 8)

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attention, "find_call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cpattn.cp_attention(x, x, x, meta, group=group)
    if size == 1:
        cpattn.cp_attention(x, x, x, meta, group=group)
        return
    with pytest.raises(cpattn.GroupError, match="a call was interrupted before it began to send"):
        cpattn.cp_attention(x, x, x, meta, group=group)


def test_what_was_given_up_sends_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer comes after the interrupted rank has left: it must wait in vain rather than get what belongs to no call."""
    monkeypatch.setattr(in_flight, "INTERRUPTED_WAITS", 0.2)
    ends = cpattn.LoopbackGroup(2, timeout=1.5)
    meta = [cpattn.build_metadata([(0, 8)], 2, rank) for rank in range(2)]
    x = torch.ones(4, 1, 8)

    def kernel(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cpattn.cp_attention(x, x, x, meta[0], group=ends.communicator(0), strategy="pass_q", backend=kernel)
    peer = ends.communicator(1)
    with pytest.raises(cpattn.GroupError, match="a transfer over it failed"):
        cpattn.cp_attention(x, x, x, meta[1], group=peer, strategy="pass_q")


def test_what_is_refused_leaves_the_group_as_it_was() -> None:
    group = cpattn.LoopbackGroup(1).communicator(0)
    meta = cpattn.build_metadata([(0, 4)], 1, 0)
    x = torch.zeros(4, 1, 8)
    for _ in range(2):
        with pytest.raises(cpattn.OptionError, match="window=0"):
            cpattn.cp_attention(x, x, x, meta, group=group, window=0)
    cpattn.cp_attention(x, x, x, meta, group=group)


def test_a_transfer_that_fails_gives_the_group_up() -> None:
    group = cpattn.LoopbackGroup(2, timeout=0.2).communicator(0)
    meta = cpattn.build_metadata([(0, 8)], 2, 0)
    x = torch.zeros(4, 1, 8)
    messages = set()
    calls: list[Callable[[], Any]] = [lambda: cpattn.cp_attention(x, x, x, meta, group=group), lambda: cpattn.unshard(x, meta, group=group)]
    for call in calls:
        with pytest.raises(cpattn.GroupError, match=r"a transfer over it failed \(TimeoutError: waited 0.2 s for rank 1") as raised:
            call()
        messages.add(str(raised.value))
    assert len(messages) == 1
    with pytest.raises(cpattn.GroupError, match="cannot be used any more"):
        cpattn.cp_attention(x, x, x, meta, group=group, check=True)


def test_two_calls_at_once_give_the_group_up() -> None:
    """From another thread, and from within a kernel; the call that was there first does not pass for right."""
    meta = cpattn.build_metadata([(0, 4)], 1, 0)
    x = torch.randn(4, 1, 8)

    def in_a_thread(call: Callable[[], Any]) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    def from_within(call: Callable[[], Any]) -> None:
        call()

    ways: list[Callable[[Callable[[], Any]], None]] = [in_a_thread, from_within]
    for how in ways:
        group = cpattn.LoopbackGroup(1).communicator(0)

        def kernel(*arguments: Any, group: cpattn.Communicator = group, how: Any = how, **options: Any) -> Any:
            def second() -> None:
                with pytest.raises(cpattn.GroupError, match=r"another call is under way on this group.*new_group.*not enough"):
                    cpattn.cp_attention(x, x, x, meta, group=group)

            how(second)
            return FailsAt(-1)(*arguments, **options)

        with pytest.raises(cpattn.GroupError, match="cannot be used any more: two calls were made on it at once"):
            cpattn.cp_attention(x, x, x, meta, group=group, backend=kernel)
        with pytest.raises(cpattn.GroupError, match="cannot be used any more: two calls were made on it at once"):
            cpattn.cp_attention(x, x, x, meta, group=group)


def test_a_kernel_may_make_a_call_of_its_own_without_a_group() -> None:
    meta = cpattn.build_metadata([(0, 40), (0, 23)], 1, 0)
    x, y = torch.randn(2, 63, 1, 8)

    def kernel(*arguments: Any, **options: Any) -> Any:
        torch.testing.assert_close(cpattn.cp_attention(y, y, y, meta, backend="reference"), expected_y)
        return FailsAt(-1)(*arguments, **options)

    expected_x, expected_y = (cpattn.cp_attention(z, z, z, meta, backend="reference") for z in (x, y))
    torch.testing.assert_close(cpattn.cp_attention(x, x, x, meta, backend=kernel), expected_x)


def test_a_strategy_that_starts_too_few_transfers_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = replace(cpattn.STRATEGIES["all_gather"], forward=lambda held, io, attend: None)
    monkeypatch.setitem(cpattn.STRATEGIES, "all_gather", forgetful)
    meta = [cpattn.build_metadata([(0, 8)], 2, rank) for rank in range(2)]
    x = torch.zeros(4, 1, 8)

    def program(group: cpattn.Communicator) -> None:
        with pytest.raises(AssertionError, match="has not started all the transfers that it announced"):
            cpattn.cp_attention(x, x, x, meta[group.rank], group=group, strategy="all_gather")

    run_loopback(program, 2, timeout=5)


@pytest.mark.parametrize("check", [False, True], ids=["", "checked"])
@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q", "pass_q_ring", "ulysses"])
def test_a_call_that_fails_in_inference_mode_is_carried_out_as_well(strategy: str, check: bool) -> None:
    """What is left of it is sent by a thread, which is in that mode no longer."""
    meta = [cpattn.build_metadata([(0, 8)], 2, rank) for rank in range(2)]
    x = torch.ones(4, 2, 8)

    def program(group: cpattn.Transport) -> None:
        with torch.inference_mode():
            for fails in (True, False):
                backend = FailsAt(0) if fails and group.rank == 1 else "reference"
                with pytest.raises((MemoryError, cpattn.DisagreementError)) if fails and (check or group.rank == 1) else nullcontext():
                    cpattn.cp_attention(x, x, x, meta[group.rank], group=group, strategy=strategy, backend=backend, check=check)
        assert group.state.failure is None

    run_loopback(program, 2, timeout=5)
