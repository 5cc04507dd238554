"""What each of the demo's ranks does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

import cpattn
from cpattn.transports.groups import as_transport
from cpattn.transports.transport import Transport

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

_TIMED_RUNS = {"cpu": 3, "cuda": 11}


class RankProgram(Protocol[T_co]):
    """What one rank runs, whatever carries its bytes."""

    def __call__(self, transport: Transport, *arguments: Any) -> T_co: ...


class Tensors(Protocol):
    """What makes the tensors of the whole batch, the same on every rank."""

    @property
    def plan(self) -> cpattn.Plan: ...

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, cpattn.PackedKV]: ...


@dataclass(frozen=True)
class RankResult:
    """What one rank gives back.

    Attributes:
        out, lse: its rows, on the CPU.
        backend: that computed them.
        seconds: the median time of a call.
        bytes_sent: in one call.
        restored: whether unshard gave back what shard had taken apart.
    """

    out: Tensor
    lse: Tensor
    backend: str
    seconds: float
    bytes_sent: int
    restored: bool


def as_process(program: RankProgram[T], *arguments: Any) -> T:
    """The program in a process of its own, in the default process group."""
    return program(as_transport(None, 0), *arguments)


def attend_on_rank(transport: Transport, setting: Tensors, strategy: str) -> RankResult:
    """One rank's share of the batch with one strategy: checked once, then computed and timed."""
    q, k, v, prefix = setting.tensors()
    meta = setting.plan.metadata(transport.rank, q.device)
    q_local, k_local, v_local = (cpattn.shard(x, meta) for x in (q, k, v))
    options: dict[str, Any] = {"group": transport, "kv_cache": prefix, "strategy": strategy, "return_lse": True}
    attention = cpattn.prepare(q_local, k_local, v_local, meta, check=True, **options)

    def attend() -> Any:
        return cpattn.cp_attention(q_local, k_local, v_local, meta, **options)

    cpattn.cp_attention(q_local, k_local, v_local, meta, check=True, **options)
    sent_before = transport.bytes_sent
    out, lse = attend()
    bytes_sent = transport.bytes_sent - sent_before
    seconds = median_seconds(attend, q.device)
    # What a model does at its end: bring everything back into the original order, on every rank.
    restored = torch.equal(cpattn.unshard(q_local, meta, group=transport), q)
    return RankResult(out.cpu(), lse.cpu(), attention.backend.name, seconds, bytes_sent, restored)


def median_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of a call, until the device has done it."""
    times = []
    for _ in range(_TIMED_RUNS[device.type]):
        _wait_for(device)
        start = time.perf_counter()
        function()
        _wait_for(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
