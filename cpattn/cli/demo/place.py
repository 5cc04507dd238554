"""Where the demo's ranks run: processes on the CPU, a GPU each, or threads that share one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist

from cpattn.cli.demo.program import RankProgram, as_process
from cpattn.cli.options import CP_SIZE
from cpattn.errors import CPError, PlanError, shown
from cpattn.testing import ProcessRanks, run_loopback

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")
_MOST_RANKS = 64
# Seconds that a rank may wait for another: the first call on a GPU compiles kernels.
_PATIENCE = 300.0


class Place(NamedTuple):
    """Where ranks run.

    Attributes:
        device: the kind of their tensors' device, ``"cpu"`` or ``"cuda"``.
        transport: ``"gloo"`` or ``"nccl"`` for a process each, ``"loopback"`` for a thread each.
        cp_size: the number of ranks.
    """

    device: str
    transport: Literal["gloo", "nccl", "loopback"]
    cp_size: int

    @property
    def num_devices(self) -> int:
        """GPUs at work; the processor counts as one."""
        return self.cp_size if self.transport == "nccl" else 1

    def __str__(self) -> str:
        if self.device == "cpu":
            return f"{self.cp_size} {'threads' if self.transport == 'loopback' else f'processes over {self.transport}'} on the CPU"
        name = torch.cuda.get_device_name(0)
        if self.transport == "nccl":
            return f"{self.cp_size} process{'es' if self.cp_size > 1 else ''} over NCCL, a GPU each: {name}"
        return (
            f"{self.cp_size} ranks as threads that share one GPU, {name}: messages are copies, and times are those of all ranks together; "
            "over NCCL each rank needs a GPU"
        )

    @contextmanager
    def ranks(self) -> Iterator[RunRanks]:
        """Runs a program on every rank, as often as it is called, and gives the results in the order of ranks."""
        if self.transport == "loopback":
            yield lambda program, *arguments: run_loopback(lambda transport: program(transport, *arguments), self.cp_size, _PATIENCE)
            return
        with ProcessRanks(self.cp_size, timeout=_PATIENCE, transport=self.transport) as processes:
            yield lambda program, *arguments: processes.run(as_process, program, *arguments)


class RunRanks(Protocol):
    """``run(program, *arguments)`` calls ``program(transport, *arguments)`` on every rank."""

    def __call__(self, program: RankProgram[T], *arguments: Any) -> list[T]: ...


def place_for(device: str, cp_size: int | None) -> Place:
    """What ``--device`` and ``--cp`` ask for.

    GPUs are taken where there are some: over NCCL if there is one for each rank, which it wants. With fewer the ranks share
    the first one, as threads.

    Raises CPError where there is no GPU to take, PlanError for too many ranks.
    """
    if cp_size is not None and cp_size > _MOST_RANKS:
        raise PlanError(f"--cp {shown(cp_size)} would start as many processes; the demo starts {_MOST_RANKS} at most")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise CPError(
            f"--device cuda: torch {torch.__version__} sees no CUDA GPU here; `cpattn env` says more, and --device cpu needs none"
        )
    if device == "cpu" or not gpus:
        return Place("cpu", "gloo", CP_SIZE if cp_size is None else cp_size)
    if cp_size is None:
        cp_size = gpus if gpus > 1 else CP_SIZE
    has_one_each = cp_size <= gpus and dist.is_available() and dist.is_nccl_available()
    return Place("cuda", "nccl" if has_one_each else "loopback", cp_size)
