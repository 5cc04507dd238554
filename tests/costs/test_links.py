"""cpattn.measure_links over loopback: all ranks get the same machine, whatever each of them has timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import cpattn
from cpattn import Transport
from cpattn.costs import links
from cpattn.testing import run_loopback
from cpattn.transports.peer_processes import PeerMemoryTransport

H100 = cpattn.MACHINES["h100-nvlink"]


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_get_the_same_machine(size: int) -> None:
    first, *others = run_loopback(lambda group: cpattn.measure_links(group, device="cpu"), size)
    assert all(other == first for other in others)
    assert first.name == "h100-nvlink, links measured"
    assert first.collectives == first.across != H100.collectives
    assert min(first.collectives.gather, first.collectives.shift, first.collectives.host_gather, first.collectives.host_shift) > 0
    assert first.collectives.latency >= 0
    assert first.collectives.measured_ranks == size
    # What is not measured stays.
    assert (first.kernels, first.peer_memory, first.collectives.hides_gather) == (
        H100.kernels,
        H100.peer_memory,
        H100.collectives.hides_gather,
    )


def test_the_slowest_rank_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of 1 us and 2 GB/s, on one rank of 3 us and 1 GB/s: the line through its times."""

    def timed(found: Transport, device: torch.device, make: Any, nbytes: int) -> links._Times:
        received = make(nbytes).nbytes
        latency, rate = (3e-6, 1e9) if found.rank == 1 else (1e-6, 2e9)
        return links._Times(latency + received / rate, 5e-6 * (1 + found.rank))

    monkeypatch.setattr(links, "_timed", timed)
    for machine in run_loopback(lambda group: cpattn.measure_links(group, H100, device="cpu"), 3):
        link = machine.collectives
        assert link.gather == pytest.approx(1e9)
        assert link.shift == pytest.approx(1e9)
        assert link.latency == pytest.approx(3e-6)
        assert link.shift_latency == pytest.approx(3e-6)
        assert link.host_gather == link.host_shift == 5e-6 * 3


