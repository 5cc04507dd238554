"""A transport through shared memory for ranks that are threads of one process, and whose tensors are on one GPU.

A kernel that waits for a flag could keep away from the GPU what sets it, as nothing says in which order the threads launch. So their
hosts wait: whoever pulls launches that once all others have launched what posts, in one stream, and whoever posts once all have
launched what reads. The kernels are those of ranks with a GPU each, and find that what they wait for is there.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cpattn.errors import UnsupportedError
from cpattn.kernels.available import has_kernels
from cpattn.kernels.peer_layout import MOST_RANKS
from cpattn.transports.loopback import LoopbackGroup, LoopbackTransport
from cpattn.transports.peer_heap import PeerHeap, empty_heap
from cpattn.transports.peer_memory import DEFAULT_LIMIT_SECONDS, PeerTransport
from cpattn.transports.peer_transfers import pull_later
from cpattn.transports.transfer import Work
from cpattn.transports.transport import Transport

if TYPE_CHECKING:
    from cpattn.moves.peer_moves import Board


class PeerLoopbackTransport(PeerTransport, LoopbackTransport):
    """Over memory of one GPU that all ranks of a loopback group share; all launch on one stream. What is sent outside of a call is
    copied."""

    _sharing = "are threads that share the memory of one GPU"

    def __init__(self, group: LoopbackGroup, rank: int) -> None:
        super().__init__(group, rank)
        self._set_up(DEFAULT_LIMIT_SECONDS, insists=True)

    def ready(self, device: torch.device, captures: bool) -> None:
        """See :meth:`Transport.ready`; all ranks meet, and see where each of them launches."""
        if self.size > 1 and device.type == self._device_type:
            places = self.told_by_all(_place(device))
            for rank, place in enumerate(places):
                if place != places[0]:
                    raise UnsupportedError(
                        f"kind='peer_memory' of a loopback group: rank 0 launches on {places[0]}, and rank {rank} on {place}; all ranks "
                        "share one GPU and one stream, as in cpattn.testing.run_loopback"
                    )
        super().ready(device, captures)

    def _told_by_all(self, what: Any) -> list[Any]:
        return self.group.meet(self.rank, what)

    def _why_not_shared(self, device: torch.device) -> str | None:
        if self.size > MOST_RANKS:
            return f"it is for at most {MOST_RANKS} ranks, and there are {self.size}"
        return None if has_kernels(device) else f"there are no Triton kernels for {device}"

    def allocate_shared(self, nbytes: int, device: torch.device) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def make_heap(self, memory: Tensor, seal: int) -> PeerHeap:
        empty_heap(memory, self.limit, seal)
        others, turns = zip(*self.told_by_all((memory.view(1, -1), Turns(self.group))), strict=True)
        # Those of rank 0 are everybody's; they are new, as the counts of the heap's flags are.
        self._turns = turns[0]
        return PeerHeap(memory, others)

    def _bring_one(self, out: Tensor, source: int) -> partial[Work]:
        # On the stream of all ranks: to begin a copy beside it now, its host would have to wait for the source's.
        return partial(pull_later, out=out, first=source, many=1, skip=0)

    def _make_part(self, ranks: tuple[int, ...]) -> Transport:
        raise UnsupportedError(
            "parts of a group do not share memory: make a LoopbackGroup for each axis; or split group.transport(rank), which sends copies"
        )


class Turns:
    """What the ranks of a heap have launched: :class:`cpattn.transports.posted.HostTurns`."""

    def __init__(self, group: LoopbackGroup) -> None:
        self._group = group
        # By rank and board.
        self._posts: Counter[tuple[int, int]] = Counter()
        self._reads: Counter[tuple[int, int]] = Counter()

    def await_readers(self, board: Board, first: bool) -> None:
        """See :class:`HostTurns`, as for the others."""

        def have_read() -> bool:
            mine = [
                (number, count) for (rank, number), count in self._posts.items() if rank == board.rank and (first or number == board.number)
            ]
            return all(self._reads[reader, number] >= count for number, count in mine for reader in range(board.size))

        self._group.await_change(have_read, f"all ranks to read rank {board.rank}'s last message")

    def await_posts(self, board: Board, first_rank: int, many: int) -> None:
        """Until their messages lie there, as far as this stream goes."""
        sources = [(first_rank + i) % board.size for i in range(many)]

        def have_posted() -> bool:
            count = self._posts[board.rank, board.number]
            return all(self._posts[source, board.number] >= count for source in sources)

        self._group.await_change(have_posted, f"messages that rank {board.rank} reads")

    def note_post(self, board: Board) -> None:
        """One more."""
        self._group.change(lambda: self._posts.update([(board.rank, board.number)]))

    def note_read(self, board: Board) -> None:
        """All that have been posted so far."""
        at = board.rank, board.number
        self._group.change(lambda: self._reads.update({at: self._posts[at] - self._reads[at]}))


def _place(device: torch.device) -> str:
    """Where kernels are launched, in words."""
    if device.type != "cuda":
        return str(device)
    return f"{device}, stream {torch.cuda.current_stream(device).cuda_stream}"
