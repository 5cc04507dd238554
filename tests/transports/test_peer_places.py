"""What a transport through the memory of peers decides on the host; tests/gpu/test_peer_memory.py has what it does on GPUs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn.kernels.peer_layout import BOARDS, MOST_RANKS, OTHER_MESSAGE, WORD_BYTES, WORDS
from cpattn.testing import ProcessRanks
from cpattn.transports import peer_heap, shared_memory
from cpattn.transports.group_state import GroupState
from cpattn.transports.in_flight import InFlight
from cpattn.transports.peer_heap import Machine, PeerHeap, why_not_shared
from cpattn.transports.peer_memory import _HEADER
from cpattn.transports.peer_processes import PeerMemoryTransport
from cpattn.transports.posted import Posted
from cpattn.transports.shared_memory import SharedMemory
from cpattn.transports.transfer import Transfer, Work


def machines(count: int, **changes: Any) -> list[Machine]:
    """Of one host with a GPU for each rank; the last rank's is changed."""
    every = frozenset(f"gpu {rank}" for rank in range(count))
    made = [Machine("host", f"gpu {rank}", every, None) for rank in range(count)]
    return [*made[:-1], made[-1]._replace(**changes)]


@pytest.mark.parametrize("count", [2, 3, 8, MOST_RANKS])
def test_ranks_of_one_host_share_memory(count: int) -> None:
    assert why_not_shared(machines(count)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "another"}, "rank 2 runs on another host than rank 0"),
        ({"gpu": "gpu 1"}, "ranks 1 and 2 share a GPU"),
        ({"visible": frozenset({"gpu 0", "gpu 2"})}, "rank 2 cannot reach the GPU of rank 1"),
        ({"why_not": "it has no Triton kernels for its GPU"}, "rank 2: it has no Triton kernels for its GPU"),
    ],
)
def test_why_ranks_cannot_share_memory(changes: dict[str, Any], message: str) -> None:
    assert message in str(why_not_shared(machines(3, **changes)))


def test_too_many_ranks() -> None:
    assert f"at most {MOST_RANKS} ranks, and there are {MOST_RANKS + 1}" in str(why_not_shared(machines(MOST_RANKS + 1)))


