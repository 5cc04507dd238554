"""What ranks run over the memory of each other's GPUs: functions of an importable module, so that a process can be sent their names."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from inputs.cases import AttentionCase
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import cpattn
from cpattn.transports import peer_memory, peer_processes
from cpattn.transports.groups import Kind
from cpattn.transports.peer_processes import PeerMemoryTransport
from cpattn.transports.transfer import Transfer

KINDS: tuple[Kind, Kind] = ("peer_memory", "collectives")


def attend_over_both(cases: list[AttentionCase], strategy: str, backend: str, partition: str) -> list[tuple[tuple[Tensor, Tensor], bool]]:
    """Each case over both kinds of transport, twice over; the result through peers' memory, and whether all bits were equal."""
    results = []
    transports = [cpattn.transport(kind=kind) for kind in KINDS]
    for case in cases:
        plan = case.plan(dist.get_world_size(), pad_to=8, partition=partition)
        runs = [[case.on_rank(plan, dist.get_rank(), transport, strategy, backend) for transport in transports] for _ in range(2)]
        bits = [[x.nan_to_num(7.0) for x in result] for pair in runs for result in pair]
        results.append((runs[0][0], all(torch.equal(x, y) for other in bits[1:] for x, y in zip(bits[0], other, strict=True))))
    assert transports[0].kind == "peer_memory"
    return results


