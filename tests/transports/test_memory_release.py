"""Memory that messages take up is kept between calls, and freed when asked for."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import cpattn
from cpattn.testing import run_loopback
from cpattn.transports.groups import as_transport


def memory_of(communicator: cpattn.Communicator) -> int:
    return sum(map(len, communicator.arena.blocks()))


def test_a_communicator_s_memory_and_everyone_s() -> None:
    meta = cpattn.build_metadata([(16, 40)], 1, 0)
    x, cached = torch.randn(40, 1, 8), torch.randn(16, 1, 8)
    groups = [cpattn.LoopbackGroup(1).communicator(0) for _ in range(2)]

    def call(group: Any) -> torch.Tensor:
        return cpattn.cp_attention(x, x, x, meta, group=group, kv_cache=cpattn.PackedKV(cached, cached))

    expected = call(None)
    for group in groups:
        call(group)
        assert memory_of(group) > 0
    cpattn.release(groups[0])
    assert [memory_of(group) > 0 for group in groups] == [False, True]
    assert torch.equal(call(groups[0]), expected)
    cpattn.release()
    assert [memory_of(group) for group in (*groups, as_transport(None, 1))] == [0, 0, 0]
    assert torch.equal(call(groups[1]), expected)


def test_a_group_in_use_is_not_released() -> None:
    meta = cpattn.build_metadata([(0, 4)], 1, 0)
    x = torch.randn(4, 1, 8)
    group = cpattn.LoopbackGroup(1).communicator(0)

    def kernel(q: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        with pytest.raises(cpattn.GroupError, match="a call is under way on this group, whose memory it uses"):
            cpattn.release(group)
        # Everything else is idle.
        before = memory_of(group)
        cpattn.release()
        assert memory_of(group) == before
        return q.clone(), torch.zeros(q.shape[:2])

    cpattn.cp_attention(x, x, x, meta, group=group, backend=kernel)
    cpattn.release(group)


def test_what_is_no_group() -> None:
    with pytest.raises(cpattn.GroupError, match="group is a str; pass a ProcessGroup"):
        cpattn.release("cp")  # type: ignore[arg-type]


def test_communicators_end_with_whoever_holds_them() -> None:
    communicator = cpattn.LoopbackGroup(1).communicator(0)
    dead = weakref.ref(communicator)
    del communicator
    gc.collect()
    assert dead() is None


def test_a_loopback_rank_has_one_communicator() -> None:
    group = cpattn.LoopbackGroup(2)
    assert group.communicator(1) is group.communicator(1)

    def program(communicator: cpattn.Communicator) -> list[float]:
        out = torch.empty(2)
        communicator.all_gather(out, torch.tensor([float(communicator.rank)])).wait()
        return out.tolist()

    assert run_loopback(program, 2) == [[0.0, 1.0]] * 2