@pytest.mark.parametrize("before", [None, "0"])
def test_multicast_is_left_to_others(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is off where memory is made for a heap, also where that fails, and as it was afterwards."""
    name, seen = "TORCH_SYMM_MEM_DISABLE_MULTICAST", []
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)

    class Memory:
        @staticmethod
        def empty(*arguments: Any, **options: Any) -> torch.Tensor:
            seen.append(os.environ.get(name))
            raise torch.OutOfMemoryError

    monkeypatch.setattr(peer_heap, "_symmetric_memory", lambda: Memory)
    with pytest.raises(torch.OutOfMemoryError):
        peer_heap.allocate(100, torch.device("cpu"))
    assert seen == ["1"]
    assert os.environ.get(name) == before


def test_multicast_stays_off_while_another_thread_is_within(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads make memory for groups of their own, and each of them waits there for other processes."""
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    monkeypatch.setenv(name, "0")
    first, second, seen = peer_heap._without_multicast, peer_heap._without_multicast, []
    with first:
        second.__enter__()
        seen.append(os.environ[name])
    seen.append(os.environ[name])
    second.__exit__()
    assert seen == ["1", "1"]
    assert os.environ[name] == "0"


class _Sharers:
    """Two ranks that say the same, of which this one's first try to allocate fails as torch's symmetric memory does."""

    def __init__(self) -> None:
        self.state = GroupState()
        self.tries: list[int] = []

    def told_by_all(self, what: Any) -> list[Any]:
        return [what, what]

    def allocate_shared(self, nbytes: int, device: torch.device) -> torch.Tensor:
        self.tries.append(nbytes)
        if len(self.tries) == 1:
            raise RuntimeError("CUDA driver error: out of memory")
        return torch.empty(nbytes, dtype=torch.uint8)

    def make_heap(self, memory: torch.Tensor, seal: int) -> Any:
        return _Heap(len(memory), [seal, seal])

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


def test_memory_that_torch_keeps_for_later_is_given_up_for_what_ranks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    shared, ranks = SharedMemory(30.0), _Sharers()
    shared.device = torch.device("cpu")
    shared.grow(ranks, 800, captures=False)
    assert shared.heap is not None
    assert (emptied, ranks.tries, shared.heap.capacity) == ([True], [900, 900], 900)


def heap_of_two(memory: torch.Tensor, seal: int, other: torch.Tensor | None = None) -> PeerHeap:
    """Of two ranks that are one, or of which this one takes other memory for the second one's."""
    peer_heap.empty_heap(memory, 30.0, seal)
    return PeerHeap(memory, [x.view(1, -1) for x in (memory, memory if other is None else other)])


@pytest.mark.parametrize("other", [0, 255])
def test_other_memory_is_not_taken_for_a_peer_s(other: int) -> None:
    """Never a wrong result: calls go by collectives then."""
    shared, ranks = SharedMemory(30.0), _Sharers()
    shared.device = torch.device("cpu")
    ranks.make_heap = partial(heap_of_two, other=torch.full((_HEADER,), other, dtype=torch.uint8))  # type: ignore[method-assign]
    with pytest.raises(cpattn.UnsupportedError, match=r"could not see the others' memory \(.*rank 1 is other memory"):
        shared.grow(ranks, _HEADER, captures=False)
    assert shared.heap is None


def test_memory_that_is_made_under_inference_mode_is_written_outside_of_it() -> None:
    """The first call is an engine's forward pass, and who looks for faults or sets a limit is no part of that."""
    shared, ranks = SharedMemory(30.0), _Sharers()
    shared.device = torch.device("cpu")
    ranks.make_heap = heap_of_two  # type: ignore[method-assign]
    with torch.inference_mode():
        shared.grow(ranks, _HEADER, captures=False)
    heap = shared.heap
    assert heap is not None
    shared.set_limit(2.0)
    heap._fault[0] = 2
    with pytest.raises(cpattn.GroupError, match=r"rank 1 did not post or read a message within 2 s"):
        shared.look_for_fault(ranks)
    assert heap.fault_on_device() == 2


def test_memory_is_freed_alone_once_the_device_has_done_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has launched may still wait there for others."""
    shared, ranks = SharedMemory(30.0), _Sharers()
    shared.device, shared.heap = torch.device("cpu"), ranks.make_heap(torch.empty(900), 1)
    monkeypatch.setattr(shared_memory, "synchronize", lambda device: done.append(shared.heap is not None))
    done: list[bool] = []
    shared.release(ranks, alone=True)
    assert done == [True]
    assert shared.heap is None


def test_the_words_of_a_heap_do_not_overlap() -> None:
    """Of the largest group the last flag is the last word."""
    from cpattn.kernels import peer_layout as words

    assert len({words.FAULT, words.LIMIT, words.WAITING, words.ALL_READ, words.SEAL}) == 5
    assert max(words.FAULT, words.LIMIT, words.WAITING, words.ALL_READ, words.SEAL) < words.POSTS
    # One load reads both.
    assert words.FAULT % 2 == 0
    assert words.LIMIT == words.FAULT + 1
    assert words.READY + 2 * 2 * BOARDS * MOST_RANKS == WORDS
    assert words.READY == words.POSTS + 5 * BOARDS
    assert words.READY % 2 == 0


@pytest.fixture(scope="module")
def ranks() -> Iterator[ProcessRanks]:
    with ProcessRanks(2, timeout=30) as started:
        yield started


class _Heap:
    """As much of a heap as the host looks at."""

    def __init__(self, capacity: int, seals: list[int] | None = None) -> None:
        self.capacity = capacity
        self.seals = lambda: seals
        self.table = torch.zeros(3, dtype=torch.int64)
        self.fault = 0
        self.marks: list[int] = []
        self.limits: list[float] = []

    def mark(self, fault: int) -> None:
        self.marks.append(fault)

    def set_limit(self, seconds: float) -> None:
        self.limits.append(seconds)

    def fault_on_device(self) -> int:
        return self.fault


def _transfer(message: Posted | None) -> Transfer:
    return Transfer(lambda transport: Work(lambda: None), 0, (), posted=message)


def _places() -> dict[str, Any]:
    assert dist.group.WORLD is not None
    transport = PeerMemoryTransport(dist.group.WORLD)
    transport.shared.heap = heap = _Heap(2**20)  # type: ignore[assignment]
    transport._shares = True
    # A ring sends from two messages in turn; one transfer goes over collectives.
    messages = [Posted(1000), Posted(257)]
    transfers = [_transfer(message) for message in (messages[0], None, messages[1], messages[0])]
    transport.place(transfers)
    first = [message.board for message in messages]
    later = Posted(1)
    transport.place([*transfers, _transfer(later)])
    boards = [message.board for message in messages]
    said: dict[str, Any] = {"again": boards == first, "places": [(b.number, b.offset) for b in (*boards, later.board) if b is not None]}
    # Places are kept from call to call, but not in a heap that has taken the place of theirs.
    transport.shared.heap = grown = _Heap(2**20)  # type: ignore[assignment]
    transport.place(transfers)
    said["moved"] = all(message.board is not None and message.board.table is grown.table for message in messages)
    transport.shared.heap = heap  # type: ignore[assignment]
    said["too many"] = _refusal(lambda: transport.place([_transfer(Posted(1)) for _ in range(BOARDS + 1)]))
    said["captured"] = _refusal(lambda: _grow_in_capture(transport))
    transport.limit = np.int64(2)
    said["limits"] = heap.limits
    heap.fault = 2
    said["other"] = transport.shared.in_words(OTHER_MESSAGE)
    said["fault"], said["later"] = _refusal(transport.check_usable), _refusal(transport.state.enter)
    said["marks"] = heap.marks
    return said


def _refusal(call: Callable[[], object]) -> str:
    """What it raises; empty where it does not."""
    try:
        call()
    except cpattn.CPError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _grow_in_capture(transport: PeerMemoryTransport) -> None:
    transport._captures = True
    transport.place([_transfer(Posted(2**20))])


def test_places_are_those_of_the_transfers_in_their_order(ranks: ProcessRanks) -> None:
    mine, other = ranks.run(_in_group_of_its_own)
    assert mine == other
    assert mine["again"]
    assert mine["moved"]
    (zero, begin), (one, second), (two, third) = mine["places"]
    assert (zero, one, two) == (0, 1, 2)
    assert begin >= WORDS * WORD_BYTES
    assert begin % 256 == 0
    assert (second - begin, third - second) == (1024, 512)
    assert f"a call of {BOARDS + 1} messages" in mine["too many"]
    assert "GroupError: a CUDA graph captures a call over larger messages" in mine["captured"]
    assert mine["limits"] == [2.0]
    assert "rank 1 did not post or read a message within 2 s" in mine["fault"]
    assert mine["later"] == mine["fault"]
    # Of another size, and what waits within graphs is told.
    assert "rank 0 has posted another message" in mine["other"]
    assert mine["marks"] == [2]


def _in_group_of_its_own() -> dict[str, Any]:
    """It is given up, and the next test's is not."""
    world = dist.group.WORLD
    dist.group.WORLD = dist.new_group()
    try:
        return _places()
    finally:
        dist.group.WORLD = world


def _without_memory() -> dict[str, Any]:
    """Who does not insist has a heap that cannot grow, and then a call with too many messages."""
    assert dist.group.WORLD is not None
    transport = PeerMemoryTransport(dist.group.WORLD, insists=False)
    asked: list[int] = []

    def grow(ranks: Any, nbytes: int, *, captures: bool) -> None:
        asked.append(nbytes)
        raise cpattn.UnsupportedError("rank 1 could not make 9 MiB of shared memory (OutOfMemoryError)")

    told: list[str] = []
    listening = logging.Handler()
    listening.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cpattn").addHandler(listening)
    transport.shared.heap, transport.shared.grow = _Heap(2**20), grow  # type: ignore[assignment, method-assign]
    placed = []
    for sizes in ([100], [2**21], [2**21 + 5], [2**20], [1] * (BOARDS + 1), [100]):
        transport._shares = True
        messages = [Posted(nbytes) for nbytes in sizes]
        is_placed = transport.place([_transfer(message) for message in messages])
        # What is prepared next goes otherwise, and what is there needs no place.
        assert transport._shares == is_placed == all(message.board is not None for message in messages)
        placed.append(is_placed)
    logging.getLogger("cpattn").removeHandler(listening)
    said = {"placed": placed, "asked": len(asked), "says": transport.describe(), "told": told}
    return said | {"again": transport.place([_transfer(None)])}


def test_what_finds_no_memory_goes_otherwise(ranks: ProcessRanks) -> None:
    """And is not asked for again, as that stops all ranks. One of them says so, once for each size that becomes the limit."""
    first, second = ranks.run(_without_memory)
    reason = "MiB and more over 2 ranks by collectives, and not through the memory of peers: rank 1 could not make 9 MiB of shared memory"
    assert [text.startswith(f"cpattn sends calls of {mib} {reason}") for mib, text in zip((2, 1), first["told"], strict=True)] == [True] * 2
    assert not second["told"]
    for said in (first, second):
        assert said["placed"] == [True, False, False, False, False, True]
        assert said["asked"] == 2
        assert said["again"]
        assert said["says"].startswith("auto: its 2 ranks read the memory of each other's GPUs; not in calls of 1 MiB and more: rank 1")


def _sharing_group() -> tuple[Any, PeerMemoryTransport, Any]:
    """A group, its transport, and the heap that this has."""
    group = dist.new_group()
    transport = cpattn.transport(group, kind="peer_memory")
    assert isinstance(transport, PeerMemoryTransport)
    transport.shared.device = torch.device("cpu")
    heap: Any = _Heap(2**20)
    transport.shared.heap = heap
    return group, transport, heap


def _released() -> list[bool]:
    """What is left of shared memory after each rank's release: alone, where one's graph holds it, together, and with a fault."""
    group, transport, heap = _sharing_group()
    cpattn.release()
    left = [transport.shared.heap is heap]
    transport.shared.captured = [heap] if dist.get_rank() else []
    cpattn.release(group)
    left.append(transport.shared.heap is heap)
    transport.shared.captured = []
    cpattn.release(group)
    left.append(transport.shared.heap is None)
    # Now there is nothing that the ranks would have to free together.
    if dist.get_rank():
        cpattn.release(group)
    transport.shared.heap, heap.fault = heap, dist.get_rank()
    left.append("rank 0 did not post or read a message" in _refusal(lambda: cpattn.release(group)))
    return [*left, transport.shared.heap is None, transport.state.failure is not None]


def test_shared_memory_is_released_by_all_ranks_together(ranks: ProcessRanks) -> None:
    assert ranks.run(_released) == [[True] * 6] * 2


def _released_too_late(destroys: bool) -> list[bool]:
    """One rank alone frees what it had in a group that was given up, or destroyed, however it names that."""
    left = []
    for named_by in ("group", "transport"):
        group, transport, heap = _sharing_group()
        others = cpattn.transport(group, kind="collectives")
        if destroys:
            dist.destroy_process_group(group)
        else:
            heap.fault = 1
            _refusal(transport.check_usable)
        if dist.get_rank():
            cpattn.release(group if named_by == "group" else transport)
            left += [transport.shared.heap is None, others.describe() == "collectives: those of torch.distributed, over gloo"]
    return left


@pytest.mark.parametrize("destroys", [False, True], ids=["given up", "destroyed"])
def test_shared_memory_of_a_group_that_is_over_is_released_by_each_rank(ranks: ProcessRanks, destroys: bool) -> None:
    assert ranks.run(_released_too_late, destroys)[1] == [True] * 4


def _missed() -> list[tuple[str, bool, bool]]:
    """The second rank does not come to the first one's call, or to its release: what that raises, whether the next raises the same at once,
    and whether memory is freed."""
    seen: list[tuple[str, bool, bool]] = []
    for releases in (False, True):
        transport = PeerMemoryTransport(dist.new_group(timeout=timedelta(seconds=0.5)))
        transport._device_type, transport.shared.device = "cpu", torch.device("cpu")  # type: ignore[misc]
        if releases:
            transport.shared.heap = _Heap(2**20)  # type: ignore[assignment]
        meta = cpattn.build_metadata([(0, 8)], 2, 0)
        x = torch.ones(meta.rows, 1, 8)
        call = partial(cpattn.cp_attention, x, x, x, meta, group=transport)
        if dist.get_rank() == 0:
            said = _refusal(partial(cpattn.release, transport) if releases else call)
            seen.append((said, _refusal(call) == said, transport.shared.heap is None))
    dist.barrier()
    return seen


def test_a_rank_that_does_not_come_to_agree_is_found_out(ranks: ProcessRanks) -> None:
    """Within the group's timeout, and once and for all: those who came may have said a half of what they had to."""
    seen, _ = ranks.run(_missed)
    assert len(seen) == 2
    for said, is_same, is_freed in seen:
        assert said.startswith("GroupError: this group cannot be used any more: its ranks could not agree on the memory that they share (")
        assert is_same
        assert is_freed


def _failed_capture() -> list[bool]:
    """A capture that fails has placed a message, and nobody posts it: not when the next call ends, which places nothing."""
    assert dist.group.WORLD is not None
    transport = PeerMemoryTransport(dist.group.WORLD, insists=False)
    transport.shared.heap = _Heap(2**20)  # type: ignore[assignment]
    transport.ready = lambda device, captures: setattr(transport, "_shares", True)  # type: ignore[method-assign]
    message = Posted(100)
    with contextlib.suppress(RuntimeError), InFlight(transport, torch.device("cpu")) as in_flight:
        in_flight.captures = True
        in_flight.expect(lambda: [_transfer(message)])
        in_flight.start()
        message.is_pulled = False
        raise RuntimeError("the attention fails")
    with InFlight(transport, torch.device("cpu")) as in_flight:
        in_flight.expect(lambda: [_transfer(None)])
        in_flight.start().wait()
    return [message.board is None, message.is_pulled, not transport._placed]


def test_a_capture_that_fails_leaves_nothing_to_post(ranks: ProcessRanks) -> None:
    assert ranks.run(_failed_capture) == [[True] * 3] * 2


@pytest.mark.parametrize("step", ["start", "wait"])
@pytest.mark.parametrize(("captures", "is_posted"), [(True, True), (True, False), (False, True)])
def test_a_launch_that_a_capture_refuses_leaves_the_group_as_it_was(step: str, captures: bool, is_posted: bool) -> None:
    """As that of a kernel that was never launched before: the call is made once, and captured then. What else fails gives the group up."""
    group = cpattn.LoopbackGroup(1).transport(0)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    begin = refuse if step == "start" else lambda transport: Work(refuse)

    def call() -> None:
        with InFlight(group, torch.device("cpu")) as in_flight:
            in_flight.captures = captures
            in_flight.expect(lambda: [Transfer(begin, 0, (), posted=Posted(8) if is_posted else None)])
            in_flight.start().wait()

    leaves = captures and is_posted
    with pytest.raises(RuntimeError if leaves else cpattn.GroupError, match="operation not permitted when stream is capturing"):
        call()
    assert (group.state.failure is None) == leaves


def _not_insisting_on_a_cpu() -> tuple[bool, str, bool]:
    """Whether results are those over collectives, what it says of itself, and whether a split of it carries something."""
    assert dist.group.WORLD is not None
    auto = PeerMemoryTransport(dist.group.WORLD, insists=False)
    meta = cpattn.build_metadata([(0, 5), (0, 8)], 2, dist.get_rank())
    q = torch.randn(meta.rows, 2, 16)
    same = [
        torch.equal(*(cpattn.cp_attention(q, q, q, meta, group=group, strategy=strategy, check=True) for group in (auto, None)))
        for strategy in ("all_gather", "ring")
    ]
    auto._why_not = "rank 1 runs on another host than rank 0"
    return all(same), auto.describe(), auto.split(2, 1)[1].describe() == "collectives" and torch.equal(*_directly(auto.split(1, 2)[1]))


def test_who_does_not_insist_takes_collectives(ranks: ProcessRanks) -> None:
    for same, says, splits in ranks.run(_not_insisting_on_a_cpu):
        assert same
        assert says == "collectives: those of torch.distributed, over gloo, since rank 1 runs on another host than rank 0"
        assert splits


def _remade() -> tuple[int, list[bool]]:
    """A call whose transfers found no place: how often they are made, and which of them are carried out."""
    transport = cpattn.LoopbackGroup(1).transport(0)
    carried: list[bool] = []
    made: list[list[Transfer]] = []

    def make() -> list[Transfer]:
        number = len(made)

        def begin(transport: cpattn.Transport) -> Work:
            carried.append(number > 0)
            return Work(lambda: None)

        made.append([Transfer(begin, 0, ())])
        return made[-1]

    transport.place = lambda transfers: len(made) != 1  # type: ignore[method-assign]
    with InFlight(transport, torch.device("cpu")) as in_flight:
        in_flight.expect(make)
        in_flight.start().wait()
    return len(made), carried


def test_transfers_without_a_place_are_made_anew() -> None:
    assert _remade() == (2, [True])


@pytest.mark.parametrize("step", ["ready", "place"])
def test_who_fails_where_all_prepare_to_send_gives_the_group_up(step: str) -> None:
    """Once: to try again alone would meet what the others do next."""
    transport, tries = cpattn.LoopbackGroup(1).transport(0), []

    def fail(*arguments: Any) -> None:
        tries.append(step)
        raise RuntimeError("a test raises it")

    setattr(transport, step, fail)
    with pytest.raises(RuntimeError, match="a test raises it"), InFlight(transport, torch.device("cpu")) as in_flight:
        in_flight.expect(lambda: [_transfer(None)])
    assert tries == [step]
    with pytest.raises(cpattn.GroupError, match="a rank failed where all of them prepare to send"):
        transport.state.enter()


def _on_a_cpu() -> dict[str, Any]:
    meta = cpattn.build_metadata([(0, 5), (0, 8)], 2, dist.get_rank())
    q = torch.randn(meta.rows, 2, 16)
    peers = cpattn.transport(kind="peer_memory")
    with pytest.MonkeyPatch.context() as patch:
        # As where Triton is not installed.
        patch.setitem(sys.modules, "cpattn.moves.peer_moves", None)
        said: dict[str, Any] = {"call": _refusal(lambda: cpattn.cp_attention(q, q, q, meta, group=peers))}
    said["again"] = _refusal(lambda: cpattn.cp_attention(q, q, q, meta))
    said["direct"] = torch.equal(*_directly(peers))
    said["split"] = _refusal(lambda: peers.split(2, 1))
    said["explained"] = [cpattn.explain(q, q, q, meta, group=group)["transport"] for group in (peers, cpattn.transport())]
    cpattn.check()
    for name, seconds in {"zero": 0, "true": True, "text": "5", "nan": float("nan"), "long": 1e9}.items():
        said[name] = _refusal(partial(setattr, peers, "limit", seconds))
    return said


def _directly(transport: cpattn.Transport) -> tuple[torch.Tensor, torch.Tensor]:
    """A transfer outside of a call goes over the process group."""
    out, x = torch.empty(2, 3), torch.full((1, 3), float(dist.get_rank()))
    transport.all_gather(out, x).wait()
    return out, torch.tensor([[0.0], [1.0]]).expand(2, 3)


def test_cpu_tensors_are_refused_and_nothing_is_harmed(ranks: ProcessRanks) -> None:
    for said in ranks.run(_on_a_cpu):
        assert "kind='peer_memory' cannot serve this call: it is for CUDA tensors, and this call's are on cpu" in said["call"]
        assert said["again"] == ""
        assert said["direct"]
        assert "parts of a group do not share memory" in said["split"]
        peers, auto = said["explained"]
        assert peers.startswith("peer_memory: in their first call")
        assert auto == "collectives: those of torch.distributed, over gloo"
        for name in ("zero", "true", "text", "nan", "long"):
            assert "pass seconds, more than 0 and at most 86,400" in said[name]


def test_check_says_why_a_group_was_given_up() -> None:
    group = cpattn.LoopbackGroup(1).transport(0)
    cpattn.check(group)
    group.state.give_up("a test gave it up")
    with pytest.raises(cpattn.GroupError, match="a test gave it up"):
        cpattn.check(group)
