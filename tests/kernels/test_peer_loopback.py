"""Ranks as threads that share the memory of one GPU, or, without one, of the interpreter: whole calls, beside those that copy."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from inputs.cases import AttentionCase
from inputs.stored_cases import StoredCase
from programs.failed_calls import Faults, attend_with_faults, check_partly_failed

import cpattn
from cpattn.exchange.traveling_over_shards import traveling_over_shards
from cpattn.metadata import needed_keys
from cpattn.testing import run_loopback

pytest.importorskip("triton")
from cpattn.kernels.peer_layout import POSTS
from cpattn.moves.late_rows import LateRows
from cpattn.moves.peer_moves import Board
from cpattn.transports import peer_loopback, peer_rows
from cpattn.transports.in_flight import InFlight
from cpattn.transports.peer_loopback import PeerLoopbackTransport
from cpattn.transports.peer_rows import PeerRowsInOrder
from cpattn.transports.posted import Posted
from cpattn.transports.transfer import Transfer

pytestmark = pytest.mark.usefixtures("peer_kernels", "shared_memory")


@pytest.fixture
def shared_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(PeerLoopbackTransport, "_device_type", "cpu")
        monkeypatch.setattr(peer_loopback, "has_kernels", lambda device: True)


def peers_of(group: cpattn.Transport) -> PeerLoopbackTransport:
    peers = cpattn.transport(group, kind="peer_memory")
    assert isinstance(peers, PeerLoopbackTransport)
    assert peers is cpattn.transport(peers, kind="peer_memory") is cpattn.transport(peers)
    return peers


def case_of(batch: list[tuple[int, int]], device: str, cache: str = "packed") -> AttentionCase:
    return AttentionCase(batch, heads=2, kv_heads=1, head_dim=16, cache=cache, page_size=4, device=device)


def backend_on(device: str) -> str:
    return "triton" if device == "cuda" else "cpu"


@pytest.mark.parametrize(
    ("strategy", "cache"),
    [("all_gather", "packed"), ("all_gather", "paged"), ("ring", "sharded"), ("pass_q", "sharded"), ("pass_q_ring", "striped")],
)
def test_bits_are_those_of_copies(strategy: str, cache: str, device: str) -> None:
    """Calls of several sizes follow each other in the same memory; of the last one a rank has no token."""
    cases = [case_of(batch, device, cache) for batch in ([(5, 9), (0, 2)], [(3, 1)])]

    def program(group: cpattn.Transport) -> list[bool]:
        same = []
        for case in cases:
            plan = case.plan(group.size)
            results = [case.on_rank(plan, group.rank, transport, strategy, backend_on(device)) for transport in (peers_of(group), group)]
            same.append(all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True)))
        heap = peers_of(group).shared.heap
        assert heap is not None
        # It is what carried them.
        assert int(heap._memory.view(torch.int32)[POSTS]) >= 2
        assert peers_of(group).describe() == "peer_memory: its 3 ranks are threads that share the memory of one GPU"
        return same

    assert run_loopback(program, 3) == [[True] * 2] * 3


@pytest.mark.parametrize(
    ("strategy", "cache"),
    [("all_gather", "packed"), ("all_gather", "paged"), ("ring", "packed"), ("pass_q", "packed"), ("pass_q_ring", "packed")],
)
def test_no_more_than_is_needed_is_read(strategy: str, cache: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And counts as sent what counts over copies. Of a rank nobody may need anything, in some hops or in any, and it may need nothing;
    pages get the rest, and are looked at. Twice over, in the same memory."""
    monkeypatch.setattr(needed_keys, "MOST_NEEDED", 1.0)
    # The first request is of ranks 0 and 1; each of the last ones is of one rank.
    batches = [[(3, 8), (0, 3), (2, 1)], [(2, 3)] * 3]
    owners = [([0, 0, 1, 2], [0, 5, 0, 0], [5, 3, 3, 1], [0, 1, 2, 2]), ([0, 1, 2], [0] * 3, [3] * 3, [0, 1, 2])]

    def program(group: cpattn.Transport) -> list[bool]:
        same = []
        for batch, (request, start, length, rank) in zip(batches, owners, strict=True):
            case = case_of(batch, device, cache)
            chunks = cpattn.Chunks(*(np.array(column) for column in (request, start, length, rank)))
            plan = case.plan(3, partition=lambda *_, chunks=chunks: chunks)
            results, sent = [], []
            for transport in (peers_of(group), group, peers_of(group)):
                meta = plan.metadata(group.rank, device)
                q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
                pages, before = case.pages(plan, group.rank), transport.bytes_sent
                kv_cache = case.prefix if cache == "packed" else pages.cache
                results.append(
                    cpattn.cp_attention(
                        q, k, v, meta, group=transport, kv_cache=kv_cache, strategy=strategy, backend=backend_on(device), return_lse=True
                    )
                )
                sent.append(transport.bytes_sent - before)
                if cache == "paged":
                    pages.check_written()
            same += [torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True)]
            same.append(sent == [sent[0]] * 3)
        return same

    assert run_loopback(program, 3, timeout=30) == [[True] * 10] * 3


