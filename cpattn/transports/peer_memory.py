"""Transports through memory that all ranks can read: a rank posts a message in memory of its own, and the others pull it from
there. No collective carries it, and a CUDA graph replays it.

What ranks say to each other on the host, and how they come to see each other's memory, differs:
:mod:`cpattn.transports.peer_processes` has it for processes, :mod:`cpattn.transports.peer_loopback` for threads.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cpattn.current import is_capturing
from cpattn.errors import GroupError, OptionError, UnsupportedError, in_a_line
from cpattn.kernels.peer_layout import BOARDS, OTHER_MESSAGE, WORD_BYTES, WORDS
from cpattn.moves.late_rows import LateRows
from cpattn.transports.part import PairwiseTransport
from cpattn.transports.peer_heap import PeerHeap, synchronize
from cpattn.transports.posted import HostTurns, Posted
from cpattn.transports.rows_of_all import LateRowsOfPeers, RowsOfPeers
from cpattn.transports.transfer import Transfer, Work
from cpattn.transports.transport import Transport

if TYPE_CHECKING:
    from cpattn.moves.peer_moves import Board

# How long the device waits for another rank before the group is given up.
DEFAULT_LIMIT_SECONDS = 30.0
_MOST_SECONDS = 24 * 3600
_MOST_BYTES = 8 * 2**30
_ALIGNMENT = 256
_HEADER = -(-WORDS * WORD_BYTES // _ALIGNMENT) * _ALIGNMENT
# Before the number of a fault, in what ranks say to each other.
_FAULT_FOUND = "has found fault "
# What a graph has captured stays, also where it outlives its transport.
_of_graphs: list[PeerHeap] = []


class PeerTransport(PairwiseTransport):
    """Over memory that the ranks share, for calls that can; the others go over what it is mixed with, which comes after it among a
    class's bases and carries what is sent outside of a call.

    A subclass says what the ranks do together on their hosts: ``_told_by_all``, ``_why_not_shared``, ``_allocate`` and ``_make_heap``.
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
        self._heap: PeerHeap | None = None
        # Those that graphs have captured, the present one among them or not.
        self._captured: list[PeerHeap] = []
        self._device: torch.device | None = None
        # Why the ranks cannot share memory; None as long as nobody has asked, or they can.
        self._why_not: str | None = None
        # What could not be made, in bytes, and why.
        self._too_large: tuple[int, str] | None = None
        # Of the call that is under way, or of the last one: whether it goes through shared memory.
        self._shares = False
        self._is_first = True
        self._captures = False
        self._placed: list[Posted] = []
        # The stream that copies run on.
        self._beside: torch.cuda.Stream | None = None
        # Where hosts wait for each other, and not devices.
        self._turns: HostTurns | None = None
        self.limit = limit

    @abstractmethod
    def _told_by_all(self, what: Any) -> list[Any]:
        """What each rank says to all, in the order of ranks. A collective of their hosts."""

    @abstractmethod
    def _why_not_shared(self, device: torch.device) -> str | None:
        """Why ranks whose tensors are on their GPUs cannot share memory, or None; the same on every rank. A collective of their hosts."""

    @abstractmethod
    def _allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """Memory that can be shared, uint8 of at least that many bytes; each rank by itself."""

    @abstractmethod
    def _make_heap(self, memory: Tensor) -> PeerHeap:
        """Of what each rank has allocated. A collective of their hosts."""

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
        return self._limit

    @limit.setter
    def limit(self, seconds: float) -> None:
        given: Any = seconds
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given <= _MOST_SECONDS:
            raise OptionError(f"limit={seconds!r}; pass seconds, more than 0 and at most {_MOST_SECONDS:,}")
        if self._device is not None and is_capturing(self._device):
            raise OptionError("limit= would be set at each replay of the graph that captures; set it before")
        self._limit = float(seconds)
        for heap in self._heaps():
            heap.set_limit(self._limit)

    def describe(self) -> str:
        """What carries the bytes, and why, in words."""
        if self._why_not is not None:
            return f"{self.kind}: {self._why_not}" if self._insists else f"{super().describe()}, since {self._why_not}"
        if self.size == 1:
            return f"{self.kind}: there is one rank, and nothing to send"
        if self._heap is not None:
            but = (
                "" if self._too_large is None else f"; not in calls of {self._too_large[0] / 2**20:.0f} MiB and more: {self._too_large[1]}"
            )
            return f"{self.kind}: its {self.size} ranks {self._sharing}{but}"
        return f"{self.kind}: in their first call over CUDA tensors the ranks find out whether they can share memory"

    def check_usable(self) -> None:
        """Raises GroupError once the process group is destroyed, or where a rank did not come in time."""
        super().check_usable()
        self.look_for_fault()

    def look_for_fault(self) -> None:
        """See :meth:`Transport.look_for_fault`."""
        fault = next((heap.fault for heap in self._heaps() if heap.fault), 0)
        if fault:
            # What waits within graphs over other memory ends, too.
            for heap in self._heaps():
                heap.mark(fault)
            self.state.give_up(self._in_words(fault))
            raise self.state.error()

    def ready(self, device: torch.device, captures: bool) -> None:
        """A call is about to send. At the first one the ranks find out whether they can share memory: a collective."""
        self._is_first, self._captures, self._shares = True, captures, False
        if self.size == 1:
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
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if self._heap is None and self._why_not is None:
            if self._captures:
                raise GroupError(
                    "a CUDA graph captures the first call over this group, in which its ranks find out whether they can share memory; make "
                    "one call over it before you capture"
                )
            self._device = device
            self._ask()
        if self._why_not is None and device != self._device:
            # The others do not know of it, and go on as before.
            raise UnsupportedError(
                f"this call's tensors are on {device}, but the memory that its ranks share is on {self._device}; keep to one GPU a rank"
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
        self._placed = []
        if not offsets:
            return True
        try:
            heap = self._heap_for(offsets, end)
        except UnsupportedError:
            if self._insists:
                raise
            heap = None
        if heap is None:
            # What was posted before in this call has been read.
            for message in offsets:
                message.board = message.memory = None
            self._shares = False
            return False
        from cpattn.moves.peer_moves import Board

        self._placed = list(offsets)
        for number, (message, offset) in enumerate(offsets.items()):
            message.board = Board(heap.table, self.rank, self.size, number, offset, message.nbytes, message.form)
            message.memory = heap.own_memory(offset, message.nbytes) if message.form else None
            message.turns = self._turns
        return True

    def _heap_for(self, messages: Collection[Posted], nbytes: int) -> PeerHeap | None:
        """A heap in which a call's messages have place; None where the call does without. Raises as :meth:`_grow`, and
        UnsupportedError where they are too many or too large."""
        if not self._shares or self._heap is None:
            return None
        largest = max(message.nbytes for message in messages)
        if len(messages) > BOARDS or largest > _MOST_BYTES:
            raise UnsupportedError(
                f"a call of {len(messages)} messages, the largest of {largest / 2**30:.1f} GiB; kind='peer_memory' takes {BOARDS} "
                f"of at most {_MOST_BYTES // 2**30} GiB: lower overlap=, or leave kind out"
            )
        if nbytes > self._heap.capacity:
            self._grow_once(nbytes)
        if self._captures and self._heap not in self._captured:
            self._captured.append(self._heap)
            _of_graphs.append(self._heap)
        return self._heap

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
        self._placed = []

    def on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the current device, which need not be that of the messages."""
        device = self._device
        if device is None or device.type != "cuda" or torch.cuda.current_device() == device.index:
            return nullcontext()
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
        if not self._takes(rows * like.nbytes) or rows * like.nbytes > _MOST_BYTES:
            return None
        from cpattn.transports.peer_rows import PeerRowsInOrder

        # What is read of it the strategy knows.
        return PeerRowsInOrder(Posted(rows * like.nbytes, form=late.form), 0, rows, like, fill_missing, late)

    def _takes(self, nbytes: int) -> bool:
        """Whether a message of that size goes through shared memory, as far as can be said before it has a place."""
        return self._shares and nbytes > 0 and (self._too_large is None or nbytes < self._too_large[0])

    def prepare_all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        """See :meth:`Transport.prepare_all_gather`, as for the others."""
        return self._through_heap(super().prepare_all_gather(out, x), x, partial(pull_later, out=out, first=0, many=self.size, skip=0))

    def prepare_shift(self, out: Tensor, x: Tensor, by: int = 1) -> Transfer:
        """Copy engines bring it, on a stream of their own."""
        return self._through_heap(super().prepare_shift(out, x, by), x, self._bring_one(out, (self.rank - by) % self.size))

    def _bring_one(self, out: Tensor, source: int) -> partial[Work]:
        """How another rank's message is brought."""
        return partial(_copy_beside, out=out, source=source)

    def prepare_rows_to(self, out: Tensor, x: Tensor, by: int, sent: int, received: int) -> Transfer | None:
        """See :meth:`Transport.prepare_rows_to`. What is posted is as large on every rank, and copy engines bring what is needed of it."""
        if not self._takes(x.nbytes):
            return super().prepare_rows_to(out, x, by, sent, received)
        shift = super().prepare_shift(out, x, by)
        # That nothing is read is said as the call ends.
        bring = self._bring_one(out, (self.rank - by) % self.size) if received else partial(_bring_nothing, out=out)
        moved = self._through_heap(shift, x, bring)
        moved.arguments[0].otherwise = None
        return moved._replace(nbytes=x[:sent].nbytes)

    def prepare_all_to_all(self, out: Tensor, x: Tensor) -> Transfer:
        """Each rank pulls its part of every message."""
        part_bytes = x.nbytes // self.size
        pull = partial(pull_later, out=out, first=0, many=self.size, skip=self.rank * part_bytes)
        return self._through_heap(super().prepare_all_to_all(out, x), x, pull)

    def _through_heap(self, transfer: Transfer, x: Tensor, bring: partial[Work]) -> Transfer:
        if not self._takes(x.nbytes):
            return transfer
        message = Posted(x.nbytes, transfer)
        bring.keywords["out"] = _as_bytes(bring.keywords["out"])
        return transfer._replace(begin=_post, arguments=(message, _as_bytes(x), bring), posted=message)

    def bring_beside(self, message: Posted, out: Tensor, source: int) -> Work:
        """Copies another rank's message on a stream of its own, while this stream goes on, as far as ``out`` has room for it."""
        from cpattn.moves.peer_moves import await_messages, end_copy

        heap, board = self._heap, message.begin_pull()
        assert heap is not None
        here = torch.cuda.current_stream(out.device)
        if self._beside is None:
            # What it waits for is worth more than what runs meanwhile.
            self._beside = torch.cuda.Stream(out.device, priority=-1)  # type: ignore[no-untyped-call]
        beside = self._beside
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            await_messages(board, source, 1)
            out.copy_(heap.message_of(source, board.offset, out.nbytes))
            end_copy(board, out)
        message.end_pull()
        return Work(partial(here.wait_stream, beside))

    def _in_words(self, fault: int) -> str:
        if fault < OTHER_MESSAGE:
            return f"rank {fault - 1} did not post or read a message within {self._limit:g} s"
        rank = fault - OTHER_MESSAGE
        return f"rank {rank} has posted another message: it has another plan or another kind of backend, or has skipped a call"

    def _ask(self) -> None:
        assert self._device is not None
        self._why_not = self._why_not_shared(self._device)
        if self._why_not is None:
            try:
                self._grow(self._least_bytes)
            except UnsupportedError as error:
                self._why_not = str(error)

    def _grow_once(self, nbytes: int) -> None:
        """As :meth:`_grow`. Whoever does not insist asks for no memory again that could not be made."""
        if self._too_large is not None and nbytes >= self._too_large[0]:
            raise UnsupportedError(self._too_large[1])
        try:
            self._grow(nbytes)
        except UnsupportedError as error:
            if not self._insists:
                self._too_large = nbytes, str(error)
            raise

    def _grow(self, nbytes: int) -> None:
        """A heap of that size, or more, on every rank, in the place of what there was. Raises on every rank alike, and leaves what
        there was: GroupError where a rank has found a fault, UnsupportedError where one has no memory."""
        if self._captures:
            raise GroupError(
                "a CUDA graph captures a call over larger messages than this group has had, for which its ranks have to make memory "
                "together; make one such call before you capture"
            )
        assert self._device is not None
        with self.on_device():
            memory, failure, heap = None, "", None
            try:
                failure = self._fault_on_device()
                memory = None if failure else self._allocate_or_empty_cache(nbytes + nbytes // 8, self._device)
            except Exception as error:
                failure = f"could not make {nbytes / 2**20:.0f} MiB of shared memory ({in_a_line(error)})"
            self._raise_first(failure)
            try:
                assert memory is not None
                heap = self._make_heap(memory)
            except Exception as error:
                failure = f"could not see the others' memory ({in_a_line(error)})"
            self._raise_first(failure)
            # Nobody reads the old one any more: all have come here, and have waited for their devices.
            self._heap = heap

    def release_together(self) -> None:
        """See :meth:`Transport.release_together`."""
        if self._heap is None:
            return
        assert self._device is not None
        if self.state.failure is not None:
            # Nobody comes any more, and nobody calls.
            self._heap = None
            return
        if is_capturing(self._device):
            raise GroupError(
                "a CUDA graph captures, and memory that ranks share is freed once their devices have done their work; release it before"
            )
        with self.on_device():
            is_captured = self._heap in self._captured
            said = self._told_by_all((self._fault_on_device(), is_captured))
        # Where a graph replays over it on one rank, the others' are read there.
        if not any(captured for _, captured in said):
            self._heap, self._too_large = None, None
        self._raise_fault(fault for fault, _ in said)

    def _allocate_or_empty_cache(self, nbytes: int, device: torch.device) -> Tensor:
        try:
            return self._allocate(nbytes, device)
        except torch.OutOfMemoryError:
            # It is not torch's caching allocator's, which may hold what is needed.
            torch.cuda.empty_cache()
            return self._allocate(nbytes, device)

    def _fault_on_device(self) -> str:
        """What has gone wrong, also as far as the host of a rank that has not waited does not know of it; waits for the device."""
        assert self._device is not None
        synchronize(self._device)
        return next((f"{_FAULT_FOUND}{fault}" for heap in self._heaps() if (fault := heap.fault_on_device())), "")

    def _raise_first(self, failure: str) -> None:
        """Raises what the first rank says that has failed, on every rank."""
        said = self._told_by_all(failure)
        self._raise_fault(said)
        for rank, text in enumerate(said):
            if text:
                raise UnsupportedError(f"rank {rank} {text}")

    def _raise_fault(self, said: Iterable[str]) -> None:
        for text in said:
            if text.startswith(_FAULT_FOUND):
                self.state.give_up(self._in_words(int(text.removeprefix(_FAULT_FOUND))))
                raise self.state.error()

    def _heaps(self) -> list[PeerHeap]:
        """All that calls or graphs may be using. A device that waits over one knows nothing of a fault in another until its host looks:
        it waits no longer than its own limit, and what it reads then is right or NaN."""
        if self._heap is None or self._heap in self._captured:
            return self._captured
        return [*self._captured, self._heap]


def _post(transport: Transport, message: Posted, x: Tensor, bring: Callable[..., Work]) -> Work:
    """Posts bytes, and says how the others' are brought."""
    assert isinstance(transport, PeerTransport)
    if message.board is None and message.otherwise is not None:
        # Only within a call a message has a place.
        return message.otherwise.begin(transport, *message.otherwise.arguments)
    from cpattn.moves.peer_moves import post_words

    board, is_first = transport.begin_post(message)
    with transport.on_device():
        post_words(board, x, is_first)
        message.end_post()
        return bring(transport, message)


def pull_later(transport: PeerTransport, message: Posted, out: Tensor, first: int, many: int, skip: int) -> Work:
    """Whoever waits pulls."""
    from cpattn.moves.peer_moves import pull_words

    def wait() -> None:
        with transport.on_device():
            pull_words(message.begin_pull(first, many), out, first, many, skip)
            message.end_pull()

    return Work(wait)


def _copy_beside(transport: PeerTransport, message: Posted, out: Tensor, source: int) -> Work:
    return transport.bring_beside(message, out, source)


def _bring_nothing(transport: PeerTransport, message: Posted, out: Tensor) -> Work:
    return Work(lambda: None)


def _as_bytes(x: Tensor) -> Tensor:
    """``[1, n]``."""
    # A view in another dtype that is made under inference_mode could not be written outside of it, as a failed call has to.
    with torch.inference_mode(False):
        return x.view(1, -1).view(torch.uint8)
