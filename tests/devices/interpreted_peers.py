"""Kernels over the memory of peers without a GPU: in Triton's interpreter, which has no assembler; and between processes, whose memory is
files that all of them map."""

# mypy: allow-untyped-calls

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import triton.language as tl
from torch import Tensor

from cpattn.kernels import peer_exchange as exchange_kernel
from cpattn.kernels import peer_flags
from cpattn.moves import peer_exchange, peer_moves
from cpattn.transports import peer_processes
from cpattn.transports.peer_heap import PeerHeap
from cpattn.transports.peer_processes import PeerMemoryTransport


def without_assembler(patch: pytest.MonkeyPatch) -> None:
    """What the interpreter runs in the place of instructions. No time passes for those who wait."""
    patch.setattr(peer_flags, "_flags", lambda flags, is_waited: tl.load(flags, mask=is_waited, other=0))
    patch.setattr(peer_flags, "_now", lambda: 0)
    patch.setattr(peer_flags, "_any", lambda found: found)
    patch.setattr(exchange_kernel, "let_next_begin", lambda: None)
    patch.setattr(exchange_kernel, "fence_for_copies", lambda: None)
    patch.setattr(exchange_kernel, "announce", lambda flags, turn, is_there: tl.store(flags, turn, mask=is_there))


def over_files(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Has :class:`PeerMemoryTransport` take files in this folder for the memory of GPUs. Launches are of one program each: those of the
    interpreter run one after another, and the first would wait for the others."""
    without_assembler(patch)
    for how in ("SHORT", "LONG"):
        patch.setattr(peer_exchange, how, getattr(peer_exchange, how)._replace(posting=1, pulling=1))
    for most in ("_PROGRAMS", "_POSTING_PROGRAMS"):
        patch.setattr(peer_moves, most, 1)
    heaps = 0

    def mapped(rank: int, nbytes: int) -> Tensor:
        return torch.from_file(str(folder / f"heap {heaps} of {rank}"), shared=True, size=nbytes, dtype=torch.uint8)

    def allocate(nbytes: int, device: torch.device) -> Tensor:
        nonlocal heaps
        heaps += 1
        return mapped(dist.get_rank(), nbytes)

    def heap_of_processes(memory: Tensor, group: dist.ProcessGroup) -> PeerHeap:
        # All have emptied theirs before one of them looks.
        dist.barrier(group)
        return PeerHeap(memory, [mapped(rank, memory.numel()).view(1, -1) for rank in range(dist.get_world_size(group))])

    patch.setattr(peer_processes, "allocate", allocate)
    patch.setattr(peer_processes, "heap_of_processes", heap_of_processes)
    patch.setattr(PeerMemoryTransport, "_device_type", "cpu")
    patch.setattr(PeerMemoryTransport, "_why_not_shared", lambda self, device: None)
    patch.setattr(PeerMemoryTransport, "_least_bytes", 2**20)
