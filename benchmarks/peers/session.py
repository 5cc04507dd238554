"""What a rank does for a benchmark: functions that :class:`cpattn.testing.ProcessRanks` runs, and what they keep in between."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn.testing import single_device_bound
from peers.variants import Variant
from peers.work import Call, Heads, Work

# Rows that are compared at once, which bounds the memory of their fp32 copies.
_COMPARED_ROWS = 8192
# How long the card rests before it is timed: as long as it was last busy, but not longer than this. At full load it lowers its
# clock, and a variant is then as fast as the one before it was economical.
_LEAST_REST, _MOST_REST = 0.002, 0.05


class Squares(NamedTuple):
    """Sums of squares over this rank's rows: of the difference to the reference, and of the reference."""

    difference: float
    reference: float


class Prepared(NamedTuple):
    """What is known of a call before it is timed.

    Attributes:
        squares: None where the result is not the batch's.
        seconds: that a call takes.
        memory: bytes that a call takes at its peak beside the batch's tensors, of torch's allocator: its result, and buffers that
            stay for the next; 0 on a CPU, and where buffers of others stay.
        way: see :class:`peers.work.Call`.
    """

    squares: Squares | None
    seconds: float
    memory: int
    way: str


class Times(NamedTuple):
    """Of a layer, in us; None where it was not timed so."""

    graph: float | None
    eager: float | None
    host: float | None


@dataclass
class _Session:
    """One batch on this rank.

    Attributes:
        frees: whether memory of earlier calls is freed before each variant, whose own is then known.
    """

    work: Work
    reference: Tensor
    variants: dict[str, Variant]
    frees: bool
    calls: dict[str, Call] = field(default_factory=dict)
    replays: dict[str, Callable[[], Any]] = field(default_factory=dict)
    stream: Any = None
    pool: Any = None
    rest: float = _LEAST_REST


_sessions: list[_Session] = []
# By their size, the one of each that this rank is in; they last as long as the process.
_groups: dict[int, dist.ProcessGroup | None] = {}
# A graph whose capture failed must not be destroyed: torch's allocator still asks it whether it is capturing.
_failed_graphs: list[torch.cuda.CUDAGraph] = []


def begin(batch: list[tuple[int, int]], heads: Heads, device_type: str, variants: dict[str, Variant], frees: bool = True) -> float:
    """Makes the tensors, and the result that all are compared with: cpattn's own over collectives. Returns by how much two exact
    results may differ, relative to their size."""
    finish(frees)
    for size in sorted({variant.ranks for variant in variants.values()} - {0}):
        _make_groups(size)
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device(device_type)
    like = torch.empty(0, dtype=torch.bfloat16 if device_type == "cuda" else torch.float32, device=device)
    work = Work.random(batch, dist.get_rank(), dist.get_world_size(), heads, like)
    meta = cpattn.build_metadata(batch, work.size, work.rank, device=device)
    q, k, v = (cpattn.shard(x, meta) for x in (work.q, work.k, work.v))
    out, lse = cpattn.cp_attention(
        q, k, v, meta, group=cpattn.transport(kind="collectives"), kv_cache=cpattn.PackedKV(work.prefix_k, work.prefix_v),
        strategy="all_gather", backend="triton" if device_type == "cuda" else "cpu", return_lse=True,
    )  # fmt: skip
    whole = cpattn.unshard(out, meta, group=cpattn.transport(kind="collectives"))
    _sessions.append(_Session(work, whole, variants, frees))
    # Each of the two may be off by what one kernel on one device may be.
    return 2 * single_device_bound(out.dtype, lse)


def finish(frees: bool = True) -> None:
    """Forgets the batch. What a graph has captured of messages' memory stays, so that over many batches that is to serve them all."""
    for session in _sessions:
        for call in session.calls.values():
            call.close()
    _sessions.clear()
    gc.collect()
    if frees:
        cpattn.release()
    # With a capture unended it would raise.
    if torch.cuda.is_available() and not _failed_graphs:
        torch.cuda.empty_cache()


def prepare(name: str, is_long: bool) -> Prepared:
    """Makes the variant's call, and makes it three times: to compile and be compared, to warm up, and to be timed. A long one is
    made once."""
    session = _sessions[-1]
    variant = session.variants[name]
    work = session.work
    if variant.ranks:
        work = work.over(_groups[variant.ranks], work.rank % variant.ranks, variant.ranks)
    call = variant.make(work)
    try:
        with torch.no_grad():
            in_step(session)
            before = _memory_before() if session.frees else 0
            start = time.perf_counter()
            out = call.run()
            _wait(session)
            seconds = time.perf_counter() - start
            memory = torch.cuda.max_memory_allocated() - before if out.is_cuda and session.frees else 0
            squares = None if call.tokens is None else _squares(out, call.tokens, session.reference)
            del out
            if not is_long:
                call.run()
                in_step(session)
                start = time.perf_counter()
                call.run()
                _wait(session)
                seconds = time.perf_counter() - start
    except BaseException:
        call.close()
        raise
    session.calls[name] = call
    return Prepared(squares, seconds, memory, call.way)


