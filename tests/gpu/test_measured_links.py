"""cpattn.measure_links between GPUs, over both transports."""

from __future__ import annotations

import pytest
import torch
from programs import rank_programs as programs

import cpattn
from cpattn.testing import ProcessRanks
from cpattn.transports.groups import Kind

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="each rank needs a GPU of its own")


def test_links_between_gpus() -> None:
    h100, measured = cpattn.MACHINES["h100-nvlink"], {}
    kinds: tuple[Kind, ...] = ("collectives", "peer_memory")
    with ProcessRanks(2, timeout=120, transport="nccl") as ranks:
        for kind in kinds:
            first, second = ranks.run(programs.measured_links, "cuda", kind)
            assert first == second
            measured[kind] = first
    for kind, machine in measured.items():
        link = machine.link(kind, 2)
        assert link is not None
        # What they are depends on what else the machine does.
        print(kind, link)
        assert link.gather > 0
        assert link.shift > 0
        assert link.latency >= 0
    assert measured["collectives"].peer_memory == h100.peer_memory
    assert measured["peer_memory"].collectives == h100.collectives
