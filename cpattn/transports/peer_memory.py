"""Transports through memory that all ranks can read: a rank posts a message in memory of its own, and the others pull it from
there. No collective carries it, and a CUDA graph replays it.

What ranks say to each other on the host, and how they come to see each other's memory, differs:
:mod:`cpattn.transports.peer_processes` has it for processes, :mod:`cpattn.transports.peer_loopback` for threads. What is done alike is how
the memory grows (:mod:`cpattn.transports.shared_memory`) and what is sent through it (:mod:`cpattn.transports.peer_transfers`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Hashable, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cpattn.current import is_current
from cpattn.errors import GroupError, UnsupportedError, in_a_line
from cpattn.kernels.peer_layout import WORD_BYTES, WORDS
from cpattn.log import logger
from cpattn.memo import Memo
from cpattn.moves.late_rows import LateRows
from cpattn.noted import launch
from cpattn.transports.part import PairwiseTransport
from cpattn.transports.peer_heap import PeerHeap
from cpattn.transports.peer_transfers import bring_nothing, copy_beside, pull_later, through_memory
from cpattn.transports.posted import HostTurns, Posted
from cpattn.transports.rows_of_all import LateRowsOfPeers, RowsOfPeers
from cpattn.transports.shared_memory import MOST_MESSAGE_BYTES, SharedMemory
from cpattn.transports.transfer import Transfer, Work

if TYPE_CHECKING:
    from cpattn.moves.peer_moves import Board

# How long the device waits for another rank before the group is given up.
DEFAULT_LIMIT_SECONDS = 30.0
_ALIGNMENT = 256
_HERE = nullcontext()
_HEADER = -(-WORDS * WORD_BYTES // _ALIGNMENT) * _ALIGNMENT


class PeerTransport(PairwiseTransport):
    """Over memory that the ranks share, for calls that can; the others go over what it is mixed with, which comes after it among a
    class's bases and carries what is sent outside of a call.

    A subclass says what the ranks do together on their hosts: ``_told_by_all``, ``_why_not_shared``, and the rest of
    :class:`cpattn.transports.shared_memory.Sharers`.

    Attributes:
        shared: the memory.
    """

    # What the ranks do, in words.
    _sharing: ClassVar[str]
    # Of the tensors that its kernels take; tests run them in Triton's interpreter.
    _device_type: ClassVar[str] = "cuda"
    # Of a heap as it is first made.
    _least_bytes: ClassVar[int] = 32 * 2**20

    def _set_up(self, limit: float, insists: bool) -> None:
        """Of each one as it is made.

        Args:
            limit: seconds that a rank's device waits for another's.
            insists: whether it refuses the calls that it cannot serve; if not they go another way, on all ranks alike.
        """
        self.kind = "peer_memory" if insists else "auto"
        self._insists = insists
        self.shared = SharedMemory(limit)
        # Why the ranks cannot share memory; None as long as nobody has asked, or they can.
        self._why_not: str | None = None
        # Of the call that is under way, or of the last one: whether it goes through shared memory.
        self._shares = False
        self._is_first = True
        self._captures = False
        self._placed: Collection[Posted] = ()
        # Those of earlier calls, which layers and batches use again.
        self._boards: Memo[Hashable, Board] = Memo(64)
        # The stream that copies run on.
        self._beside: torch.cuda.Stream | None = None
        # Where hosts wait for each other, and not devices.
        self._turns: HostTurns | None = None
        # What the log has a warning of.
        self._warned: Memo[Hashable, None] = Memo(64)

    def told_by_all(self, what: Any) -> list[Any]:
        """See :class:`Sharers`, as for the two below. Raises GroupError where a rank does not come, or what ranks say is lost."""
        try:
            return self._told_by_all(what)
        except BaseException as failure:
            # Nobody knows how far the others have come.
            self.state.give_up(f"its ranks could not agree on the memory that they share ({in_a_line(failure)})")
            if isinstance(failure, Exception):
                raise self.state.error() from failure
            raise

    @abstractmethod
    def _told_by_all(self, what: Any) -> list[Any]:
        """How ranks tell each other."""

    @abstractmethod
    def allocate_shared(self, nbytes: int, device: torch.device) -> Tensor: ...

    @abstractmethod
    def make_heap(self, memory: Tensor, seal: int) -> PeerHeap: ...

    @abstractmethod
    def _why_not_shared(self, device: torch.device) -> str | None:
        """Why ranks whose tensors are on their GPUs cannot share memory, or None; the same on every rank. A collective of their hosts."""

    @property
    def shares_memory(self) -> bool:
        """Of the call that is under way, or of the last one: whether it goes through shared memory."""
        return self._shares

    def may_share_memory(self, device: torch.device) -> bool:
        """Where the ranks have not found that they cannot."""
        return device.type == "cuda" and self.size > 1 and self._why_not is None

    @property
    def cannot_share(self) -> bool:
        """Whether the ranks have found that they cannot share memory."""
        return self._why_not is not None

    @property
    def limit(self) -> float:
        """Seconds that this rank's device waits for another's message before the group is given up. It may be set at any time but
        while a graph captures, and holds for graphs that are captured already."""
        return self.shared.limit

    @limit.setter
    def limit(self, seconds: float) -> None:
        self.shared.set_limit(seconds)

    def describe(self) -> str:
        """What carries the bytes, and why, in words."""
        if self._why_not is not None:
            return f"{self.kind}: {self._why_not}" if self._insists else f"{super().describe()}, since {self._why_not}"
        if self.size == 1:
            return f"{self.kind}: there is one rank, and nothing to send"
        if self.shared.heap is not None:
            too_large = self.shared.too_large
            but = "" if too_large is None else f"; not in calls of {too_large[0] / 2**20:.0f} MiB and more: {too_large[1]}"
            return f"{self.kind}: its {self.size} ranks {self._sharing}{but}"
        return f"{self.kind}: in their first call over CUDA tensors the ranks find out whether they can share memory"

    def check_usable(self) -> None:
        """Raises GroupError once the process group is destroyed, or where a rank did not come in time."""
        super().check_usable()
        self.shared.look_for_fault(self)

    def look_for_fault(self) -> None:
        """See :meth:`Transport.look_for_fault`."""
        self.shared.look_for_fault(self)

    def release_together(self) -> None:
        """See :meth:`Transport.release_together`."""
        self.shared.release(self, alone=self.state.failure is not None or not self._can_meet())

    def _can_meet(self) -> bool:
        """Whether there is still a group to meet in: over one that was destroyed torch may end the process."""
        try:
            super().check_usable()
        except GroupError:
            return False
        return True

    def ready(self, device: torch.device, captures: bool) -> None:
        """A call is about to send. At the first one the ranks find out whether they can share memory: a collective."""
        self._is_first, self._captures, self._shares = True, captures, False
        if self.size == 1:
            return
        shared = self.shared
        if self._why_not is None and shared.heap is not None and device == shared.device:
            # As in every call but the first.
            self._shares = True
            return
        if device.type != self._device_type:
            why_not: str | None = f"it is for CUDA tensors, and this call's are on {device}"
        else:
            why_not = self._why_not_on(device)
        self._shares = why_not is None
        if why_not is not None and self._insists:
            raise UnsupportedError(f"kind='peer_memory' cannot serve this call: {why_not}; leave kind out")

    def _why_not_on(self, device: torch.device) -> str | None:
        """Why ranks whose tensors are on their GPUs cannot share memory, or None."""
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        if self.shared.heap is None and self._why_not is None:
            if self._captures:
                raise GroupError(
                    "a CUDA graph captures the first call over this group, in which its ranks find out whether they can share memory; make "
                    "one call over it before you capture"
                )
            self.shared.device = device
            self._why_not = self._why_not_shared(device)
            if self._why_not is None:
                try:
                    self.shared.grow(self, self._least_bytes, captures=False)
                except UnsupportedError as error:
                    if self._insists:
                        # It is asked for again, as memory for a larger call is.
                        return str(error)
                    self._why_not = str(error)
                    self._warn("calls", error)
            if self.rank == 0:
                logger().info("%d ranks on %s send %s", self.size, device, self.describe())
        ours = self.shared.device
        if self._why_not is None and device != ours:
            # The others do not know of it, and go on as before.
            raise UnsupportedError(
                f"this call's tensors are on {device}, but the memory that its ranks share is on {ours}; keep to one GPU a rank"
            )
        return self._why_not

    def place(self, transfers: Sequence[Transfer]) -> bool:
        """Gives the messages of a call their places, the same on every rank."""
        offsets: dict[Posted, int] = {}
        end = _HEADER
        for transfer in transfers:
            message = transfer.posted
            if message is not None and message not in offsets:
                offsets[message] = end
                end += -(-message.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._placed = ()
        if not offsets:
            return True
        heap = self._heap_for(offsets, end)
        if heap is None:
            # What was posted before in this call has been read.
            for message in offsets:
                message.board = message.memory = None
            self._shares = False
            return False
        self._placed = offsets
        for number, (message, offset) in enumerate(offsets.items()):
            key = number, offset, message.nbytes, message.form
            board = self._boards.get(key)
            if board is None or board.table is not heap.table:
                from cpattn.moves.peer_moves import Board

                board = self._boards.keep(key, Board(heap.table, self.rank, self.size, *key))
            message.board = board
            message.memory = heap.own_memory(offset, message.nbytes) if message.form else None
            message.turns = self._turns
        return True

    def _heap_for(self, messages: Collection[Posted], nbytes: int) -> PeerHeap | None:
        """A heap in which a call's messages have place; None where the call does without. Raises as :meth:`SharedMemory.heap_for`."""
        if not self._shares or self.shared.heap is None:
            return None
        try:
            return self.shared.heap_for(self, messages, nbytes, captures=self._captures, insists=self._insists)
        except UnsupportedError as error:
            if self._insists:
                raise
            too_large = self.shared.too_large
            self._warn("a call" if too_large is None else f"calls of {too_large[0] / 2**20:.0f} MiB and more", error, too_large)
            return None

    def _warn(self, what: str, reason: UnsupportedError, of: Hashable = None) -> None:
        """One rank does it for all, once: what they might share memory for goes by collectives, which works and is slower."""
        if self._insists or self.rank != 0 or of in self._warned:
            return
        self._warned.keep(of, None)
        text = "cpattn sends %s over %d ranks by collectives, and not through the memory of peers: %s"
        logger().warning(text, what, self.size, reason)

    def settle(self) -> None:
        """Has the others know that this rank has read all that it will read of the call; its messages have no place any more."""
        for message in self._placed:
            if not message.is_pulled and message.board is not None:
                # Not before: where nothing was placed, Triton need not be there.
                from cpattn.moves.peer_moves import pull_nothing

                with self.on_device():
                    pull_nothing(message.begin_pull())
                    message.end_pull()
        self.forget()

    def forget(self) -> None:
        """See :meth:`Transport.forget`."""
        for message in self._placed:
            message.board, message.memory, message.is_pulled = None, None, True
        self._placed = ()

    @property
    def kept_launches(self) -> MutableMapping[Any, Any] | None:
        """See :meth:`Transport.kept_launches`. They go with the memory that they read and write."""
        if self._turns is not None or not all(message.is_pulled for message in self._placed):
            return None
        heap = self.shared.heap
        return super().kept_launches if heap is None else heap.kept_launches

    def repeat(self, bytes_sent: int) -> None:
        """See :meth:`Transport.repeat`."""
        super().repeat(bytes_sent)
        # As in ready(): what ranks compare with ``check=True`` must not depend on which way one of them has gone.
        self._shares = self.size > 1 and self.shared.heap is not None

    def on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the current device, which need not be that of the messages."""
        device = self.shared.device
        if device is None or device.type != "cuda" or is_current(device):
            return _HERE
        return torch.cuda.device(device)

    def begin_post(self, message: Posted) -> tuple[Board, bool]:
        """Where a message is posted that is about to be, and whether it is the first of its call."""
        is_first, self._is_first = self._is_first, False
        return message.begin_post(is_first), is_first

    def rows_of_all(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, fill_missing: Callable[[Tensor], None]
    ) -> RowsOfPeers | None:
        """See :meth:`Transport.rows_of_all`."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not self._takes(nbytes):
            return None
        from cpattn.transports.peer_rows import PeerRows

        return PeerRows(Posted(nbytes), nbytes * (self.size - 1), shape, dtype, device, fill_missing)

    def late_rows(self, rows: int, like: Tensor, late: LateRows, fill_missing: Callable[[Tensor], None]) -> LateRowsOfPeers | None:
        """See :meth:`Transport.late_rows`."""
        if not self._takes(rows * like.nbytes) or rows * like.nbytes > MOST_MESSAGE_BYTES:
            return None
        from cpattn.transports.peer_rows import PeerRowsInOrder

        # What is read of it the strategy knows.
        return PeerRowsInOrder(Posted(rows * like.nbytes, form=late.form), 0, rows, like, fill_missing, late)

    def _takes(self, nbytes: int) -> bool:
        """Whether a message of that size goes through shared memory, as far as can be said before it has a place."""
        return self._shares and self.shared.takes(nbytes)

    def prepare_all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        """See :meth:`Transport.prepare_all_gather`, as for the others."""
        return self._through_heap(super().prepare_all_gather(out, x), x, partial(pull_later, out=out, first=0, many=self.size, skip=0))

    def prepare_shift(self, out: Tensor, x: Tensor, by: int = 1) -> Transfer:
        """Copy engines bring it, on a stream of their own."""
        return self._through_heap(super().prepare_shift(out, x, by), x, self._bring_one(out, (self.rank - by) % self.size))

    def _bring_one(self, out: Tensor, source: int) -> partial[Work]:
        """How another rank's message is brought."""
        return partial(copy_beside, out=out, source=source)

    def prepare_rows_to(self, out: Tensor, x: Tensor, by: int, sent: int, received: int) -> Transfer | None:
        """See :meth:`Transport.prepare_rows_to`. What is posted is as large on every rank, and copy engines bring what is needed of it."""
        if not self._takes(x.nbytes):
            return super().prepare_rows_to(out, x, by, sent, received)
        shift = super().prepare_shift(out, x, by)
        # That nothing is read is said as the call ends.
        bring = self._bring_one(out, (self.rank - by) % self.size) if received else partial(bring_nothing, out=out)
        moved = self._through_heap(shift, x, bring)
        moved.arguments[0].otherwise = None
        return moved._replace(nbytes=x[:sent].nbytes)

    def prepare_all_to_all(self, out: Tensor, x: Tensor) -> Transfer:
        """Each rank pulls its part of every message."""
        part_bytes = x.nbytes // self.size
        pull = partial(pull_later, out=out, first=0, many=self.size, skip=self.rank * part_bytes)
        return self._through_heap(super().prepare_all_to_all(out, x), x, pull)

    def _through_heap(self, transfer: Transfer, x: Tensor, bring: partial[Work]) -> Transfer:
        return through_memory(transfer, x, bring) if self._takes(x.nbytes) else transfer

    def bring_beside(self, message: Posted, out: Tensor, source: int) -> Work:
        """Copies another rank's message on a stream of its own, while this stream goes on, as far as ``out`` has room for it."""
        heap, board = self.shared.heap, message.begin_pull()
        assert heap is not None
        if self._beside is None:
            # What it waits for is worth more than what runs meanwhile.
            self._beside = torch.cuda.Stream(out.device, priority=-1)  # type: ignore[no-untyped-call]
        launch(partial(_copy_beside, self._beside, board, source), out, heap.message_of(source, board.offset, out.nbytes))
        message.end_pull()
        return Work(partial(launch, partial(_follow, self._beside, out.device)))


# What is noted of a call lies with the heap: without a reference to the transport both are freed as soon as nobody holds them.
def _copy_beside(beside: torch.cuda.Stream, board: Board, source: int, out: Tensor, message: Tensor) -> None:
    from cpattn.moves.peer_moves import await_messages, end_copy

    beside.wait_stream(torch.cuda.current_stream(out.device))
    with torch.cuda.stream(beside):
        await_messages(board, source, 1)
        out.copy_(message)
        end_copy(board, out)


def _follow(beside: torch.cuda.Stream, device: torch.device) -> None:
    torch.cuda.current_stream(device).wait_stream(beside)