def replay(strategy: str, calls: int, replays: int, partition: str = "zigzag") -> list[float]:
    """Graphs of so many calls, whose inputs change from replay to replay, with eager calls in between; the largest difference
    between each replay's last result and the same call over collectives."""
    torch.manual_seed(dist.get_rank())
    size, rank = dist.get_world_size(), dist.get_rank()
    meta = cpattn.build_metadata([(0, 700), (0, 33), (0, 1)], size, rank, device="cuda", partition=partition)
    q, k, v = (torch.randn(meta.rows, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    peers, collectives = (cpattn.transport(kind=kind) for kind in KINDS)

    def call(transport: cpattn.Communicator) -> Tensor:
        out = cpattn.cp_attention(q, k, v, meta, group=transport, strategy=strategy, backend="triton")
        assert isinstance(out, Tensor)
        return out

    call(peers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            out = call(peers)
    differences = []
    for n in range(replays):
        for x in (q, k, v):
            x.normal_()
        if rank == n % size:
            # Ranks need not come at the same time.
            torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        graph.replay()
        got = out.clone()
        if n % 3 == 1:
            assert torch.equal(call(peers), got)
        differences.append(float((got - call(collectives)).abs().max()))
    return differences


def grow_and_shrink(lengths: list[int]) -> bool:
    """Calls over one transport, of which some need more memory than there is."""
    transport = cpattn.transport(kind="peer_memory")
    same = True
    for length in lengths:
        meta = cpattn.build_metadata([(0, length)], dist.get_world_size(), dist.get_rank(), device="cuda")
        torch.manual_seed(length + dist.get_rank())
        q, k, v = (torch.randn(meta.rows, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 8, 8))
        results = [
            cpattn.cp_attention(q, k, v, meta, group=group, strategy=strategy, backend="triton")
            for strategy in ("all_gather", "ring")
            for group in (transport, cpattn.transport(kind="collectives"))
        ]
        same = same and torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])
    return same


def without_memory() -> tuple[list[bool], list[bool], str]:
    """The last rank finds no memory for larger messages. For calls of several sizes whether bits are those over collectives, which
    of them found a place in shared memory, and what the transport says of itself."""
    transport = PeerMemoryTransport(dist.new_group(), insists=False)
    same: list[bool] = []
    places: list[bool] = []
    place = transport.place

    def noted(transfers: Sequence[Transfer]) -> bool:
        is_placed = place(transfers)
        places.append(is_placed and any(transfer.posted for transfer in transfers))
        return is_placed

    transport.place = noted  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        for length in (100, 120_000, 300, 150_000, 100):
            meta = cpattn.build_metadata([(0, length)], dist.get_world_size(), dist.get_rank(), device="cuda")
            torch.manual_seed(length + dist.get_rank())
            q, k, v = (torch.randn(meta.rows, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 8, 8))
            for check in (False, True):
                results = [
                    cpattn.cp_attention(q, k, v, meta, group=group, backend="triton", check=check)
                    for group in (transport, cpattn.transport(kind="collectives"))
                ]
                same.append(torch.equal(*results))
            if dist.get_rank() == dist.get_world_size() - 1:
                patch.setattr(peer_processes, "allocate", _no_memory)
    return same, places, transport.describe()


def attend_by_default() -> str:
    """A call over the default group, and what carries it."""
    meta = cpattn.build_metadata([(0, 70)], dist.get_world_size(), dist.get_rank(), device="cuda")
    x = torch.randn(meta.rows, 2, 64, device="cuda")
    cpattn.cp_attention(x, x, x, meta)
    return cpattn.transport().describe()


def _no_memory(nbytes: int, device: torch.device) -> Tensor:
    raise torch.OutOfMemoryError(f"no {nbytes} bytes on {device}")


def of_other_sizes() -> tuple[bool, str]:
    """The last rank has another plan. Whether the result of the others is NaN, and what the next call raises."""
    transport = PeerMemoryTransport(dist.new_group())
    size, rank = dist.get_world_size(), dist.get_rank()
    right, other = (cpattn.build_metadata([(0, tokens)], size, rank, device="cuda") for tokens in (64 * size, 96 * size))
    outs = []
    for meta in (right, right if rank < size - 1 else other):
        q, k, v = (torch.randn(meta.rows, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        outs.append(cpattn.cp_attention(q, k, v, meta, group=transport, backend="triton"))
        torch.cuda.synchronize()
    said = ""
    try:
        cpattn.cp_attention(q, k, v, meta, group=transport, backend="triton")
    except cpattn.GroupError as error:
        said = str(error)
    assert isinstance(outs[1], Tensor)
    return bool(outs[1].isnan().any()), said


def on_another_device() -> bool:
    """Calls whose tensors are not on the current device."""
    size, rank = dist.get_world_size(), dist.get_rank()
    here = torch.device("cuda", torch.cuda.current_device())
    meta = cpattn.build_metadata([(0, 300), (0, 5)], size, rank, device=here)
    x = torch.randn(meta.rows, 2, 64, device=here)
    with torch.cuda.device((rank + 1) % size):
        results = [
            cpattn.unshard(cpattn.cp_attention(x, x, x, meta, group=group, strategy=strategy, check=True), meta, group=group, check=True)
            for strategy in ("all_gather", "ring")
            for group in (cpattn.transport(kind="peer_memory"), cpattn.transport(kind="collectives"))
        ]
    return all(torch.equal(mine, theirs) for mine, theirs in zip(results[::2], results[1::2], strict=True))


def stay_away(limit: float) -> tuple[bool, str, str, float]:
    """The last rank makes no call. Of the others: whether their result is NaN, what the next call and a replay's next check
    raise, and the seconds until then."""
    assert dist.group.WORLD is not None
    group = dist.new_group()
    transport = PeerMemoryTransport(group, limit=limit)
    meta = cpattn.build_metadata([(0, 64)], dist.get_world_size(), dist.get_rank(), device="cuda")
    q, k, v = (torch.randn(meta.rows, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    cpattn.cp_attention(q, k, v, meta, group=transport, backend="triton")
    torch.cuda.synchronize()
    dist.barrier()
    begin = time.monotonic()
    is_nan, said = True, ""
    if dist.get_rank() < dist.get_world_size() - 1:
        out = cpattn.cp_attention(q, k, v, meta, group=transport, backend="triton")
        torch.cuda.synchronize()
        assert isinstance(out, Tensor)
        is_nan = bool(out.isnan().all())
        try:
            cpattn.cp_attention(q, k, v, meta, group=transport, backend="triton")
        except cpattn.GroupError as error:
            said = str(error)
    seconds = time.monotonic() - begin
    dist.barrier()
    late = ""
    try:
        cpattn.cp_attention(q, k, v, meta, group=transport, backend="triton")
        torch.cuda.synchronize()
        cpattn.cp_attention(q, k, v, meta, group=transport, backend="triton")
    except cpattn.GroupError as error:
        late = str(error)
    return is_nan, said, late, seconds


def replay_a_bucket(strategy: str) -> list[bool]:
    """One graph that replays batches of several partitions, of which some need nothing of other ranks, eager calls in between: whether each
    result is that of collectives."""
    size, rank = dist.get_world_size(), dist.get_rank()
    batches = [([(0, 700), (0, 33), (0, 1)], "zigzag"), ([(0, 64)] * 4, "whole"), ([(0, 1)], "zigzag"), ([(0, 999)], "contiguous")]
    plans = [cpattn.plan(batch, size, partition=partition) for batch, partition in batches]
    bucket = cpattn.Bucket(max_requests=4, max_rows=max(plan.rows for plan in plans) + 8, max_chunks=8)
    peers, collectives = (cpattn.transport(kind=kind) for kind in KINDS)
    meta = plans[0].metadata(rank, "cuda", bucket=bucket)
    torch.manual_seed(rank)
    q, k, v = (torch.randn(meta.rows, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    call = partial(cpattn.cp_attention, q, k, v, strategy=strategy, backend="triton")
    call(meta, group=peers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out: Any = [call(meta, group=peers) for _ in range(2)][1]
    same = []
    for n, plan in enumerate([*plans, *reversed(plans)]):
        meta.copy_(plan)
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        expected: Any = call(plan.metadata(rank, "cuda", bucket=bucket), group=collectives)
        same.append(torch.equal(out, expected))
        if n % 2:
            same.append(torch.equal(call(meta, group=peers), expected))
    return same


def two_groups_at_once(rounds: int) -> list[bool]:
    """Calls over two groups of the same GPUs, each on a stream of its own, which ranks launch in another order: whether each result is
    that of collectives."""
    size, rank = dist.get_world_size(), dist.get_rank()
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    calls, expected = [], []
    for tokens, strategy in ((3000, "all_gather"), (5000, "ring")):
        meta = cpattn.build_metadata([(0, tokens), (0, 77)], size, rank, device="cuda")
        torch.manual_seed(tokens + rank)
        q, k, v = (torch.randn(meta.rows, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
        call = partial(cpattn.cp_attention, q, k, v, meta, strategy=strategy, backend="triton")
        expected.append(call(group=cpattn.transport(kind="collectives")))
        calls.append(partial(call, group=PeerMemoryTransport(dist.new_group())))
        calls[-1]()
    torch.cuda.synchronize()
    same = []
    for _ in range(rounds):
        outs: dict[int, Any] = {}
        for n in (0, 1) if rank % 2 else (1, 0):
            with torch.cuda.stream(streams[n]):
                outs[n] = [calls[n]() for _ in range(3)][2]
        torch.cuda.synchronize()
        same += [torch.equal(outs[n], expected[n]) for n in range(2)]
    return same


def replay_without_one(limit: float) -> tuple[bool, str, str, list[float]]:
    """Graphs in memory that has grown since, which all replay but the last rank. Of the others: whether the result is NaN, what who only
    replays graphs is told, what the next call raises, and the seconds of two replays."""
    transport = PeerMemoryTransport(dist.new_group(), limit=10 * limit)
    size, rank = dist.get_world_size(), dist.get_rank()
    calls = []
    for tokens in (64 * size, 60_000 * size):
        meta = cpattn.build_metadata([(0, tokens)], size, rank, device="cuda")
        q, k, v = (torch.randn(meta.rows, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        calls.append(partial(cpattn.cp_attention, q, k, v, meta, group=transport, strategy="all_gather", backend="triton"))
    small, large = calls
    # As in an engine; what follows is outside of it.
    with torch.inference_mode():
        small()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out: Any = small()
        large()
    assert len(transport.shared.heaps()) == 2
    graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    transport.limit = limit
    is_nan, told, said, seconds = True, "", "", []
    if rank < size - 1:
        for _ in range(2):
            begin = time.monotonic()
            graph.replay()
            torch.cuda.synchronize()
            seconds.append(time.monotonic() - begin)
        is_nan = bool(out.isnan().all())
        told, said = _raised(partial(cpattn.check, transport)), _raised(large)
    dist.barrier()
    return is_nan, told, said, seconds


def _raised(call: Callable[[], object]) -> str:
    try:
        call()
    except cpattn.GroupError as error:
        return str(error)
    return ""


def take_turns(batches: list[list[tuple[int, int]]], turns: list[int]) -> list[bool]:
    """Calls over several batches in turn, some as graphs, in memory that they share and that is NaN before each: whether each result
    is that of collectives."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = PeerMemoryTransport(dist.new_group())
    torch.manual_seed(rank)
    same: list[bool] = []
    calls: list[tuple[Callable[[], Any], Any]] = []
    replays: list[tuple[torch.cuda.CUDAGraph, list[Any]] | None] = []
    for batch in batches:
        meta, theirs = (cpattn.build_metadata(batch, size, rank, device="cuda") for _ in range(2))
        q, k, v = (torch.randn(meta.rows, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
        other = cpattn.cp_attention(q, k, v, theirs, group=cpattn.transport(kind="collectives"), strategy="all_gather", backend="triton")
        calls.append((partial(cpattn.cp_attention, q, k, v, meta, group=group, strategy="all_gather", backend="triton"), other))
        replays.append(None)
    for turn in turns:
        call, expected = calls[abs(turn)]
        for (name, _), block in group.arena._blocks.items():
            if name == "ordered":
                block.fill_(255)
        if group.shared.heap is not None:
            # Once the others have read what lies there.
            torch.cuda.synchronize()
            dist.barrier()
            group.shared.heap._memory[peer_memory._HEADER :].fill_(255)
        if turn < 0:
            captured = replays[abs(turn)]
            if captured is None:
                call()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    captured = graph, [call() for _ in range(3)]
                replays[abs(turn)] = captured
            graph, outs = captured
            graph.replay()
            same.append(all(torch.equal(out, expected) for out in outs))
        else:
            same.append(torch.equal(call(), expected))
    return same


def change_ways(ways: list[tuple[str, list[tuple[int, int]]]], turns: int, captures: bool) -> list[bool]:
    """Calls by several strategies, over prefixes as well, that follow each other at once in the same memory, while one rank after the
    other is late; or a graph of them, which follows itself. Whether each result is that of collectives."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = PeerMemoryTransport(dist.new_group())
    calls: list[Callable[[], Any]] = []
    expected: list[Any] = []
    for strategy, batch in ways:
        metas = [cpattn.build_metadata(batch, size, rank, device="cuda") for _ in range(2)]
        torch.manual_seed(7)
        prefix = cpattn.PackedKV(*(torch.randn(metas[0].plan.num_prefix_tokens, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv"))
        torch.manual_seed(rank)
        q, k, v = (torch.randn(metas[0].rows, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
        both = [
            partial(cpattn.cp_attention, q, k, v, meta, group=over, kv_cache=prefix, strategy=strategy, backend="triton")
            for meta, over in zip(metas, (group, cpattn.transport(kind="collectives")), strict=True)
        ]
        calls.append(both[0])
        expected.append(both[1]())
        both[0]()
    torch.cuda.synchronize()
    dist.barrier()
    graph, outs = torch.cuda.CUDAGraph(), []
    if captures:
        with torch.cuda.graph(graph):
            outs = [call() for call in calls]
    same = []
    for turn in range(turns):
        if turn % size == rank:
            torch.cuda._sleep(3_000_000)  # type: ignore[no-untyped-call]
        if captures:
            graph.replay()
        else:
            outs = [call() for call in calls]
        same += [torch.equal(out, other) for out, other in zip(outs, expected, strict=True)] if turn + size >= turns else []
    return same


def refusal_where(name: str, value: str | None) -> str:
    """What a call over peers' memory says with this in the environment, of ranks that share a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        transport = PeerMemoryTransport(dist.new_group())
        meta = cpattn.build_metadata([(0, 70)], transport.size, transport.rank, device="cuda")
        x = torch.randn(meta.rows, 2, 64, device="cuda")
        try:
            cpattn.cp_attention(x, x, x, meta, group=transport)
        except cpattn.UnsupportedError as error:
            return str(error)
    return "it was made"


def attend_where(name: str, value: str, cases: list[AttentionCase], strategy: str) -> list[tuple[Tensor, Tensor]]:
    """Each case over peers' memory, with this in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        transport = PeerMemoryTransport(dist.new_group())
        size, rank = dist.get_world_size(), dist.get_rank()
        return [case.on_rank(case.plan(size), rank, transport, strategy, "triton") for case in cases]


def replay_where(name: str, value: str) -> list[float]:
    """The largest difference between replays of a graph and eager calls, whose inputs change, with this in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        transport = PeerMemoryTransport(dist.new_group())
        meta = cpattn.build_metadata([(0, 300), (0, 5)], transport.size, transport.rank, device="cuda")
        q, k, v = (torch.randn(meta.rows, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
        call = partial(cpattn.cp_attention, q, k, v, meta, group=transport, strategy="all_gather", backend="triton")
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out: Any = call()
        differences = []
        for _ in range(4):
            for x in (q, k, v):
                x.normal_()
            graph.replay()
            got = out.clone()
            eager: Any = call()
            differences.append(float((got - eager).abs().max()))
        return differences


def along_mesh_axes(cases: list[AttentionCase], strategy: str) -> list[tuple[bool, str]]:
    """Calls over the axes of a mesh and over all ranks in turn, through peers' memory and by collectives: whether all bits are equal,
    and what each says of itself."""
    size = dist.get_world_size()
    mesh = DeviceMesh("cuda", torch.arange(size).view(-1, 2), mesh_dim_names=("outer", "inner"))
    results = []
    for _ in range(2):
        for group in (mesh["outer"], mesh["inner"], None):
            peers, collectives = (cpattn.transport(group, kind=kind) for kind in KINDS)
            for case in cases:
                plan = case.plan(peers.size)
                both = [case.on_rank(plan, peers.rank, transport, strategy, "triton") for transport in (peers, collectives)]
                same = all(torch.equal(mine, theirs) for mine, theirs in zip(*both, strict=True))
                results.append((same, peers.describe()))
    return results


def release_together() -> list[bool]:
    """Whether shared memory is given back to the GPU where ranks release it together, stays where a graph has captured it, and calls
    after either are right."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group()
    transport = cpattn.transport(group, kind="peer_memory")
    assert isinstance(transport, PeerMemoryTransport)
    meta = cpattn.build_metadata([(0, 20_000)], size, rank, device="cuda")
    q, k, v = (torch.randn(meta.rows, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 8, 8))
    expected = cpattn.cp_attention(q, k, v, meta, group=cpattn.transport(kind="collectives"), strategy="all_gather", backend="triton")
    call = partial(cpattn.cp_attention, q, k, v, meta, group=transport, strategy="all_gather", backend="triton")
    said = []
    for captures in (False, False, True):
        said.append(torch.equal(call(), expected))
        heap = transport.shared.heap
        assert heap is not None
        memory = weakref.ref(heap._memory)
        if captures:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out: Any = call()
        del heap
        # All but what ranks share, which stays.
        cpattn.release()
        assert memory() is not None
        cpattn.release(group)
        # How much the GPU has free says nothing while other processes use it.
        said.append((memory() is not None) if captures else memory() is None)
    graph.replay()
    said.append(torch.equal(out, expected))
    said.append(torch.equal(call(), expected))
    return said
