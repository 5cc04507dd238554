"""What ranks run that fail, or whose peers do: functions of an importable module, so that a process can be sent their names."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from inputs.cases import AttentionCase
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.transports.groups import Kind
from cpattn.transports.peer_memory import PeerTransport
from programs.failed_calls import Faults, attend_with_faults


def fail_and_go_on(cases: list[dict[str, Any]], faults: list[Faults], strategy: str, backend: str) -> list[tuple[Any, Any]]:
    """Each case, made here by its fields, twice: with faults, and without."""
    size, rank = dist.get_world_size(), dist.get_rank()
    results = []
    for fields, points in zip(cases, faults, strict=True):
        case = AttentionCase(**fields)
        plan = case.plan(size)
        first = attend_with_faults(case, plan, None, rank, strategy, backend, points)
        results.append((_on_host(first), _on_host(case.on_rank(plan, rank, None, strategy, backend, check=True))))
    return results


def _on_host(result: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...] | None:
    return None if result is None else tuple(x.cpu() for x in result)


class Seen(NamedTuple):
    """What a rank saw of one call: what came of it, and after how many seconds."""

    what: str
    seconds: float


def go_on(
    strategy: str,
    victim: int,
    fault: str,
    when: str,
    device: str,
    check: bool = False,
    calls: int = 3,
    *,
    kind: Kind = "auto",
    limit: float = 30.0,
) -> list[Seen]:
    """Calls one after another, of which the first meets a fault of one rank: it is killed, stopped, stopped for a while, or raises, before
    the call, within its attention, or after it. What this rank saw of each.

    Args:
        kind: of transport; limit: of one over the memory of peers, in seconds.
    """
    group = cpattn.transport(kind=kind)
    if isinstance(group, PeerTransport):
        # All make memory, and compile, before anybody is missed.
        group.limit = 10 * limit
        case = AttentionCase([(0, 200)], heads=4, kv_heads=4, dtype=torch.float16, device=device)
        _attend(case, case.plan(group.size).metadata(group.rank, device), group, strategy, None, None)
        dist.barrier()
        group.limit = limit
    seen = []
    # A call that one rank does not make is one that its peers make without it; all end together.
    is_skipped = (fault, when) == ("raises", "before") and dist.get_rank() != victim
    for number in range(calls - is_skipped):
        case = AttentionCase(
            [(0, 200)], heads=4, kv_heads=4, dtype=torch.float16 if device == "cuda" else torch.float32, seed=number, device=device
        )
        meta = case.plan(dist.get_world_size()).metadata(dist.get_rank(), device)
        is_hit = number == 0 and dist.get_rank() == victim
        begin = time.monotonic()
        try:
            if is_hit and when == "before":
                _meet(fault, limit)
            fault_within = fault if is_hit and when == "during" else None
            out, lse = _attend(case, meta, group, strategy, fault_within, f"call {number}" if check else None, limit)
            what = _judged(case, meta, out, lse)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
        seen.append(Seen(what, time.monotonic() - begin))
        if is_hit and when == "after":
            try:
                _meet(fault, limit)
            except RuntimeError:
                pass
    return seen


def _attend(
    case: AttentionCase,
    meta: cpattn.CPMetadata,
    group: cpattn.Transport,
    strategy: str,
    fault: str | None,
    label: str | None,
    limit: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """A call that is checked if it has a label, and meets the fault in its attention."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, *, out_dtype: torch.dtype, **options: Any) -> Any:
        if fault is not None:
            if q.is_cuda:
                torch.cuda.synchronize()
            _meet(fault, limit)
        return cpattn.BACKENDS["reference"].run(q, k, v, rows, AttentionOptions(**options), out_dtype)

    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    out, lse = cpattn.cp_attention(
        q, k, v, meta, group=group, strategy=strategy, backend=kernel, return_lse=True, check=label is not None, label=label
    )
    return out.cpu(), lse.cpu()