@pytest.mark.parametrize(
    ("strategy", "cache", "window"), [("all_gather", "ranked", 4), ("all_gather", "striped", 4), ("pass_q", "striped", None)]
)
def test_of_sharded_caches_no_more_than_is_wanted_is_read(strategy: str, cache: str, window: int | None, device: str) -> None:
    """A window's reach as well, beside new keys; pages are looked at. Whole requests, of which ranks want no more than some of the keys."""
    batch = [(9 if window else 0, extend) for extend in (6, 5, 6, 7)]
    case = case_of(batch, device, cache)
    case.window = case.options["window"] = window
    plan = case.plan(3, partition="whole")
    assert traveling_over_shards(case.problem(plan), plan).what == "wanted"

    def program(group: cpattn.Transport) -> list[Any]:
        backend = "triton" if device == "cuda" else "reference"
        results = [case.on_rank(plan, group.rank, transport, strategy, backend) for transport in (peers_of(group), group, peers_of(group))]
        return [torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True)]

    assert run_loopback(program, 3, timeout=30) == [[True] * 4] * 3


@pytest.mark.parametrize(
    ("strategy", "cache", "scales", "head_dim"),
    [("all_gather", "paged", "head", 16), ("all_gather", "paged", "token", 10), ("pass_q", "striped", "token", 16)],
)
def test_fp8_goes_through_it_as_bytes(strategy: str, cache: str, scales: str, head_dim: int, device: str) -> None:
    case = StoredCase([(5, 9), (0, 2)], 2, 1, head_dim, cache=cache, page_size=4, device=device, scales=scales)
    plan = case.plan(2)

    def program(group: cpattn.Transport) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [case.on_rank(plan, group.rank, transport, strategy, backend_on(device)) for transport in (peers_of(group), group)]

    results = run_loopback(program, 2)
    for by_peers, by_copies in results:
        assert all(map(torch.equal, by_peers, by_copies))
    case.dequantised().check([by_peers for by_peers, _ in results], plan, strategy, backend_on(device))


@pytest.mark.parametrize("line", [0, 150])
def test_a_rank_that_raises_leaves_the_others_in_step(line: int, device: str) -> None:
    case = case_of([(0, 9), (4, 6)], device)
    plan = case.plan(2)

    def program(group: cpattn.Transport) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        peers, backend = peers_of(group), backend_on(device)
        failed = attend_with_faults(case, plan, peers, group.rank, "all_gather", backend, Faults({1: line}))
        return [failed, case.on_rank(plan, group.rank, peers, "all_gather", backend)]

    first, second = run_loopback(program, 2, timeout=20)
    check_partly_failed(case, plan, "all_gather", [first[0], second[0]])
    case.check([x for x in (first[1], second[1]) if x is not None], plan, "all_gather", backend_on(device))
    assert second[0] is None or line


