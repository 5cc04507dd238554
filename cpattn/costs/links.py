"""Measuring what carries a group's messages: ``cpattn.measure_links``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch

from cpattn.current import is_capturing
from cpattn.errors import GroupError, UnsupportedError, in_a_line
from cpattn.graphs import leaves_graph
from cpattn.machine import H100, LinkCosts, Machine, find_machine
from cpattn.metadata.devices import parse_device
from cpattn.transports.groups import Group, transport
from cpattn.transports.in_flight import InFlight
from cpattn.transports.peer_memory import PeerTransport
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport

# Bytes of a message: one for the latency, two whose difference is the rate. On a CPU less, as less is sent there in a ms.
_SIZES = (2**16, 2**22, 2**25)
_CPU_SIZES = (2**10, 2**16, 2**19)
# Bytes that a rank receives at most: over many ranks messages are smaller.
_MOST_BYTES = 2**28
# Messages of each kind and size, after one that is not timed.
_ROUNDS = 7
# Cycles that a GPU is kept busy while its host launches what is timed: about half a ms.
_HEAD_START = 1_000_000


class _Times(NamedTuple):
    """Of one message, in seconds: until it is there, and of the host that starts it."""

    done: float
    host: float


class _Measured(NamedTuple):
    """What of a link is measured; see :class:`cpattn.LinkCosts`."""

    latency: float
    gather: float
    shift: float
    host_gather: float
    host_shift: float
    measured_ranks: int
    shift_latency: float

    def into(self, known: LinkCosts) -> LinkCosts:
        """A link as known otherwise, without what is known of groups of other sizes."""
        return replace(known, from_one=None, shift_of_many=None, **self._asdict())


@leaves_graph
def measure_links(group: Group = None, machine: Machine | str = "h100-nvlink", *, device: torch.device | str | None = None) -> Machine:
    """Measures what carries a group's messages, and returns the machine with those links. A collective call, of tens of ms to a second.

    >>> import cpattn
    >>> def program(group):
    ...     return cpattn.measure_links(group, "h200-nvlink", device="cpu")
    >>> first, second = cpattn.testing.run_loopback(program, size=2)
    >>> first == second, first.name, first.collectives.gather > 0
    (True, 'h200-nvlink, links measured', True)

    An all-gather and a message to the next rank are timed at three sizes, seven times each. Of each the median of the slowest rank counts,
    so that all ranks return the same. It takes up to 300 MiB of memory meanwhile. A rank that fails in the midst gives the group up, as the
    others have gone on. It is for :func:`cpattn.estimate`, and as ``cpattn.transport(group).machine``
    for ``"auto"``, where links are unlike what these know; what the rest of the machine does is taken as it is given.

    Args:
        group: as for :func:`cpattn.transport`, whose kind says what is measured: by itself that is what calls over the group take. A group
            of one rank has no links, and gives the machine back.
        machine: a :class:`Machine` or a name of :data:`cpattn.MACHINES`; the same on every rank.
        device: that messages lie on; by default the current GPU, or the CPU where there is none.

    Returns:
        The machine with other ``collectives`` and ``across``, or, where messages went through the memory of peers, with another
        ``peer_memory``. Where the ranks have found that they cannot share memory, it has none.

    Raises:
        UnknownNameError: there is no machine of that name.
        GroupError: there is no group, it was given up, or a CUDA graph is being captured.
        UnsupportedError: the group's transport, which was named, cannot carry messages on that device.
        CPError: the device is none.
    """
    machine = find_machine(machine)
    found = transport(group)
    on = parse_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if on.type == "cuda" and is_capturing(on):
        raise GroupError("a CUDA graph captures this call, which waits for the device; measure links before you capture")
    if found.size == 1:
        return machine
    try:
        measured = _measure(found, on)
    except UnsupportedError:
        raise  # by all ranks alike
    except BaseException as failure:
        # Between two of its many messages nobody sends what is left for a rank that stops: its next call would meet them.
        found.state.give_up(f"measuring its links was interrupted ({in_a_line(failure)})")
        raise
    return _with_links(machine, found, measured)


def _with_links(machine: Machine, found: Transport, measured: _Measured) -> Machine:
    """The machine with what was measured, in the place of what carried it."""
    name = f"{machine.name}, links measured"
    # What an automatic choice takes it has found out by now.
    if isinstance(found, PeerTransport):
        if found.shares_memory:
            # What is hidden beside attention is much alike.
            known = machine.peer_memory or H100.peer_memory
            assert known is not None
            # Those that share memory are of one host.
            of_host = max(machine.ranks_per_host, found.size)
            return replace(machine, name=name, peer_memory=measured.into(known), ranks_per_host=of_host)
        if found.cannot_share:
            machine = replace(machine, peer_memory=None)
    own = machine.link("collectives", found.size)
    assert own is not None  # any group has collectives
    link = measured.into(own)
    return replace(machine, name=name, collectives=link, across=link)


def _measure(found: Transport, device: torch.device) -> _Measured:
    sizes = _sizes(found.size, device)
    memory = torch.zeros(found.size + 1, sizes[-1], dtype=torch.uint8, device=device)

    def gather(nbytes: int) -> Transfer:
        return found.prepare_all_gather(memory[:-1].flatten()[: found.size * nbytes].view(found.size, nbytes), memory[-1, :nbytes])

    def shift(nbytes: int) -> Transfer:
        return found.prepare_shift(memory[0, :nbytes], memory[-1, :nbytes])

    times = [_timed(found, device, make, nbytes) for make in (gather, shift) for nbytes in sizes]
    slowest = _of_slowest(found, device, [value for one in times for value in one])
    done, host = slowest[::2], slowest[1::2]
    count = len(sizes)
    gather_rate, gather_latency = _line([nbytes * (found.size - 1) for nbytes in sizes], done[:count])
    shift_rate, shift_latency = _line(sizes, done[count:])
    return _Measured(gather_latency, gather_rate, shift_rate, host[0], host[count], found.size, shift_latency)


def _sizes(cp_size: int, device: torch.device) -> list[int]:
    """Bytes of messages, of which a group of so many ranks has memory for one from each."""
    sizes = _CPU_SIZES if device.type == "cpu" else _SIZES
    # By a power of two, so that they stay aligned.
    smaller = ((cp_size * sizes[-1] - 1) // _MOST_BYTES).bit_length()
    return [size >> smaller for size in sizes]


def _line(sizes: list[int], seconds: list[float]) -> tuple[float, float]:
    """Bytes a second, and seconds of no bytes."""
    grows = seconds[-1] - seconds[-2]
    # Where noise is larger than what the size adds, the whole message counts.
    rate = (sizes[-1] - sizes[-2]) / grows if grows > 0 else sizes[-1] / max(seconds[-1], 1e-9)
    return rate, max(0.0, seconds[0] - sizes[0] / rate)


def _timed(found: Transport, device: torch.device, make: Callable[[int], Transfer], nbytes: int) -> _Times:
    """The medians of one kind and size."""
    once = [_once(found, device, make, nbytes) for _ in range(_ROUNDS + 1)][1:]
    return _Times(median(one.done for one in once), median(one.host for one in once))


def _once(found: Transport, device: torch.device, make: Callable[[int], Transfer], nbytes: int) -> _Times:
    with InFlight(found, device) as in_flight:
        in_flight.expect(lambda: [make(nbytes)])
        if device.type == "cuda":
            return _once_on_gpu(in_flight, device)
        begin = time.perf_counter()
        work = in_flight.start()
        host = time.perf_counter() - begin
        work.wait()
        return _Times(time.perf_counter() - begin, host)


def _once_on_gpu(in_flight: InFlight, device: torch.device) -> _Times:
    """All is launched before the GPU comes to it, as in a CUDA graph."""
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
        first.record()
        begin = time.perf_counter()
        in_flight.start().wait()
        host = time.perf_counter() - begin
        last.record()
        last.synchronize()
        return _Times(float(first.elapsed_time(last)) * 1e-3, host)


def _of_slowest(found: Transport, device: torch.device, values: list[float]) -> list[float]:
    """For each value the largest of all ranks."""
    # Not every device has fp64; the bits of it are bytes anywhere.
    own = torch.tensor(values, dtype=torch.float64).view(torch.uint8).to(device)
    everyone = own.new_empty(found.size, len(own))
    with InFlight(found, device) as in_flight:
        in_flight.expect(lambda: [found.prepare_all_gather(everyone, own)._replace(fill_missing=own.zero_)])
        in_flight.start().wait()
    on_host = everyone.cpu()
    # A rank that did not come has no times.
    found.look_for_fault()
    largest: list[float] = on_host.view(torch.float64).amax(dim=0).tolist()
    return largest