def test_a_rank_that_fails_in_the_midst_gives_the_group_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next call would meet the messages that the others went on with, and take their bytes for its own."""
    once, seen = links._once, []

    def fails_before_its_fourth(found: Transport, *arguments: Any) -> links._Times:
        seen.append(found.rank)
        if seen.count(1) == 4 and found.rank == 1:
            raise KeyboardInterrupt
        return once(found, *arguments)

    monkeypatch.setattr(links, "_once", fails_before_its_fourth)

    def program(group: Transport) -> None:
        if group.rank == 0:
            cpattn.measure_links(group, device="cpu")
        with pytest.raises(KeyboardInterrupt):
            cpattn.measure_links(group, device="cpu")
        meta = cpattn.build_metadata([(0, 4)], 2, group.rank)
        x = torch.ones(meta.rows, 1, 8)
        with pytest.raises(cpattn.GroupError, match="this group cannot be used any more: measuring its links"):
            cpattn.cp_attention(x, x, x, meta, group=group)
        with pytest.raises(cpattn.GroupError, match="this group cannot be used any more: measuring its links"):
            group.all_gather(torch.empty(2, 2), torch.ones(2))
        cpattn.check(group)

    with pytest.raises(cpattn.GroupError, match=r"measuring its links was interrupted \(KeyboardInterrupt\)"):
        run_loopback(program, 2)
    assert seen.count(1) == 4


def test_messages_of_many_ranks_are_smaller() -> None:
    """Of 256 MiB in all at the most."""
    gpu = torch.device("cuda")
    assert links._sizes(8, gpu) == [2**16, 2**22, 2**25]
    assert links._sizes(9, gpu) == [2**15, 2**21, 2**24]
    assert links._sizes(1024, gpu) == [2**9, 2**15, 2**18]
    assert links._sizes(1024, torch.device("cpu")) == [2**9, 2**15, 2**18]


@pytest.mark.parametrize("why_not", ["rank 1 runs on another host than rank 0", None])
def test_ranks_that_cannot_share_memory_have_no_peer_memory(why_not: str | None) -> None:
    """As they have found out; over CPU tensors nobody asks."""
    found = object.__new__(PeerMemoryTransport)
    found.size, found._shares, found._why_not = 2, False, why_not
    machine = links._with_links(H100, found, links._Measured(1e-6, 2e9, 3e9, 4e-6, 5e-6, 2, 6e-6))
    assert machine.collectives.gather == 2e9
    assert machine.peer_memory == (H100.peer_memory if why_not is None else None)


def test_what_went_through_the_memory_of_peers_is_theirs() -> None:
    found = object.__new__(PeerMemoryTransport)
    found.size, found._shares, found._why_not = 2, True, None
    machine = links._with_links(H100, found, links._Measured(1e-6, 2e9, 3e9, 4e-6, 5e-6, 2, 6e-6))
    assert machine.collectives == H100.collectives
    assert machine.peer_memory is not None
    assert (machine.peer_memory.gather, machine.peer_memory.shift, machine.peer_memory.hides_gather) == (2e9, 3e9, 0.0)


def test_peers_that_a_machine_does_not_know_of_are_of_one_host() -> None:
    """And hide what they do anywhere: what copy engines bring."""
    found = object.__new__(PeerMemoryTransport)
    found.size, found._shares, found._why_not = 2, True, None
    measured = links._Measured(1e-6, 2e9, 3e9, 4e-6, 5e-6, 2, 6e-6)
    link = links._with_links(cpattn.MACHINES["h100-infiniband"], found, measured).link("peer_memory", 2)
    assert H100.peer_memory is not None
    assert link == replace(H100.peer_memory, **measured._asdict(), from_one=None, shift_of_many=None)


def test_noise_gives_no_rate_below_nothing() -> None:
    assert links._line([10, 20, 40], [1.0, 4.0, 3.0]) == (40 / 3, 0.25)
    assert links._line([10, 20, 40], [1.0, 2.0, 4.0]) == (10.0, 0.0)


def test_estimates_go_by_what_was_measured() -> None:
    (machine, _) = run_loopback(lambda group: cpattn.measure_links(group, device="cpu"), 2)
    plan = cpattn.plan([(0, 4096)], 2)
    problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 32, 8, 128, 128)
    found = next(one for one in cpattn.estimate(plan, problem, machine) if one.transport == "collectives" and one.strategy == "all_gather")
    assert found.transfer == pytest.approx(machine.collectives.gather_seconds(found.bytes_sent))


def test_a_group_s_machine_is_one_or_its_name() -> None:
    """What is neither is refused as it is set, and not within the next call."""
    group = cpattn.LoopbackGroup(1).transport(0)
    group.machine = "h200-nvlink"
    assert group.machine is cpattn.MACHINES["h200-nvlink"]
    with pytest.raises(cpattn.UnknownNameError, match="machine='h300' is unknown"):
        group.machine = "h300"
    with pytest.raises(cpattn.OptionError, match=r"machine=5; pass a cpattn\.Machine"):
        group.machine = 5  # type: ignore[assignment]
    group.machine = None
    assert group.machine is None


def test_one_rank_has_no_links() -> None:
    assert cpattn.measure_links(cpattn.LoopbackGroup(1).transport(0), "h200-nvlink", device="cpu") is cpattn.MACHINES["h200-nvlink"]


def test_what_is_refused_before_anything_is_sent() -> None:
    group = cpattn.LoopbackGroup(2).transport(0)
    with pytest.raises(cpattn.UnknownNameError, match="machine='h300' is unknown"):
        cpattn.measure_links(group, "h300", device="cpu")
    with pytest.raises(cpattn.CPError, match="device='abacus' cannot be used on this machine"):
        cpattn.measure_links(group, device="abacus")
    with pytest.raises(cpattn.GroupError, match="there is no process group"):
        cpattn.measure_links(device="cpu")
    assert group.bytes_sent == 0
