"""Transport: the collectives that an exchange needs, whatever carries them.

A message is a contiguous tensor of any dtype; it travels as bytes, so that nothing below has to know the dtype.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from cpattn.errors import TensorMismatchError, UnsupportedError
from cpattn.handles import new_handle
from cpattn.machine import Machine, find_machine
from cpattn.moves.late_rows import LateRows
from cpattn.transports.arena import Arena
from cpattn.transports.axes import ranks_of_axes
from cpattn.transports.group_state import GroupState
from cpattn.transports.rows_of_all import LateRowsOfPeers, RowsOfPeers
from cpattn.transports.transfer import Transfer, Work

# What reduce_scatter adds up.
_SUMMED = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

_living: WeakSet[Transport] = WeakSet()
# Another thread may make one while they are counted.
_living_changes = threading.Lock()


class Transport(ABC):
    """One rank's end of a context-parallel group: how bytes get from rank to rank. Every ``group=`` takes one.

    Every rank must make the same calls in the same order with the same sizes. One call of ``cp_attention`` uses a
    transport at a time; its memory is reused by the next.

    What is started over a group that was given up raises GroupError.

    A subclass has ``_all_gather``, ``_shift`` and ``_all_to_all``, which start a transfer of bytes and return its Work.

    Attributes:
        rank, size: within the group.
        state: of the group, as far as this process knows it.
        arena: the memory that messages lie in.
        part: of a part of a group (see :meth:`split`) its ranks within the whole; empty for a whole group.
        kind: what carries the bytes, as ``cpattn.transport(kind=)`` calls it.
        lasts: whether further calls will use it, so that what is prepared for one can be kept.
        bytes_sent: what this rank has sent to others so far; a broadcast counts once for each receiver.
        handle: by which operators in compiled graphs refer to this transport: int64 without an axis, on the CPU.
    """

    kind: str = "custom"
    state: GroupState
    part: tuple[int, ...] = ()
    lasts: bool = True
    _machine: Machine | None = None

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.state = GroupState()
        self.arena = Arena(self)
        self.bytes_sent = 0
        self.handle = new_handle(self)
        self._parts: dict[tuple[int, ...], Transport] = {}
        # Weak, as what is prepared for a call lasts as long as its batch.
        self._kept_launches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        with _living_changes:
            _living.add(self)

    def __repr__(self) -> str:
        part = f", ranks {', '.join(map(str, self.part))} of a larger group" if self.part else ""
        return f"{type(self).__name__}(rank {self.rank} of {self.size}{part})"

    @property
    def machine(self) -> Machine | None:
        """By whose constants ``"auto"`` compares ways to make a call; None for those of the device.

        The same on every rank: set it to what :func:`cpattn.measure_links` returns where links are unlike those of
        :data:`cpattn.MACHINES`, or to one of these by its name. What has been prepared already stays as it is.
        """
        return self._machine

    @machine.setter
    def machine(self, machine: Machine | str | None) -> None:
        self._machine = None if machine is None else find_machine(machine)

    def check_usable(self) -> None:  # noqa: B027 - most groups last as long as their transports
        """Raises GroupError where what it sends over is gone, or is known to have failed."""

    def describe(self) -> str:
        """What carries the bytes, and why, in words."""
        return self.kind

    def may_share_memory(self, device: torch.device) -> bool:
        """Whether calls with tensors on that device go through the memory of peers, or may, as long as nobody has found out. The same
        on every rank."""
        return False

    def ready(self, device: torch.device, captures: bool) -> None:  # noqa: B027 - most transports need nothing
        """A call with tensors on that device is about to send, and a CUDA graph may capture it. Raises what is wrong on every rank
        alike."""

    def place(self, transfers: Sequence[Transfer]) -> bool:
        """Takes the transfers that a call will make so far, in order, before the next. Raises what is wrong on every rank alike, or
        returns False on every rank: those that have not begun are to be made anew, and will go another way."""
        return True

    @property
    def kept_launches(self) -> MutableMapping[Any, Any] | None:
        """By prepared calls what they have done on the device, which stays right as long as it is kept here; None where calls of other
        ranks in this process have a part in it."""
        return self._kept_launches

    def repeat(self, bytes_sent: int) -> None:
        """A call begins that launches again what an earlier one has launched, which had sent so many bytes."""
        self.state.calls[self.part] += 1
        self.bytes_sent += bytes_sent

    def look_for_fault(self) -> None:  # noqa: B027 - most transports raise where they fail
        """Raises GroupError where a transfer is known to have failed on the device, without waiting for it."""

    def settle(self) -> None:  # noqa: B027 - most transports need nothing
        """Ends a call, also one that has raised: carries out what is owed beside its transfers."""

    def forget(self) -> None:  # noqa: B027 - most transports need nothing
        """Ends a call of which nothing was sent: a capture that has failed."""

    def rows_of_all(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, fill_missing: Callable[[Tensor], None]
    ) -> RowsOfPeers | None:
        """Rows that this rank reads where they lie, in the others' memory; None where it cannot, and they have to be gathered.

        Args:
            shape: of each rank's message, ``[rows, heads, width]``.
            fill_missing: writes into a message what stands for rows that a rank could not make.
        """
        return None

    @property
    def shares_memory(self) -> bool:
        """Of the call that is under way, or of the last one: whether ranks read each other's memory."""
        return False

    def late_rows(self, rows: int, like: Tensor, late: LateRows, fill_missing: Callable[[Tensor], None]) -> LateRowsOfPeers | None:
        """Messages of so many rows on each rank, which each has in an order of its own, and of which the others' rows come late; None
        where they cannot.

        Args:
            like: a row, ``[1, heads, width]``.
            late: where rows go.
            fill_missing: as for :meth:`rows_of_all`.
        """
        return None

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """Starts to bring every rank's ``x`` to every rank: ``out`` is ``[size * len(x), ...]``, in the order of ranks."""
        return self._start_alone(self.prepare_all_gather(out, x))

    def shift(self, out: Tensor, x: Tensor, by: int = 1) -> Work:
        """Starts to send ``x`` to the rank that comes ``by`` ranks later around the ring, the next one by default, and to
        receive into ``out`` from the one that comes as many before. ``by`` is no multiple of the size."""
        return self._start_alone(self.prepare_shift(out, x, by))

    def all_to_all(self, out: Tensor, x: Tensor) -> Work:
        """Starts to send part r of ``x`` to rank r and to receive rank r's part for this rank as part r of ``out``; both
        are ``[size, ...]``."""
        return self._start_alone(self.prepare_all_to_all(out, x))

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        """Starts to bring part r of every rank's ``x`` to rank r, where ``out`` is their sum: ``x`` is ``[size, ...]`` of
        fp64, fp32, bf16 or fp16, ``out`` one such part.

        The sum is made in the order of ranks, in fp32 (of fp64 in fp64), and rounded once: the same bits over any transport.

        >>> import cpattn, torch
        >>> alone = cpattn.LoopbackGroup(1).transport(0)
        >>> out = torch.empty(2)
        >>> alone.reduce_scatter(out, torch.tensor([[1.0, 2.0]])).wait()
        >>> out
        tensor([1., 2.])

        Raises TensorMismatchError where the two do not fit each other.
        """
        return self._start_alone(self.prepare_reduce_scatter(out, x))

    def prepare_all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        """An :meth:`all_gather` of these two, to be started any number of times: to view a message as bytes takes the host
        several microseconds, and all layers of a batch send from and to the same memory."""
        return Transfer(type(self)._all_gather, (self.size - 1) * x.nbytes, (as_bytes(out), as_bytes(x)), part=self.part)

    def prepare_shift(self, out: Tensor, x: Tensor, by: int = 1) -> Transfer:
        """A :meth:`shift` of these two, to be started any number of times."""
        return Transfer(type(self)._shift, x.nbytes, (as_bytes(out), as_bytes(x), by % self.size), part=self.part)

    def prepare_all_to_all(self, out: Tensor, x: Tensor) -> Transfer:
        """An :meth:`all_to_all` of these two, to be started any number of times."""
        parts = as_bytes(out).view(self.size, -1), as_bytes(x).view(self.size, -1)
        return Transfer(type(self)._all_to_all, x.nbytes // self.size * (self.size - 1), parts, part=self.part)

    def prepare_uneven_all_to_all(self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> Transfer | None:
        """An all-to-all of as many rows as each two ranks have for each other; None where this transport has none.

        >>> import cpattn, torch
        >>> def program(group):
        ...     x, out = torch.full((2,), group.rank), torch.empty(1 if group.rank else 2, dtype=torch.int64)
        ...     sent, received = ([0, 1], [0, 2]) if group.rank == 0 else ([2, 0], [1, 0])
        ...     group.start(group.prepare_uneven_all_to_all(out, x[: sum(sent)], received, sent)).wait()
        ...     return out.tolist()
        >>> cpattn.testing.run_loopback(program, size=2)
        [[1, 1], [0]]

        Args:
            out: ``[sum(received), ...]``, what comes from the ranks, one after another.
            x: ``[sum(sent), ...]``, likewise what goes to them.
            received, sent: the rows of each rank, ``[size]``; 0 of this one.
        """
        return None

    def prepare_rows_to(self, out: Tensor, x: Tensor, by: int, sent: int, received: int) -> Transfer | None:
        """A :meth:`shift` of as many rows as each rank has for the one that comes ``by`` ranks later; None where this transport has none.

        Args:
            out: ``[received, ...]``, from the rank that comes as many before.
            x: ``[n, ...]``, of which the first ``sent`` rows go; n is the same on every rank.
        """
        to, source = (self.rank + by) % self.size, (self.rank - by) % self.size
        many_in, many_out = ([rows * (rank == other) for rank in range(self.size)] for rows, other in ((received, source), (sent, to)))
        return self.prepare_uneven_all_to_all(out, x[:sent], many_in, many_out)

    def prepare_reduce_scatter(self, out: Tensor, x: Tensor, scratch: str = "reduce_scatter") -> Transfer:
        """A :meth:`reduce_scatter` of these two, to be started any number of times, and NaN for the others where this rank
        fails to make ``x``.

        Args:
            scratch: names the memory of the arena that the others' parts come into, and that the sum is made in. Two that
                are in flight at once need different names.
        """
        if x.shape != (self.size, *out.shape) or x.dtype != out.dtype or x.device != out.device or x.dtype not in _SUMMED:
            raise TensorMismatchError(
                f"reduce_scatter over {self.size} ranks: x is {x.dtype} {list(x.shape)} on {x.device}, and out {out.dtype} "
                f"{list(out.shape)} on {out.device}; x must be [{self.size}, *out.shape] of out's dtype, which is fp64, fp32, "
                "bf16 or fp16, on its device"
            )
        received = self.arena.buffer(f"{scratch} received", tuple(x.shape), x.dtype, x.device)
        exact = x.dtype in (torch.float32, torch.float64)
        total = out if exact else self.arena.buffer(f"{scratch} sum", tuple(out.shape), torch.float32, x.device)
        exchange = self.prepare_all_to_all(received, x)
        arguments = exchange, received, total, out
        return exchange._replace(begin=_reduce_scatter, arguments=arguments, fill_missing=partial(x.fill_, torch.nan))

    def start(self, transfer: Transfer) -> Work:
        """Starts what this transport has prepared, or a part of its group, or the whole that it is a part of; the bytes
        count as this one's."""
        self.bytes_sent += transfer.nbytes
        return transfer.begin(self.member(transfer.part), *transfer.arguments)

    def member(self, part: tuple[int, ...]) -> Transport:
        """This transport, or the one of that part of the same group, as ``Transfer.part`` says it."""
        return self if part == self.part else self._member(part)

    def _start_alone(self, transfer: Transfer) -> Work:
        """Outside of a call. Over a group that was given up it could meet what another rank still sends."""
        if self.state.failure is not None:
            raise self.state.error()
        return self.start(transfer)

    def split(self, *sizes: int) -> tuple[Transport, ...]:
        """The group in two dimensions or more: for each axis a transport of the ranks that differ in that coordinate only.

        Ranks are laid out with the last axis innermost: of ``split(2, 3)`` rank 4 has the coordinates (1, 1), its first
        transport has ranks 1 and 4, and its second one ranks 3, 4 and 5.

        >>> import cpattn
        >>> def program(group):
        ...     outer, inner = group.split(2, 3)
        ...     return outer.rank, inner.rank, inner.split(3)[0] is inner
        >>> cpattn.testing.run_loopback(program, size=6)[4]
        (1, 1, True)

        Nothing is sent to make them, the same sizes give the same transports again, and they end with the group. They send
        over the group's own process group, and so share its state: a call on one of them excludes calls on the group and on
        its other parts meanwhile, and a failure that gives up one gives up all. (Only the number of calls that ranks compare
        with ``check=True`` is each one's own.) What a part has prepared the whole can start: a call over the group may use
        transfers along its axes. Over NCCL the first transfer over a process group waits for all of its ranks, also where
        it is one of a part; afterwards parts do not wait for each other.

        Raises:
            OptionError: the sizes are no integers of at least 1.
            GroupError: they do not multiply to the size of the group, or it has been destroyed.
            UnsupportedError: a transport of one's own that has no parts.
        """
        self.check_usable()
        return tuple(self if len(ranks) == self.size else self._kept_part(ranks) for ranks in ranks_of_axes(self.rank, self.size, sizes))

    def parts(self) -> list[Transport]:
        """All that :meth:`split` has made so far."""
        return list(self._parts.values())

    def _kept_part(self, ranks: tuple[int, ...]) -> Transport:
        part = self._parts.get(ranks)
        return self._parts.setdefault(ranks, self._make_part(ranks)) if part is None else part

    def _make_part(self, ranks: tuple[int, ...]) -> Transport:
        """The end of these ranks, this one among them, by themselves."""
        raise UnsupportedError(
            f"{type(self).__name__} cannot be split: it does not say how to send between any two of its ranks; derive it from "
            "cpattn.transports.part.PairwiseTransport"
        )

    def _member(self, part: tuple[int, ...]) -> Transport:
        """The transport of that part of the same group."""
        return self._parts[part]

    @abstractmethod
    def _all_gather(self, out: Tensor, x: Tensor) -> Work: ...

    @abstractmethod
    def _shift(self, out: Tensor, x: Tensor, by: int) -> Work: ...

    @abstractmethod
    def _all_to_all(self, out: Tensor, x: Tensor) -> Work: ...

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """Memory for the arena, uint8 ``[nbytes]``, of a kind that this transport can send from and to."""
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """:meth:`Arena.buffer` of this transport's arena: uninitialised memory of that shape, kept under ``name`` and given
        again to whoever asks for that name."""
        return self.arena.buffer(name, shape, dtype, device)

    def release(self) -> None:
        """Frees the buffers that no CUDA graph has captured; the next call makes them anew."""
        self.arena.release()

    def release_together(self) -> None:  # noqa: B027 - most transports share nothing
        """Frees memory that ranks share and that no CUDA graph has captured: a collective, which waits for the device."""


# The name that it had first, for those who use or subclass it.
Communicator = Transport


def living_transports() -> list[Transport]:
    """All of this process."""
    with _living_changes:
        return list(_living)


def _reduce_scatter(transport: Transport, exchange: Transfer, received: Tensor, total: Tensor, out: Tensor) -> Work:
    work = exchange.begin(transport, *exchange.arguments)

    def wait() -> None:
        work.wait()
        # One after another: what torch.sum adds first is each device's own affair.
        total.copy_(received[0])
        for part in received[1:]:
            total.add_(part)
        if total is not out:
            out.copy_(total)

    return Work(wait)


def as_bytes(x: Tensor) -> Tensor:
    """A contiguous message as uint8 ``[nbytes]``."""
    # A view in another dtype that is made under inference_mode could not be written outside of it, as a failed call has to.
    with torch.inference_mode(False):
        return x.view(-1).view(torch.uint8)