def _meet(fault: str, limit: float) -> None:
    if fault == "raises":
        raise RuntimeError("an error of this rank's own")
    if fault == "comes back":
        # Once the others have given it up.
        subprocess.Popen(["sh", "-c", f"sleep {limit + 2}; kill -CONT {os.getpid()}"])
        fault = "stopped"
    os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[fault])


def _judged(case: AttentionCase, meta: cpattn.CPMetadata, out: Tensor, lse: Tensor) -> str:
    index = meta.token_index[: meta.num_tokens].long().cpu()
    out, right = out[: meta.num_tokens].double(), case.expected[0].cpu()[index]
    is_nan = out.isnan().any(dim=(1, 2))
    if not torch.allclose(out[~is_nan], right[~is_nan], atol=1e-2):
        return "a wrong result"
    if not is_nan.any():
        return "the right result"
    assert lse[: meta.num_tokens].isnan().any()
    return "NaN, all of it" if is_nan.all() else "NaN where it needs that rank, the rest right"


def go_on_after_ctrl_c(strategy: str, late: float, raises: bool) -> tuple[list[str], float]:
    """Rank 0 gets a real SIGINT half a second into a call for which its peers are late: in its wait for them, or, if its
    kernel raises, while it carries out the rest. What each of three calls gave, and how long the first took."""
    rank, seconds = dist.get_rank(), 0.0
    seen: list[str] = []
    # What a shell starts in the background is made to ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, *, out_dtype: torch.dtype, **options: Any) -> Any:
        if raises and rank == 0 and not seen:
            raise RuntimeError("an error of this rank's own")
        return cpattn.BACKENDS["reference"].run(q, k, v, rows, AttentionOptions(**options), out_dtype)

    for number in range(3):
        case = AttentionCase([(0, 200)], heads=4, kv_heads=4, seed=number)
        meta = case.plan(dist.get_world_size()).metadata(rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        if number == 0 and rank == 0:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        elif number == 0:
            time.sleep(late)
        begin = time.monotonic()
        try:
            what = _judged(case, meta, *cpattn.cp_attention(q, k, v, meta, strategy=strategy, backend=kernel, return_lse=True))
        except (KeyboardInterrupt, Exception) as error:
            what = f"{type(error).__name__}: {error}"
        seconds = seconds or time.monotonic() - begin
        seen.append(what)
    return seen, seconds


def use_from_two_threads() -> tuple[list[str], bool]:
    """Two threads make calls at once: over one group by communicators of their own, then over a group for each."""
    size, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(range(size)) for _ in range(3)]
    case = AttentionCase([(0, 200)])
    meta = case.plan(size).metadata(rank)
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    both_are_there = threading.Barrier(2)
    messages: list[str] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, *, scale: float, out_dtype: torch.dtype, **options: Any) -> Any:
        both_are_there.wait(20)
        time.sleep(0.5)
        return cpattn.BACKENDS["reference"].run(q, k, v, rows, AttentionOptions(scale), out_dtype)

    def first() -> None:
        try:
            cpattn.cp_attention(q, k, v, meta, group=cpattn.ProcessGroupCommunicator(groups[0]), backend=kernel, strategy="all_gather")
        except cpattn.GroupError as error:
            messages.append(str(error))

    def second() -> None:
        both_are_there.wait(20)
        try:
            cpattn.cp_attention(q, k, v, meta, group=cpattn.ProcessGroupCommunicator(groups[0]), strategy="all_gather")
        except cpattn.GroupError as error:
            messages.append(str(error))

    _run_together(first, second)
    outs: dict[int, Tensor] = {}

    def alone(n: int) -> None:
        for _ in range(5):
            outs[n] = cpattn.unshard(cpattn.cp_attention(q, k, v, meta, group=groups[n]), meta, group=groups[n])

    _run_together(lambda: alone(1), lambda: alone(2))
    expected = case.expected[0].to(outs[1].dtype)
    return messages, all(torch.allclose(out, expected, atol=1e-5) for out in outs.values())


def _run_together(*programs: Callable[[], None]) -> None:
    threads = [threading.Thread(target=program) for program in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
