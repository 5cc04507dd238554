"""What ``cpattn.transport`` takes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh

import cpattn


def test_a_transport_stands_for_itself() -> None:
    group = cpattn.LoopbackGroup(3)
    assert cpattn.transport(group.transport(1)) is group.transport(1) is group.communicator(1)
    assert cpattn.transport(group.transport(1), kind="auto") is group.transport(1)


def test_the_names_that_they_had_first() -> None:
    assert cpattn.Communicator is cpattn.Transport
    assert issubclass(cpattn.ProcessGroupCommunicator, cpattn.Transport)


@pytest.mark.parametrize(
    ("group", "kind", "error", "message"),
    [
        (None, "auto", cpattn.GroupError, r"there is no process group: call torch.distributed.init_process_group\(\), or pass group="),
        (None, "peer", cpattn.UnknownNameError, "kind='peer' is unknown; choose one of 'auto', 'collectives', 'peer_memory'"),
        (None, None, cpattn.OptionError, "kind=None; pass the name of a kind of transport: 'auto', 'collectives', 'peer_memory'"),
        ("cp", "auto", cpattn.GroupError, "group is a str; pass a ProcessGroup this process belongs to, a DeviceMesh axis or a Transport"),
        (
            cpattn.LoopbackGroup(2),
            "auto",
            cpattn.GroupError,
            r"group is a LoopbackGroup; pass one rank's end of it, group.transport\(rank\)",
        ),
    ],
)
def test_what_is_refused(group: Any, kind: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cpattn.transport(group, kind=kind)


def test_a_transport_of_another_kind() -> None:
    end = cpattn.LoopbackGroup(2).transport(0)
    with pytest.raises(cpattn.OptionError, match="'collectives', but group is a transport already, of kind 'loopback'"):
        cpattn.transport(end, kind="collectives")


def test_a_mesh_whose_groups_were_destroyed() -> None:
    """Of one axis or of two, whatever is asked for."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        meshes = [init_device_mesh("cpu", shape) for shape in ((1,), (1, 1))]
        for mesh in meshes:
            assert cpattn.transport(mesh).size == 1
    finally:
        dist.destroy_process_group()
    for mesh in meshes:
        for ask in (cpattn.transport, cpattn.check, cpattn.release):
            with pytest.raises(cpattn.GroupError, match=r"a device mesh without a process group, .*; make a new mesh on every rank"):
                ask(mesh)