def capture(name: str, layers: int) -> Squares | None:
    """Captures so many layers as a CUDA graph, and compares what its replay gives."""
    session = _sessions[-1]
    call = session.calls[name]
    if session.variants[name].kind == "peer":
        _require_no_wait(call)
    # Buffers that were freed to measure the memory of others are made here, and not within the graph.
    with torch.no_grad():
        call.run()
    in_step(session)
    replay, out = _captured(session, call.run, layers)
    replay()
    squares = None if call.tokens is None else _squares(out, call.tokens, session.reference)
    session.replays[name] = replay
    return squares


def measure(name: str, layers: int, eagerly: bool = True) -> Times:
    """So many layers in a graph, as far as there is one, and the same run eagerly, if that is asked for or there is none; ranks begin in
    step."""
    session = _sessions[-1]
    replay, run = session.replays.get(name), session.calls[name].run
    with torch.no_grad():
        graph = None if replay is None else _device_us(session, replay, 1)[0] / layers
        if replay is not None and not eagerly:
            return Times(graph, None, None)
        eager, host = _device_us(session, run, layers)
    return Times(graph, eager / layers, host / layers)


def _make_groups(size: int) -> None:
    """As many groups of so many ranks as there can be, side by side. All ranks make all of them, in the same order."""
    if size in _groups:
        return
    world = dist.get_world_size()
    _groups[size] = None
    if 1 < size < world:
        made = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        _groups[size] = made[dist.get_rank() // size]


def _memory_before() -> int:
    """What is allocated without the buffers of earlier calls, from where on the peak is counted."""
    if not torch.cuda.is_available():
        return 0
    cpattn.release()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def drop(name: str) -> None:
    """Forgets one variant."""
    for session in _sessions:
        call = session.calls.pop(name, None)
        session.replays.pop(name, None)
        if call is not None:
            call.close()


def ping() -> int:
    """Whether the ranks still work together."""
    for session in _sessions:
        in_step(session)
    return dist.get_rank()


def in_step(session: _Session) -> None:
    """Ranks begin together, on the host and on the device."""
    _wait(session)
    dist.barrier()
    time.sleep(session.rest)
    dist.all_reduce(torch.zeros(1, device=session.work.device))


def _wait(session: _Session) -> None:
    if session.work.device.type == "cuda":
        torch.cuda.synchronize()


def _squares(out: Tensor, tokens: Tensor, reference: Tensor) -> Squares:
    sums = torch.zeros(2, dtype=torch.float64, device=out.device)
    for rows, which in zip(torch.split(out, _COMPARED_ROWS), torch.split(tokens, _COMPARED_ROWS), strict=True):
        expected = reference[which].float()
        sums += torch.stack([(rows.float() - expected).square().sum(), expected.square().sum()])
    difference, size = sums.tolist()
    return Squares(difference, size)


def _require_no_wait(call: Call) -> None:
    """Raises where a call waits for the device, which no graph can capture. A capture that fails would leave torch's allocator in
    the middle of it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            call.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(session: _Session, run: Callable[[], Tensor], layers: int) -> tuple[Callable[[], Any], Tensor]:
    # One stream and one memory for all graphs: nobody reads what they leave there.
    if session.stream is None:
        session.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    if session.pool is None:
        session.pool = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.stream(session.stream):
        # NCCL's own threads may ask the device what they like.
        graph.capture_begin(pool=session.pool, capture_error_mode="thread_local")
        try:
            for _ in range(layers):
                out = run()
        except BaseException:
            _abandon(graph, session)
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(session.stream)
    return graph.replay, out


def _abandon(graph: torch.cuda.CUDAGraph, session: _Session) -> None:
    """Ends a capture that has failed. Where torch cannot, its allocator goes on asking the graph, which then has to stay, and the
    memory is not for another."""
    try:
        graph.capture_end()
    except RuntimeError:
        _failed_graphs.append(graph)
        session.pool = None


def _device_us(session: _Session, run: Callable[[], Any], times: int) -> tuple[float, float]:
    """From the first launch to the end of the last, and what the host was busy with them, both in us."""
    in_step(session)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if session.work.device.type == "cuda" else []  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    for event in events[:1]:
        event.record()
    for _ in range(times):
        run()
    host = time.perf_counter() - start
    for event in events[1:]:
        event.record()
    _wait(session)
    seconds = events[0].elapsed_time(events[1]) * 1e-3 if events else host
    session.rest = min(max(seconds, _LEAST_REST), _MOST_REST)
    return seconds * 1e6, host * 1e6