def test_who_is_interrupted_as_it_posts_does_not_post_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One message more than the others know of, and each further call would read the wrong ones. So the group is given up."""
    done: list[str] = []

    def interrupted(*arguments: Any, **options: Any) -> None:
        done.append(arguments[5])
        raise KeyboardInterrupt

    monkeypatch.setattr(peer_rows, "exchange_rows", interrupted)
    none, like = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, 4)
    message = Posted(16, form=1)
    message.board = Board(none, 0, 1, 0, 0, 16, 1)
    rows = PeerRowsInOrder(message, 0, 1, like, lambda row: None, LateRows(1, none, none, none, none, none, 1))
    peers = PeerLoopbackTransport(cpattn.LoopbackGroup(1), 0)

    def call() -> None:
        with InFlight(peers, torch.device("cpu")) as in_flight:
            in_flight.expect(lambda: [Transfer(lambda transport: rows.post(peers), 0, ())])
            rows.put(like, None, 1)
            in_flight.start().wait()

    with pytest.raises(KeyboardInterrupt):
        call()
    assert done == ["all"]
    with pytest.raises(cpattn.GroupError, match="nobody knows whether they were sent"):
        cpattn.check(peers)


def attend(tokens: int, group: cpattn.Transport, device: str) -> torch.Tensor:
    meta = cpattn.build_metadata([(0, tokens)], group.size, group.rank, device=device)
    x = torch.randn(meta.rows, 1, 16, device=device)
    out = cpattn.cp_attention(x, x, x, meta, group=group, backend=backend_on(device))
    assert isinstance(out, torch.Tensor)
    return out


def test_a_rank_of_another_plan_is_found(device: str) -> None:
    def program(group: cpattn.Transport) -> tuple[bool, str]:
        peers = peers_of(group)
        is_nan = bool(attend(8 if group.rank else 12, peers, device).isnan().any())
        with pytest.raises(cpattn.GroupError) as raised:
            cpattn.check(peers)
        with pytest.raises(cpattn.GroupError):
            # It is one group, however its ranks send.
            attend(8, group, device)
        # What it had is freed all the same, by each rank.
        cpattn.release(peers)
        assert peers.shared.heap is None
        return is_nan, str(raised.value)

    for is_nan, said in run_loopback(program, 2):
        assert is_nan
        assert "has posted another message" in said


def test_memory_grows_and_is_released_together(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks release between the same calls; what a graph has captured on one of them stays on all."""
    monkeypatch.setattr(PeerLoopbackTransport, "_least_bytes", 1024)

    def program(group: cpattn.Transport) -> list[bool]:
        peers, memory = peers_of(group), []
        for tokens in (4, 60, 4):
            attend(tokens, peers, device)
            memory.append(0 if peers.shared.heap is None else peers.shared.heap.capacity)
        heap = peers.shared.heap
        assert heap is not None
        cpattn.release()
        is_kept_alone = peers.shared.heap is heap
        peers.shared.captured, peers.shared.too_large = [heap] if group.rank == 1 else [], (10**6, "there was none")
        cpattn.release(peers)
        # What could not be made is asked for again.
        is_kept_for_graph = peers.shared.heap is heap and peers.shared.too_large is None
        peers.shared.captured = []
        cpattn.release(peers)
        is_released = peers.shared.heap is None
        attend(4, peers, device)
        return [memory[0] < memory[1] == memory[2], is_kept_alone, is_kept_for_graph, is_released, peers.shared.heap is not None]

    assert run_loopback(program, 2) == [[True] * 5] * 2


