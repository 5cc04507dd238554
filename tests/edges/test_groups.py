"""Groups that cannot be used: other processes' groups, and groups that are gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn.testing import ProcessRanks


def _said(group: Any, cp_size: int) -> str:
    meta = cpattn.build_metadata([(0, 8)], cp_size, 0)
    q = torch.zeros(meta.rows, 2, 8)
    with pytest.raises(cpattn.GroupError) as raised:
        cpattn.cp_attention(q, q, q, meta, group=group)
    with pytest.raises(cpattn.GroupError) as again:
        cpattn.unshard(q, meta, group=group)
    assert str(again.value) == str(raised.value)
    return str(raised.value)


def _outside_of_a_group() -> str:
    """Rank 1 of 2, of a group of rank 0 alone."""
    group: Any = dist.new_group([0])
    if dist.get_rank() == 1:
        return _said(group, 1)
    meta = cpattn.build_metadata([(0, 8)], 1, 0)
    return str(tuple(cpattn.unshard(torch.zeros(8, 2), meta, group=group).shape))


def _after_it_is_destroyed(used: bool) -> list[str]:
    """A group of all whose reference is kept, and then the one that is made in its place."""
    group: Any = dist.new_group()
    meta = cpattn.build_metadata([(0, 8)], dist.get_world_size(), dist.get_rank())
    x = torch.zeros(meta.rows, 2)
    if used:
        cpattn.unshard(x, meta, group=group)
    communicator = cpattn.ProcessGroupCommunicator(group)
    dist.destroy_process_group(group)
    said = [_said(group, dist.get_world_size()), _said(communicator, dist.get_world_size())]
    another: Any = dist.new_group()
    return [*said, str(tuple(cpattn.unshard(x, meta, group=another).shape))]


@pytest.fixture(scope="module")
def ranks() -> Any:
    with ProcessRanks(2, timeout=60) as started:
        yield started


def test_a_process_outside_of_the_group_is_told_so(ranks: ProcessRanks) -> None:
    member, outsider = ranks.run(_outside_of_a_group)
    assert member == "(8, 2)"
    assert outsider.startswith("group is GroupMember.NON_GROUP_MEMBER, which torch.distributed.new_group returns to processes that are not")
    assert "only its members make calls: pass the context-parallel group that this process belongs to, or skip the call here" in outsider


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_a_destroyed_group_is_refused_on_every_rank(ranks: ProcessRanks, used: bool) -> None:
    for *said, works in ranks.run(_after_it_is_destroyed, used):
        assert all(message.startswith("this process group has been destroyed") and "new_group" in message for message in said)
        assert works == "(8, 2)"