def test_memory_that_one_rank_had_not_is_asked_for_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next such call, the first one or a larger one; all ranks refuse alike, and what has place goes on."""
    monkeypatch.setattr(PeerLoopbackTransport, "_least_bytes", 1024)
    allocate = PeerLoopbackTransport.allocate_shared

    def program(group: cpattn.Transport) -> list[str]:
        peers, said = peers_of(group), []

        def no_memory(nbytes: int, device: torch.device) -> torch.Tensor:
            raise torch.OutOfMemoryError("none is left")

        for tokens, has_memory in ((4, False), (4, True), (60, False), (4, False), (60, True)):
            monkeypatch.setattr(peers, "allocate_shared", partial(allocate, peers) if has_memory or group.rank == 0 else no_memory)
            try:
                attend(tokens, peers, device)
                said.append("")
            except cpattn.UnsupportedError as error:
                said.append(str(error))
        return said

    first, second = run_loopback(program, 2)
    assert first == second
    assert ["rank 1 could not make 0 MiB of shared memory" in text for text in first] == [True, False, True, False, False]
    assert first[1] == first[3] == first[4] == ""


def test_a_fault_that_only_the_device_knows_of_is_found_at_release(device: str) -> None:
    def program(group: cpattn.Transport) -> str:
        peers = peers_of(group)
        attend(8, peers, device)
        heap = peers.shared.heap
        assert heap is not None
        if group.rank == 0:
            heap.mark(2)
        with pytest.raises(cpattn.GroupError) as raised:
            cpattn.release(peers)
        assert peers.shared.heap is None
        # Once it was given up nobody meets.
        cpattn.release(peers)
        return str(raised.value)

    assert all("rank 1 did not post or read a message within 30 s" in said for said in run_loopback(program, 2))


def test_a_fault_in_memory_that_a_graph_has_captured_is_found_where_memory_grows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeerLoopbackTransport, "_least_bytes", 1024)

    def program(group: cpattn.Transport) -> str:
        peers = peers_of(group)
        attend(4, peers, device)
        captured = peers.shared.heap
        assert captured is not None
        peers.shared.captured = [captured]
        attend(60, peers, device)
        assert peers.shared.heap is not captured
        if group.rank == 1:
            captured.mark(1)
        with pytest.raises(cpattn.GroupError) as raised:
            attend(600, peers, device)
        return str(raised.value)

    assert all("rank 0 did not post or read a message" in said for said in run_loopback(program, 2))


def test_a_rank_that_stays_away_is_waited_for_as_long_as_the_group_says(device: str) -> None:
    def program(group: cpattn.Transport) -> str:
        if group.rank == 1:
            return ""
        with pytest.raises(cpattn.GroupError, match=r"could not agree .*waited 0\.2 s for all ranks to come to a call"):
            attend(8, peers_of(group), device)
        with pytest.raises(cpattn.GroupError) as raised:
            attend(8, peers_of(group), device)
        return str(raised.value)

    assert "this group cannot be used any more" in run_loopback(program, 2, timeout=0.2)[0]


def test_ranks_that_launch_elsewhere_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike, as all of them see it."""
    if device == "cpu":
        places = iter(["cuda:0, stream 0", "cuda:0, stream 7"])
        monkeypatch.setattr(peer_loopback, "_place", lambda device: next(places))

    def program(group: cpattn.Transport) -> str:
        elsewhere = torch.cuda.Stream() if device == "cuda" and group.rank else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(elsewhere), pytest.raises(cpattn.UnsupportedError) as raised:
            attend(8, peers_of(group), device)
        return str(raised.value)

    first, second = run_loopback(program, 2)
    assert first == second
    assert "all ranks share one GPU and one stream" in first


def test_what_has_no_shared_memory_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(group: cpattn.Transport) -> list[str]:
        peers, said = peers_of(group), []
        for call in (lambda: attend(8, peers, device), lambda: peers.split(2, 1)):
            with pytest.raises(cpattn.UnsupportedError) as raised:
                call()
            said.append(str(raised.value))
        return said

    monkeypatch.setattr(peer_loopback, "has_kernels", lambda device: False)
    for refused, split in run_loopback(program, 2):
        assert "kind='peer_memory' cannot serve this call: there are no Triton kernels" in refused
        assert "make a LoopbackGroup for each axis" in split
